"""Forward kernel of sparse MLA attention for Hopper GPUs; decode too.

A block of threads takes one query and 64 of its heads at a time. A warpgroup
gathers the selected rows, 64 keys at a time, into two tiles in turn. Two
warpgroups do the mathematics; each keeps its half of the output's columns, and
makes the scores and the softmax of every other tile:

  for its own tile:      scores, maximum, p; publishes p; out += p @ its half
  for the other's tile:  waits for p;                     out += p @ its half

so that one is at the softmax while the other keeps the tensor cores busy; the
second starts its scores before it waits for the first's p, and makes its
softmax while its product with that p is under way. The running maximum is
handed back and forth with p. A part of a tile (the columns of a warpgroup's
output, or the rotary keys, where p takes their place) is given back for the
next rows as soon as its last reader is done with it.

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
  mosaic_fp8,
  mosaic_gather,
  mosaic_products,
)

HEADS = 64
CHUNK = mosaic_gather.CHUNK
KEYS = mosaic_gather.ROWS
REGISTERS = (232, 40)  # Of a thread that computes, and of one that gathers.
REGISTERS_FP8 = (200, 104)
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
    kv_SX: keys, or the uint8 rows of `fp8_cache`.
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
  # Columns of each part of a tile: the warpgroups' outputs, and the rest.
  columns = ((0, half), (half, latent_dim), (latent_dim, tile_width))
  row_layout = plgpu.Layout.WGMMA.reduce(1)
  key_layout = plgpu.Layout.WGMMA.reduce(0)
  factor = scale * _LOG2_E
  quantised = kv_SX.dtype == jnp.uint8
  registers = REGISTERS_FP8 if quantised else REGISTERS

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
    landed.initialize(6)
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
      plgpu.set_max_registers(registers[0], action='increase')
      mine = q_columns[me]

      def p_ref(slot):
        # The rotary keys of a tile are for its scores only, so p lies there.
        return kv_smem.at[slot, :, q_columns[2]]

      def values(slot):
        return kv_smem.at[slot, :, mine]

      def scaled(x, rows):
        return x * lax.broadcast_in_dim(rows, x.shape, [0])

      def start_scores(scores_ref, parity):
        zero = mosaic_products.opaque(0, target)
        for number, (q_part, part) in enumerate(
          zip(q_smem, q_columns, strict=True)
        ):
          landed.wait(3 * me + number, parity)
          plgpu.wgmma(
            scores_ref,
            q_part.at[zero],
            kv_smem.at[me + zero, :, part].transpose((1, 0)),
          )

      def bias_of(row, block):
        indices = plgpu.load(
          indices_ref.at[pl.ds((row * num_blocks + block) * KEYS, KEYS)],
          layout=key_layout,
          optimized=False,
        )
        return jnp.where(indices >= 0, 0.0, -jnp.inf)

      def publish(s, bias, highest, total):
        s = s * factor + lax.broadcast_in_dim(bias, s.shape, [1])
        new = jnp.maximum(highest, jnp.max(s, axis=1))
        shrink = jnp.exp2(highest - new)
        p = jnp.exp2(s - lax.broadcast_in_dim(new, s.shape, [0]))
        p16 = p.astype(jnp.bfloat16)
        p_ref(me)[...] = p16
        highest_smem[...] = new
        shrink_smem[...] = shrink
        plgpu.commit_smem()
        plgpu.barrier_arrive(p_ready.at[me])
        return p16, new, shrink, total * shrink + jnp.sum(p, axis=1)

      def take_over(out, total):
        plgpu.barrier_wait(p_ready.at[other])
        highest = plgpu.load(highest_smem, layout=row_layout)
        shrink = plgpu.load(shrink_smem, layout=row_layout)
        return scaled(out, shrink), highest, total * shrink

      def give_back(slot):
        plgpu.barrier_arrive(free.at[3 * slot + me])
        if slot != me:
          plgpu.barrier_arrive(free.at[3 * slot + 2])

      def add_own(out, p16, shrink):
        # The interpreter's wgmma takes no factor from registers.
        p = p_ref(me) if target.interprets else p16
        out = mosaic_products.add_products(
          scaled(out, shrink), [(p, values(me))], target
        )
        give_back(me)
        return out

      def own_block(row, block, parity, out, highest, total):
        bias = bias_of(row, block)

        def scores(scores_ref):
          start_scores(scores_ref, parity)
          return scores_ref[...]

        s = pl.run_scoped(scores, plgpu.ACC((HEADS, KEYS), jnp.float32))
        p16, highest, shrink, total = publish(s, bias, highest, total)
        return add_own(out, p16, shrink), highest, total

      def others_block(out, total):
        out, highest, total = take_over(out, total)
        out = mosaic_products.add_products(
          out, [(p_ref(other), values(other))], target
        )
        give_back(other)
        return out, highest, total

      def others_block_under_own(row, block, parity, out, total):
        bias = bias_of(row, block)

        def scoped(scores_ref):
          start_scores(scores_ref, parity)
          scaled_out, highest, scaled_total = take_over(out, total)

          def softmax():
            s = plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)
            return publish(s, bias, highest, scaled_total)

          row = ((HEADS,), jnp.float32)
          return mosaic_products.add_products(
            scaled_out,
            [(p_ref(other), values(other))],
            target,
            meanwhile=softmax,
            results=(((HEADS, KEYS), jnp.bfloat16), row, row, row),
          )

        out, (p16, highest, shrink, total) = pl.run_scoped(
          scoped, plgpu.ACC((HEADS, KEYS), jnp.float32)
        )
        give_back(other)
        return add_own(out, p16, shrink), highest, total

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

        # The first warpgroup is half a turn ahead of the second.
        def first(j, carry):
          out, highest, total = carry
          out, highest, total = others_block(out, total)
          return own_block(row, 2 * j, parity(j), out, highest, total)

        def second(j, carry):
          out, _, total = carry
          return others_block_under_own(row, 2 * j + 1, parity(j), out, total)

        carry = (out, highest, total)
        if me == 0:
          carry = own_block(row, 0, parity(0), *carry)
          carry = lax.fori_loop(1, num_blocks // 2, first, carry)
          carry = others_block(carry[0], carry[2])
        else:
          carry = lax.fori_loop(0, num_blocks // 2, second, carry)
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
      plgpu.set_max_registers(registers[1], action='decrease')
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
        for part in range(3):
          loaded = None
          if quantised:
            loaded = mosaic_fp8.load(kv_ref, indices, part=part, target=target)

          @pl.when(step >= 2)
          def _wait(part=part):
            plgpu.barrier_wait(free.at[3 * slot + part])

          where = {'slot': slot, 'barrier': 3 * slot + part}
          if loaded is None:
            mosaic_gather.gather(
              kv_ref, indices, kv_smem, landed, columns=columns[part], **where
            )
          else:
            mosaic_fp8.store(
              kv_ref, loaded, kv_smem, landed, part=part, **where
            )
        return following

      lax.fori_loop(0, last + 1, gather, load_indices(0))
      for i in range(6):
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
    plgpu.SMEM((4, HEADS), jnp.float32),
    mosaic_gather.Landed.scratch(6, target),
    plgpu.Barrier(num_arrivals=3),
    plgpu.Barrier(num_barriers=6),
    plgpu.Barrier(num_barriers=2),
    plgpu.Barrier(num_arrivals=2),
  ]
