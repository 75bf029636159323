"""Backward kernel of sparse MLA attention for Hopper GPUs.

A block of threads takes one query and 64 of its heads at a time. A warpgroup
gathers the selected rows, 64 keys at a time, into one tile; two warpgroups
share the mathematics:

  first:  scores = q @ kv^T, p = exp(scores - lse)      publishes p
  second: d_p = d_out @ v^T, d_s = p * (d_p - delta)    publishes d_s
  each its columns:  d_q += d_s @ kv                    gives the tile back
                     d_kv = p^T @ d_out + d_s^T @ q     added to global memory

so that the next rows arrive during the products of d_kv, which need none.

Letters: N rows (batch and queries), H heads (padded to 64s), C latent width,
X = C + rope width, W = X padded to 64s, K selected keys (a multiple of 64), S
keys of all batches.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.sparse_mla_attention import (
  mosaic_gather,
  mosaic_products,
  mosaic_scatter,
)

HEADS = 64
KEYS = mosaic_gather.ROWS
_CHUNK = 64  # Columns of d_kv at a time.
REGISTERS = (232, 40)  # Of a thread that computes, and of one that gathers.
_LOG2_E = math.log2(math.e)


def backward(
  q_NHW: jax.Array,
  d_out_NHC: jax.Array,
  kv_SX: jax.Array,
  indices_NK: jax.Array,
  lse_NH: jax.Array,
  delta_NH: jax.Array,
  *,
  rows_per_batch: int,
  keys_per_batch: int,
  scale: float,
  full_lines: bool = False,
  target: mosaic.Target,
) -> tuple[jax.Array, jax.Array]:
  """Gradients of q, [N, H, W] of q's type, and of kv, [S, W] in float32.

  Args:
    q_NHW: queries.
    d_out_NHC: the output's gradient.
    kv_SX: keys.
    indices_NK: int32, -1 is none.
    lse_NH: the forward pass's normaliser, finite.
    delta_NH: sum of out * d_out over C.
    rows_per_batch: queries that share a batch's keys.
    keys_per_batch: S of one batch.
    scale: factor of the scores.
    full_lines: see `mosaic_scatter.add_rows`.
    target: what the kernel is built for.
  """
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu

  num_rows, num_heads, tile_width = q_NHW.shape
  latent_dim = d_out_NHC.shape[2]
  half = latent_dim // 2
  num_blocks = indices_NK.shape[1] // KEYS
  parts = num_heads // HEADS
  num_tasks = num_rows * parts
  num_programs = min(mosaic.num_multiprocessors(target), num_tasks)
  if target.interprets:
    num_programs = 1  # Its additions to global memory aren't atomic.
  # Columns of the left and right half of the latent, and of the rest.
  columns = (
    (0, half),
    (half, half),
    (latent_dim, tile_width - latent_dim),
  )
  owned = ((0,), (1, 2))
  row_layout = plgpu.Layout.WGMMA.reduce(1)
  key_layout = plgpu.Layout.WGMMA.reduce(0)

  def body(
    q_ref,
    d_out_ref,
    kv_ref,
    indices_ref,
    lse_ref,
    delta_ref,
    sums_ref,
    d_q_ref,
    *scratch_refs,
  ):
    q_smem, d_out_smem = scratch_refs[:3], scratch_refs[3:5]
    (
      kv_smem,
      p_smem,
      d_s_smem,
      landed_scratch,
      queries_ready,
      free,
      p_ready,
      d_s_ready,
      second_done,
    ) = scratch_refs[5:]
    landed = mosaic_gather.Landed(landed_scratch, target)
    landed.initialize(2)
    thread = lax.axis_index('thread')
    program = lax.axis_index('program')
    num_local = (num_tasks - program + num_programs - 1) // num_programs

    def kv_part(part):
      here = mosaic_products.opaque(0, target)
      return kv_smem.at[here, :, pl.ds(*columns[part])]

    def hidden(ref):
      return ref.at[mosaic_products.opaque(0, target)]

    def indices_at(row, block, layout):
      return plgpu.load(
        indices_ref.at[pl.ds((row * num_blocks + block) * KEYS, KEYS)],
        layout=layout,
        optimized=False,
      )

    def products(pairs):
      def scoped(total_ref):
        for a, b in pairs:
          plgpu.wgmma(total_ref, a, b)
        return total_ref[...]

      shape = (HEADS, KEYS)
      return pl.run_scoped(scoped, plgpu.ACC(shape, jnp.float32))

    def publish_p(row, block, step, lse):
      indices = indices_at(row, block, key_layout)
      bias = jnp.where(indices >= 0, 0.0, -jnp.inf)
      for part in range(2):
        landed.wait(part, lax.rem(step, 2))
      s = products(
        (hidden(q_smem[part]), kv_part(part).transpose((1, 0)))
        for part in range(3)
      )
      s = s * (scale * _LOG2_E) + lax.broadcast_in_dim(bias, s.shape, [1])
      p = jnp.exp2(s - lax.broadcast_in_dim(lse, s.shape, [0]))

      @pl.when(step > 0)
      def _wait():
        plgpu.barrier_wait(second_done)

      p_smem[...] = p.astype(jnp.bfloat16)
      plgpu.commit_smem()
      plgpu.barrier_arrive(p_ready)
      plgpu.barrier_wait(d_s_ready)

    def publish_d_s(step, delta):
      for part in range(2):
        landed.wait(part, lax.rem(step, 2))
      d_p = products(
        (hidden(d_out_smem[part]), kv_part(part).transpose((1, 0)))
        for part in range(2)
      )
      d_p = (d_p - lax.broadcast_in_dim(delta, d_p.shape, [0])) * scale
      plgpu.barrier_wait(p_ready)
      p = plgpu.load(p_smem, layout=plgpu.Layout.WGMMA)
      d_s_smem[...] = (p.astype(jnp.float32) * d_p).astype(jnp.bfloat16)
      plgpu.commit_smem()
      plgpu.barrier_arrive(d_s_ready)

    def add_key_gradients(me, row, block):
      base = row // rows_per_batch * keys_per_batch
      indices = indices_at(row, block, row_layout)
      indices = jnp.where(indices < 0, -1, indices + base)
      for part in owned[me]:
        start, width = columns[part]
        for column in range(0, width, _CHUNK):
          chunk = pl.ds(column, _CHUNK)
          pairs = [
            (d_s_smem.transpose((1, 0)), hidden(q_smem[part]).at[:, chunk]),
          ]
          if part < 2:
            pairs.append(
              (
                p_smem.transpose((1, 0)),
                hidden(d_out_smem[part]).at[:, chunk],
              )
            )
          mosaic_scatter.add_rows(
            sums_ref,
            indices,
            products(pairs),
            column=start + column,
            full_lines=full_lines,
            target=target,
          )

    def compute(me):
      plgpu.set_max_registers(REGISTERS[0], action='increase')

      def task(i, _):
        task = program + i * num_programs
        row, part = task // parts, lax.rem(task, parts)
        heads = pl.ds(part * HEADS, HEADS)
        for p in owned[me]:
          here = pl.ds(*columns[p])
          plgpu.copy_gmem_to_smem(
            q_ref.at[row, heads, here], q_smem[p].at[0], queries_ready
          )
          if p < 2:
            plgpu.copy_gmem_to_smem(
              d_out_ref.at[row, heads, here],
              d_out_smem[p].at[0],
              queries_ready,
            )
        statistics = plgpu.load(
          (delta_ref if me else lse_ref).at[row, heads],
          layout=row_layout,
          optimized=False,
        )
        if me == 0:
          statistics *= _LOG2_E
        plgpu.barrier_wait(queries_ready)

        def block(b, d_q):
          step = i * num_blocks + b
          if me == 0:
            publish_p(row, b, step, statistics)
          else:
            publish_d_s(step, statistics)
          d_q = tuple(
            mosaic_products.add_products(x, [(d_s_smem, kv_part(p))], target)
            for x, p in zip(d_q, owned[me], strict=True)
          )
          plgpu.barrier_arrive(free)
          add_key_gradients(me, row, b)
          if me == 1:
            plgpu.barrier_arrive(second_done)
          return d_q

        d_q = tuple(
          plgpu.layout_cast(
            jnp.zeros((HEADS, columns[p][1]), jnp.float32), plgpu.Layout.WGMMA
          )
          for p in owned[me]
        )
        d_q = lax.fori_loop(0, num_blocks, block, d_q)
        # Only this warpgroup still reads these queries.
        for x, p in zip(d_q, owned[me], strict=True):
          q_smem[p][0] = x.astype(jnp.bfloat16)
        plgpu.commit_smem()
        for p in owned[me]:
          plgpu.copy_smem_to_gmem(
            q_smem[p].at[0], d_q_ref.at[row, heads, pl.ds(*columns[p])]
          )
        plgpu.wait_smem_to_gmem(0)
        return ()

      lax.fori_loop(0, num_local, task, ())
      if me == 0:
        plgpu.barrier_wait(second_done)

    pl.when(thread == 0)(lambda: compute(0))
    pl.when(thread == 1)(lambda: compute(1))

    @pl.when(thread == 2)
    def _produce():
      plgpu.set_max_registers(REGISTERS[1], action='decrease')
      last = num_local * num_blocks - 1

      def load_indices(step):
        step = jnp.minimum(step, last)
        task = program + step // num_blocks * num_programs
        row = task // parts
        block = lax.rem(step, num_blocks)
        return mosaic_gather.load_indices(
          indices_ref,
          (row * num_blocks + block) * KEYS,
          row // rows_per_batch * keys_per_batch,
          target,
        )

      def gather(step, indices):
        following = load_indices(step + 1)

        @pl.when(step > 0)
        def _wait():
          plgpu.barrier_wait(free)

        for part, here in enumerate(((0, half), (half, tile_width))):
          mosaic_gather.gather(
            kv_ref,
            indices,
            kv_smem,
            landed,
            slot=0,
            barrier=part,
            columns=here,
          )
        return following

      lax.fori_loop(0, last + 1, gather, load_indices(0))
      plgpu.barrier_wait(free)

  call = mosaic.kernel(
    body,
    target=target,
    compiler_params=mosaic_gather.compiler_params(),
    kernel_name='sparse_mla_attention_backward',
    out_type=jax.ShapeDtypeStruct(q_NHW.shape, q_NHW.dtype),
    grid=(num_programs,),
    grid_names=('program',),
    num_threads=3,
    thread_name='thread',
    scratch_types=scratch(latent_dim, tile_width, target),
  )
  d_q_NHW, sums = mosaic.in_place(call)(
    q_NHW,
    d_out_NHC,
    kv_SX,
    indices_NK.reshape(-1),
    lse_NH,
    delta_NH,
    jnp.zeros((kv_SX.shape[0], tile_width), jnp.float32),
  )
  return d_q_NHW, mosaic_scatter.to_column_order(sums)


def scratch(
  latent_dim: int, tile_width: int, target: mosaic.Target
) -> list[Any]:
  """Shared memory and barriers of a block."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  half = mosaic_gather.tile((1, HEADS, latent_dim // 2))
  square = mosaic_gather.tile((HEADS, KEYS))
  return [
    half,
    half,
    mosaic_gather.tile((1, HEADS, tile_width - latent_dim)),
    half,
    half,
    mosaic_gather.tile((1, KEYS, tile_width)),
    square,
    square,
    mosaic_gather.Landed.scratch(2, target),
    plgpu.Barrier(num_arrivals=5),
    plgpu.Barrier(num_arrivals=2),
    plgpu.Barrier(),
    plgpu.Barrier(),
    plgpu.Barrier(),
  ]
