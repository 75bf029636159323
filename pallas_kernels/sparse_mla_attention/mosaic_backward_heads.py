"""The backward kernel's pass over 64 heads: d_q, and p and d_s for later.

  first:  scores = q @ kv^T, p = exp(scores - lse)       publishes p
  second: d_p = d_out @ v^T, d_s = p * (d_p - delta)     publishes d_s
  each its columns:  d_q += d_s @ kv                     gives them back

The next rows arrive part by part, as their columns are given back. p and d_s
leave for global memory meanwhile; or, where these are all the heads there are,
each warpgroup adds its columns of d_kv = p^T @ d_out + d_s^T @ q.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels.sparse_mla_attention import (
  mosaic_backward_plan,
  mosaic_gather,
  mosaic_products,
  mosaic_scatter,
)
from pallas_kernels.sparse_mla_attention.mosaic_backward_plan import (
  CHUNK,
  D_S,
  HEADS,
  KEYS,
  P,
  Plan,
  Refs,
)

_OWNED = ((0,), (1, 2))  # Parts of the columns, of each warpgroup.
_LOG2_E = math.log2(math.e)


def compute(plan: Plan, refs: Refs, me: int, i: Any, group: Any) -> None:
  """What warpgroup `me` does in task `i` for its 64 heads number `group`."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu

  row, first = plan.locate(i)
  heads = pl.ds((first + group) * HEADS, HEADS)
  statistics = plgpu.load(
    (refs.delta if me else refs.lse).at[row, heads],
    layout=plgpu.Layout.WGMMA.reduce(1),
    optimized=False,
  )
  if me == 0:
    statistics *= _LOG2_E
  plgpu.barrier_wait(refs.heads_ready)

  # For the passes over columns, that there are only with more heads than these.
  passed_on = plan.groups > 1

  def number(block):
    return (i * plan.groups + group) * plan.num_blocks + block

  def kv_part(part):
    kv = mosaic_backward_plan.hidden(refs.kv_smem, plan.target)
    return kv.at[:, pl.ds(*plan.columns[part])]

  def against_keys(factors, parity):
    def scoped(total_ref):
      for part, factor in enumerate(factors):
        if part < 2:
          refs.landed.wait(part, parity)
        plgpu.wgmma(
          total_ref,
          mosaic_backward_plan.hidden(factor, plan.target),
          kv_part(part).transpose((1, 0)),
        )
      return total_ref[...]

    return pl.run_scoped(scoped, mosaic_backward_plan.accumulator())

  def publish(ref, x, ready, tile):
    if passed_on:
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    ref[...] = x.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.barrier_arrive(ready)
    if passed_on:
      plgpu.copy_smem_to_gmem(ref, refs.weights.at[tile])

  def publish_p(block, parity):
    indices = mosaic_backward_plan.load_indices(
      plan, refs, row, block, plgpu.Layout.WGMMA.reduce(0)
    )
    bias = jnp.where(indices >= 0, 0.0, -jnp.inf)
    s = against_keys(refs.q_smem, parity)
    s = s * (plan.scale * _LOG2_E) + lax.broadcast_in_dim(bias, s.shape, [1])
    p = jnp.exp2(s - lax.broadcast_in_dim(statistics, s.shape, [0]))
    if not passed_on:

      @pl.when(number(block) > 0)
      def _wait():
        plgpu.barrier_wait(refs.second_done)

    tile = plan.weights_tile(P, group, block)
    publish(refs.p_smem, p, refs.p_ready, tile)
    plgpu.barrier_wait(refs.d_s_ready)

  def publish_d_s(block, parity):
    d_p = against_keys(refs.d_out_smem, parity)
    d_p = d_p - lax.broadcast_in_dim(statistics, d_p.shape, [0])
    d_p = d_p * plan.scale
    plgpu.barrier_wait(refs.p_ready)
    p = plgpu.load(refs.p_smem, layout=plgpu.Layout.WGMMA)
    tile = plan.weights_tile(D_S, group, block)
    d_s = p.astype(jnp.float32) * d_p
    publish(refs.d_s_smem, d_s, refs.d_s_ready, tile)

  def add_key_gradients(block):
    indices = mosaic_backward_plan.load_indices(
      plan, refs, row, block, plgpu.Layout.WGMMA.reduce(1)
    )
    indices = jnp.where(indices < 0, -1, indices + plan.first_key(row))
    for part in _OWNED[me]:
      start, width = plan.columns[part]
      factors = [(refs.d_s_smem, refs.q_smem[part])]
      if part < 2:
        factors.append((refs.p_smem, refs.d_out_smem[part]))
      for column in range(0, width, CHUNK):

        def scoped(total_ref, factors=factors, column=column):
          for weights, factor in factors:
            factor = mosaic_backward_plan.hidden(factor, plan.target)
            plgpu.wgmma(
              total_ref,
              weights.transpose((1, 0)),
              factor.at[:, pl.ds(column, CHUNK)],
            )
          return total_ref[...]

        x = pl.run_scoped(scoped, mosaic_backward_plan.accumulator())
        mosaic_scatter.add_rows(
          refs.sums, indices, x, column=start + column, target=plan.target
        )

  def step(block, d_q):
    parity = lax.rem(number(block), 2)
    (publish_d_s if me else publish_p)(block, parity)
    d_q = tuple(
      mosaic_products.add_products(
        x, [(refs.d_s_smem, kv_part(part))], plan.target
      )
      for x, part in zip(d_q, _OWNED[me], strict=True)
    )
    plgpu.barrier_arrive(refs.free.at[me])
    if not passed_on:
      add_key_gradients(block)
      if me == 1:
        plgpu.barrier_arrive(refs.second_done)
    return d_q

  d_q = tuple(
    plgpu.layout_cast(
      jnp.zeros((HEADS, plan.columns[part][1]), jnp.float32),
      plgpu.Layout.WGMMA,
    )
    for part in _OWNED[me]
  )
  d_q = lax.fori_loop(0, plan.num_blocks, step, d_q)
  # Only this warpgroup still reads these queries: their memory takes d_q.
  for x, part in zip(d_q, _OWNED[me], strict=True):
    refs.q_smem[part][0] = x.astype(jnp.bfloat16)
  plgpu.commit_smem()
  for part in _OWNED[me]:
    here = pl.ds(*plan.columns[part])
    plgpu.copy_smem_to_gmem(
      refs.q_smem[part].at[0], refs.d_q.at[row, heads, here]
    )
  plgpu.wait_smem_to_gmem(0)
  mosaic_gather.fence(plan.target)
  plgpu.barrier_arrive(refs.done)


