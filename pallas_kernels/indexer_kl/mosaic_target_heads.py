"""The head-summed target where every head has keys of its own, on Hopper.

A block works on 128 queries and 128 keys and walks the heads: each head's
scores become exponentials and are summed where they are, in the registers of
two warpgroups of 64 queries each. A third loads the next head's tiles. Causal
tiles without a valid pair are left out.

Letters: T queries, S keys, H heads, X width (a multiple of 64).
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.indexer_kl import mosaic_rows
from pallas_kernels.indexer_kl.mosaic_rows import CHUNK

TILE = 128
"""Queries, and keys, of a block."""

_HALF = TILE // 2


def target(
  q_THX: jax.Array,
  k_SHX: jax.Array,
  lse_TH: jax.Array,
  start_T: jax.Array,
  end_T: jax.Array,
  *,
  scale: float,
  mean_over: int,
  stages: int,
  on: mosaic.Target,
) -> jax.Array:
  """sum_h exp(scale * q[t, h] . k[s, h] - lse[t, h]) / mean_over: [T, S].

  float32, written only in tiles that hold a valid pair.

  Args:
    q_THX: bfloat16, T a multiple of 128.
    k_SHX: bfloat16, S a multiple of 128.
    lse_TH: float32, natural logarithm, with no -inf.
    start_T: int32 first keys.
    end_T: int32, one past the last.
    scale: factor of the scores.
    mean_over: H, without padding.
    stages: heads under way.
    on: where it runs.
  """
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu

  num_queries, num_heads, width = q_THX.shape
  num_keys = k_SHX.shape[0]
  factor = scale * math.log2(math.e)
  lse_HT = (lse_TH * math.log2(math.e) + math.log2(mean_over)).T
  empty_NP = (start_T >= end_T).reshape(-1, TILE)
  start_NP, end_NP = start_T.reshape(-1, TILE), end_T.reshape(-1, TILE)
  first_N = jnp.min(jnp.where(empty_NP, num_keys, start_NP), axis=1)
  last_N = jnp.max(jnp.where(empty_NP, 0, end_NP), axis=1)

  def body(q_ref, k_ref, lse_ref, first_ref, last_ref, p_ref, *scratch):
    q_smem, k_smem, lse_smem, ready, free = scratch
    thread = lax.axis_index('wg')
    queries, keys = lax.axis_index('queries'), lax.axis_index('keys')
    key = keys * TILE
    used = (key < last_ref[queries]) & (key + TILE > first_ref[queries])

    @pl.when(used & (thread < 2))
    def _():
      if not on.interprets:
        plgpu.set_max_registers(216, action='increase')
      rows = pl.ds(thread * _HALF, _HALF)

      def head(h, mass):
        slot = lax.rem(h, stages)
        plgpu.barrier_wait(ready.at[slot])
        q = q_smem.at[slot, thread]

        def multiply(acc):
          plgpu.wgmma(acc, q, k_smem.at[slot].transpose((1, 0)))
          return acc[...]

        scores = pl.run_scoped(multiply, plgpu.ACC((_HALF, TILE), jnp.float32))
        lse = plgpu.load(
          lse_smem.at[slot, rows], layout=plgpu.Layout.WGMMA.reduce(1)
        )
        plgpu.barrier_arrive(free.at[slot])
        lse = lax.broadcast_in_dim(lse, scores.shape, [0])
        return mass + jnp.exp2(scores * factor - lse)

      zero = plgpu.layout_cast(
        jnp.zeros((_HALF, TILE), jnp.float32), plgpu.Layout.WGMMA
      )
      mass = lax.fori_loop(0, num_heads, head, zero)
      query = queries * TILE + thread * _HALF
      p_ref[pl.ds(query, _HALF), pl.ds(key, TILE)] = mass

    @pl.when(used & (thread == 2))
    def _():
      if not on.interprets:
        plgpu.set_max_registers(40, action='decrease')

      def head(h, _):
        slot = lax.rem(h, stages)

        @pl.when(h >= stages)
        def _():
          plgpu.barrier_wait(free.at[slot])

        for half in range(2):
          query = queries * TILE + half * _HALF
          plgpu.copy_gmem_to_smem(
            q_ref.at[pl.ds(query, _HALF), h],
            q_smem.at[slot, half],
            ready.at[slot],
          )
        plgpu.copy_gmem_to_smem(
          k_ref.at[pl.ds(key, TILE), h], k_smem.at[slot], ready.at[slot]
        )
        plgpu.copy_gmem_to_smem(
          lse_ref.at[h, pl.ds(queries * TILE, TILE)],
          lse_smem.at[slot],
          ready.at[slot],
        )
        return ()

      lax.fori_loop(0, num_heads, head, ())
      for slot in range(min(stages, num_heads)):
        plgpu.barrier_wait(free.at[slot])

  assert width % CHUNK == 0, width
  operand = mosaic_rows.transforms()
  return mosaic.kernel(
    body,
    target=on,
    out_type=jax.ShapeDtypeStruct((num_queries, num_keys), jnp.float32),
    grid=(num_queries // TILE, num_keys // TILE),
    grid_names=('queries', 'keys'),
    num_threads=3,
    thread_name='wg',
    scratch_types=[
      plgpu.SMEM((stages, 2, _HALF, width), jnp.bfloat16, transforms=operand),
      plgpu.SMEM((stages, TILE, width), jnp.bfloat16, transforms=operand),
      plgpu.SMEM((stages, TILE), jnp.float32),
      plgpu.Barrier(num_arrivals=4, num_barriers=stages),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    ],
  )(q_THX, k_SHX, lse_HT, first_N, last_N)
