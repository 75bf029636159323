"""Forward kernel of sparse MLA attention for Hopper GPUs.

A block of threads takes one query and 64 of its heads at a time. A warpgroup
gathers the selected rows, 64 keys at a time, into two tiles in turn. Two
warpgroups do the mathematics; each keeps its half of the output's columns, and
makes the scores and the softmax of every other tile:

  for its own tile:      scores, maximum, p; publishes p; out += p @ its half
  for the other's tile:  waits for p;                     out += p @ its half

so that one is at the softmax while the other keeps the tensor cores busy. The
running maximum is handed back and forth with p. Half a tile (the columns of
one warpgroup's output) is given back for the next rows as soon as its owner
is done with it.

Letters: N rows (batch and queries), H heads (padded to 64s), C latent width,
X = C + rope width, W = X padded to 64s, K selected keys (padded to 128s), S
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
)

HEADS = 64
CHUNK = mosaic_gather.CHUNK
KEYS = mosaic_gather.ROWS
REGISTERS = (232, 40)  # Of a thread that computes, and of one that gathers.
_LOG2_E = math.log2(math.e)
_LOWEST = -1e30  # Below any score in units of log 2, and finite.


def forward(
  q_NHW: jax.Array,
  kv_SX: jax.Array,
  indices_NK: jax.Array,
  *,
  rows_per_batch: int,
  keys_per_batch: int,
  latent_dim: int,
  scale: float,
  splits: int = 1,
  target: mosaic.Target,
) -> tuple[jax.Array, jax.Array]:
  """Output [N, H, C] and natural-log normaliser [N, H] (-inf without a key).

  Args:
    q_NHW: queries.
    kv_SX: keys.
    indices_NK: int32, -1 is none.
    rows_per_batch: queries that share a batch's keys.
    keys_per_batch: S of one batch.
    latent_dim: C.
    scale: factor of the scores.
    splits: the keys of a query are cut into so many parts, each a row of the
      outputs: [N * splits, H, ...]. K must be a multiple of 128 * splits.
    target: what the kernel is built for.
  """
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu

  num_rows, num_heads, tile_width = q_NHW.shape
  num_rows *= splits
  num_blocks = indices_NK.shape[1] // (KEYS * splits)
  half = latent_dim // 2
  parts = num_heads // HEADS
  num_tasks = num_rows * parts
  num_programs = min(mosaic.num_multiprocessors(target), num_tasks)
  # Columns of each part of a tile: one warpgroup's output, and the rest.
  columns = ((0, half), (half, tile_width))
  row_layout = plgpu.Layout.WGMMA.reduce(1)
  key_layout = plgpu.Layout.WGMMA.reduce(0)
  factor = scale * _LOG2_E

  def body(
    q_ref,
    kv_ref,
    indices_ref,
    out_ref,
    lse_ref,
    left_smem,
    right_smem,
    rope_smem,
    kv_smem,
    p_smem,
    rows_smem,
    landed_scratch,
    q_barrier,
    free,
    p_ready,
    totals_ready,
  ):
    # Small allocations take a kilobyte each, so these are one.
    highest_smem, shrink_smem = rows_smem.at[0], rows_smem.at[1]
    landed = mosaic_gather.Landed(landed_scratch, target)
    landed.initialize(4)
    # The queries; the first two take the output in the end.
    q_smem = (left_smem, right_smem, rope_smem)
    q_columns = (
      pl.ds(0, half),
      pl.ds(half, half),
      pl.ds(latent_dim, tile_width - latent_dim),
    )
    thread = lax.axis_index('thread')
    program = lax.axis_index('program')
    num_local = (num_tasks - program + num_programs - 1) // num_programs

    def compute(me: int) -> None:
      other = 1 - me
      plgpu.set_max_registers(REGISTERS[0], action='increase')
      mine = q_columns[me]

      def accumulate(out, p, slot):
        out = mosaic_products.add_products(
          out, [(p, kv_smem.at[slot, :, mine])], target
        )
        plgpu.barrier_arrive(free.at[2 * slot + me])
        return out

      def others_block(out, total):
        plgpu.barrier_wait(p_ready.at[other])
        highest = plgpu.load(highest_smem, layout=row_layout)
        shrink = plgpu.load(shrink_smem, layout=row_layout)
        out *= lax.broadcast_in_dim(shrink, out.shape, [0])
        return accumulate(out, p_smem, other), highest, total * shrink

      def own_block(row, block, parity, out, highest, total):
        indices = plgpu.load(
          indices_ref.at[pl.ds((row * num_blocks + block) * KEYS, KEYS)],
          layout=key_layout,
          optimized=False,
        )
        bias = jnp.where(indices >= 0, 0.0, -jnp.inf)

        def scores(scores_ref):
          landed.wait(2 * me, parity)
          landed.wait(2 * me + 1, parity)
          zero = mosaic_products.opaque(0, target)
          for q_part, part in zip(q_smem, q_columns, strict=True):
            kv_part = kv_smem.at[me + zero, :, part]
            plgpu.wgmma(scores_ref, q_part.at[zero], kv_part.transpose((1, 0)))
          return scores_ref[...]

        s = pl.run_scoped(scores, plgpu.ACC((HEADS, KEYS), jnp.float32))
        s = s * factor + lax.broadcast_in_dim(bias, s.shape, [1])
        new = jnp.maximum(highest, jnp.max(s, axis=1))
        shrink = jnp.exp2(highest - new)
        p = jnp.exp2(s - lax.broadcast_in_dim(new, s.shape, [0]))
        p16 = p.astype(jnp.bfloat16)
        p_smem[...] = p16
        highest_smem[...] = new
        shrink_smem[...] = shrink
        plgpu.commit_smem()
        plgpu.barrier_arrive(p_ready.at[me])
        total = total * shrink + jnp.sum(p, axis=1)
        out *= lax.broadcast_in_dim(shrink, out.shape, [0])
        # The interpreter's wgmma takes no factor from registers.
        factor_p = p_smem if target.interprets else p16
        return accumulate(out, factor_p, me), new, total

      def task(i, _):
        task = program + i * num_programs
        row, part = task // parts, lax.rem(task, parts)
        heads = pl.ds(part * HEADS, HEADS)
        for q_part, part in zip(
          q_smem[me : 1 + 2 * me], q_columns[me : 1 + 2 * me], strict=True
        ):
          plgpu.copy_gmem_to_smem(
            q_ref.at[row // splits, heads, part], q_part.at[0], q_barrier
          )
        out = plgpu.layout_cast(
          jnp.zeros((HEADS, half), jnp.float32), plgpu.Layout.WGMMA
        )
        highest = plgpu.layout_cast(
          jnp.full((HEADS,), _LOWEST, jnp.float32), row_layout
        )
        total = plgpu.layout_cast(jnp.zeros((HEADS,), jnp.float32), row_layout)
        plgpu.barrier_wait(q_barrier)

        def parity(pair):
          return lax.rem(i * (num_blocks // 2) + pair, 2)

        def pair(j, carry):
          out, highest, total = carry
          out, highest, total = others_block(out, total)
          return own_block(row, 2 * j + me, parity(j), out, highest, total)

        carry = (out, highest, total)
        if me == 0:
          carry = own_block(row, 0, parity(0), *carry)
          carry = lax.fori_loop(1, num_blocks // 2, pair, carry)
          carry = others_block(carry[0], carry[2])
        else:
          carry = lax.fori_loop(0, num_blocks // 2, pair, carry)
        out, highest, total = carry
        rows_smem[2 + me] = total
        plgpu.barrier_arrive(totals_ready)
        plgpu.barrier_wait(totals_ready)
        total += plgpu.load(rows_smem.at[2 + other], layout=row_layout)
        empty = total == 0.0
        inverse = 1.0 / jnp.where(empty, 1.0, total)
        out *= lax.broadcast_in_dim(inverse, out.shape, [0])
        # No product reads the queries any more: their memory takes the output.
        q_smem[me][0] = out.astype(jnp.bfloat16)
        if me == 0:
          lse = highest / _LOG2_E + jnp.log(total)
          highest_smem[...] = jnp.where(empty, -jnp.inf, lse)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem[me].at[0], out_ref.at[row, heads, mine])
        if me == 0:
          plgpu.copy_smem_to_gmem(highest_smem, lse_ref.at[row, heads])
        plgpu.wait_smem_to_gmem(0)
        return ()

      lax.fori_loop(0, num_local, task, ())

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
          row // (splits * rows_per_batch) * keys_per_batch,
          target,
        )

      def gather(step, indices):
        following = load_indices(step + 1)
        slot = lax.rem(step, 2)
        for part in range(2):

          @pl.when(step >= 2)
          def _wait(part=part):
            plgpu.barrier_wait(free.at[2 * slot + part])

          mosaic_gather.gather(
            kv_ref,
            indices,
            kv_smem,
            landed,
            slot=slot,
            barrier=2 * slot + part,
            columns=columns[part],
          )
        return following

      lax.fori_loop(0, last + 1, gather, load_indices(0))
      for i in range(4):
        plgpu.barrier_wait(free.at[i])

  call = mosaic.kernel(
    body,
    target=target,
    compiler_params=mosaic_gather.compiler_params(),
    kernel_name='sparse_mla_attention_forward',
    out_type=(
      jax.ShapeDtypeStruct((num_rows, num_heads, latent_dim), q_NHW.dtype),
      jax.ShapeDtypeStruct((num_rows, num_heads), jnp.float32),
    ),
    grid=(num_programs,),
    grid_names=('program',),
    num_threads=3,
    thread_name='thread',
    scratch_types=scratch(latent_dim, tile_width, target),
  )
  return call(q_NHW, kv_SX, indices_NK.reshape(-1))


def scratch(
  latent_dim: int, tile_width: int, target: mosaic.Target
) -> list[Any]:
  """Shared memory and barriers of a block."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  return [
    mosaic_gather.tile((1, HEADS, latent_dim // 2)),
    mosaic_gather.tile((1, HEADS, latent_dim // 2)),
    mosaic_gather.tile((1, HEADS, tile_width - latent_dim)),
    mosaic_gather.tile((2, KEYS, tile_width)),
    mosaic_gather.tile((HEADS, KEYS)),
    plgpu.SMEM((4, HEADS), jnp.float32),
    mosaic_gather.Landed.scratch(4, target),
    plgpu.Barrier(num_arrivals=3),
    plgpu.Barrier(num_barriers=4),
    plgpu.Barrier(num_barriers=2),
    plgpu.Barrier(num_arrivals=2),
  ]