def bring(plan: Plan, refs: Refs, i: Any, group: Any) -> None:
  """Brings what `compute` works on; the memory must be free."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu

  row, first = plan.locate(i)
  heads = pl.ds((first + group) * HEADS, HEADS)
  for source, parts in ((refs.q, refs.q_smem), (refs.d_out, refs.d_out_smem)):
    for part, columns in zip(parts, plan.columns, strict=False):
      here = source.at[row, heads, pl.ds(*columns)]
      plgpu.copy_gmem_to_smem(here, part.at[0], refs.heads_ready)

  def load_indices(block):
    return mosaic_gather.load_indices(
      refs.indices,
      (row * plan.num_blocks + block) * KEYS,
      plan.first_key(row),
      plan.target,
    )

  def step(block, indices):
    following = load_indices(jnp.minimum(block + 1, plan.num_blocks - 1))
    halves = (0, plan.half), (plan.half, plan.tile_width)
    for part, columns in enumerate(halves):

      @pl.when(block > 0)
      def _wait(part=part):
        plgpu.barrier_wait(refs.free.at[part])

      mosaic_gather.gather(
        refs.kv,
        indices,
        refs.kv_smem,
        refs.landed,
        slot=0,
        barrier=part,
        columns=columns,
      )
    return following

  lax.fori_loop(0, plan.num_blocks, step, load_indices(0))
  for part in range(2):
    plgpu.barrier_wait(refs.free.at[part])
