"""Flash attention forward with ranges of keys, on Hopper.

A tile is 128 queries of one head, 64 for each of two warpgroups; a third
copies blocks of keys and values (TMA). Online softmax in base 2; while one
warpgroup computes its softmax the other has the tensor cores (an mbarrier
makes them take turns). Blocks inside the range of every query are not masked.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic
from pallas_kernels.dense_attention import (
  config,
  key_blocks,
  mosaic_tiles,
  products,
)
from pallas_kernels.dense_attention.mosaic_tiles import LOG2_E, ROWS


def forward(
  q_BTHX: Float[Array, 'B T H X'],
  k_BSHX: Float[Array, 'B S H X'],
  v_BSHU: Float[Array, 'B S H U'],
  start_BT: Int[Array, 'B T'],
  end_BT: Int[Array, 'B T'],
  *,
  scale: float,
  block: config.ForwardConfig,
  target: mosaic.Target,
) -> tuple[Float[Array, 'B T H U'], Float[Array, 'B H T']]:
  """Output and natural log-sum-exp, 0 and -inf in a row without keys.

  Args:
    q_BTHX: bfloat16; T a multiple of 128, X of 64.
    k_BSHX: S a multiple of `block.block_keys`.
    v_BSHU: U a multiple of 64, at most X.
    start_BT: int32 first key of each query.
    end_BT: int32, one past its last.
    scale: factor of the scores.
    block: tile sizes.
    target: where the kernel runs.
  """
  from jax.experimental.pallas import mosaic_gpu as plgpu

  batch, num_queries, num_heads, width = q_BTHX.shape
  num_keys, value_width = k_BSHX.shape[1], v_BSHU.shape[3]
  keys, stages = block.block_keys, block.stages
  parts = products.chunks(width)
  dtype = q_BTHX.dtype
  tiles = num_queries // (2 * ROWS)
  blocks = key_blocks.key_blocks(
    start_BT, end_BT, num_keys=num_keys, rows=2 * ROWS, columns=keys
  )
  together = mosaic_tiles.heads_at_a_time(
    num_heads, num_keys * (width + value_width) * 2, block.l2_bytes
  )
  swizzled = mosaic_tiles.swizzled()
  row_layout = plgpu.Layout.WGMMA.reduce(1)
  factor = scale * LOG2_E

  def body(
    first_gmem,
    whole_first_gmem,
    whole_end_gmem,
    end_gmem,
    start_rows_gmem,
    end_rows_gmem,
    q_gmem,
    k_gmem,
    v_gmem,
    out_gmem,
    lse_gmem,
    q_smem,
    k_smem,
    v_smem,
    lse_smem,
    start_smem,
    end_smem,
    q_full,
    k_full,
    v_full,
    k_free,
    v_free,
    turn,
  ):
    warpgroup = lax.axis_index('wg')
    b, head, tile = mosaic_tiles.place(
      lax.axis_index('task'),
      num_heads=num_heads,
      together=together,
      tiles=tiles,
      last_first=True,
    )
    first, end = first_gmem[b, tile], end_gmem[b, tile]

    @pl.when(warpgroup == 2)
    def copy():
      plgpu.set_max_registers(40, action='decrease')

      def keys_of(here, slot):
        products.copy_chunks(
          lambda at: k_gmem.at[b, here, head, at],
          k_smem.at[slot],
          k_full.at[slot],
        )

      def values_of(here, slot):
        plgpu.copy_gmem_to_smem(
          v_gmem.at[b, here, head], v_smem.at[slot], v_full.at[slot]
        )

      mosaic_tiles.copy_blocks(
        first,
        end,
        (k_free, keys_of),
        (v_free, values_of),
        size=keys,
        stages=stages,
      )

    @pl.when(warpgroup < 2)
    def attend():
      plgpu.set_max_registers(232, action='increase')
      row = tile * 2 * ROWS + warpgroup * ROWS
      here = pl.ds(row, ROWS)
      ready = q_full.at[warpgroup]
      products.copy_chunks(
        lambda at: q_gmem.at[b, here, head, at], q_smem.at[warpgroup], ready
      )
      plgpu.copy_gmem_to_smem(
        start_rows_gmem.at[b, here], start_smem.at[warpgroup], ready
      )
      plgpu.copy_gmem_to_smem(
        end_rows_gmem.at[b, here], end_smem.at[warpgroup], ready
      )
      plgpu.barrier_wait(ready)

      def take_turns():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

      def column(value):
        return plgpu.layout_cast(
          jnp.full((ROWS,), value, jnp.float32), row_layout
        )

      def spread(x, shape):
        return lax.broadcast_in_dim(x, shape, [0])

      def masked(scores, i):
        key = plgpu.broadcasted_iota(
          jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA
        )
        key = key + i * keys
        low = plgpu.load(start_smem.at[warpgroup], layout=row_layout)
        high = plgpu.load(end_smem.at[warpgroup], layout=row_layout)
        is_seen = (key >= spread(low, scores.shape)) & (
          key < spread(high, scores.shape)
        )
        return jnp.where(is_seen, scores, -jnp.inf)

      def softmax(scores, i, carry, *, is_masked):
        """Probabilities of block i, and the carry scaled for them."""
        out, highest, total = carry
        if is_masked:
          scores = masked(scores, i)
        new = jnp.maximum(highest, jnp.max(scores, axis=1) * factor)
        # exp2(-inf - -inf) would be NaN: a row that has seen no key yet.
        level = jnp.where(new == -jnp.inf, 0.0, new) if is_masked else new
        shrink = jnp.exp2(highest - level)
        p = jnp.exp2(scores * factor - spread(level, scores.shape))
        total = total * shrink + jnp.sum(p, axis=1)
        out = out * spread(shrink, out.shape)
        return p.astype(dtype), (out, new, total)

      def one_block(i, carry, *, is_masked):
        slot = lax.rem(i - first, stages)
        plgpu.barrier_wait(k_full.at[slot])

        def product(acc):
          products.multiply_transposed(
            acc, q_smem.at[warpgroup], k_smem.at[slot]
          )
          take_turns()
          return acc[...]

        scores = pl.run_scoped(product, plgpu.ACC((ROWS, keys), jnp.float32))
        plgpu.barrier_arrive(k_free.at[slot])
        p, carry = softmax(scores, i, carry, is_masked=is_masked)
        out, highest, total = carry
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(v_full.at[slot])
        plgpu.barrier_wait(turn)
        out = products.add(out, p, v_smem.at[slot], target=target)
        if target.interprets:
          plgpu.commit_smem()  # Products of registers read like loads there.
        plgpu.barrier_arrive(v_free.at[slot])
        return out, highest, total

      carry: Any = (
        plgpu.layout_cast(
          jnp.zeros((ROWS, value_width), jnp.float32), plgpu.Layout.WGMMA
        ),
        column(-jnp.inf),
        column(0.0),
      )
      bounds = (
        first,
        whole_first_gmem[b, tile],
        whole_end_gmem[b, tile],
        end,
      )
      # One warpgroup begins half a turn later.
      pl.when(warpgroup == 1)(take_turns)
      carry = mosaic_tiles.over_blocks(bounds, one_block, carry)
      pl.when(warpgroup == 0)(take_turns)
      out, highest, total = carry
      some = total > 0.0
      total = jnp.where(some, total, 1.0)
      out = (out / spread(total, out.shape)).astype(dtype)
      # The queries' memory is free: the products with them are done.
      for chunk in range(products.chunks(value_width)):
        q_smem[warpgroup, chunk] = out[:, chunk * 64 : (chunk + 1) * 64]
      lse = (highest + jnp.log2(total)) * (1 / LOG2_E)
      lse_smem[warpgroup] = jnp.where(some, lse, -jnp.inf)
      plgpu.commit_smem()
      for chunk in range(products.chunks(value_width)):
        plgpu.copy_smem_to_gmem(
          q_smem.at[warpgroup, chunk],
          out_gmem.at[b, here, head, pl.ds(chunk * 64, 64)],
        )
      plgpu.copy_smem_to_gmem(
        lse_smem.at[warpgroup], lse_gmem.at[b, head, here]
      )
      plgpu.wait_smem_to_gmem(0)

  run = mosaic_tiles.kernel(
    body,
    tasks=batch * num_heads * tiles,
    target=target,
    out_type=(
      jax.ShapeDtypeStruct((batch, num_queries, num_heads, value_width), dtype),
      jax.ShapeDtypeStruct((batch, num_heads, num_queries), jnp.float32),
    ),
    scratch_types=[
      plgpu.SMEM((2, parts, ROWS, 64), dtype, transforms=swizzled),
      plgpu.SMEM((stages, parts, keys, 64), dtype, transforms=swizzled),
      plgpu.SMEM((stages, keys, value_width), dtype, transforms=swizzled),
      plgpu.SMEM((2, ROWS), jnp.float32),
      plgpu.SMEM((2, ROWS), jnp.int32),
      plgpu.SMEM((2, ROWS), jnp.int32),
      plgpu.Barrier(num_arrivals=parts + 2, num_barriers=2),
      plgpu.Barrier(num_arrivals=parts, num_barriers=stages),
      plgpu.Barrier(num_barriers=stages),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      plgpu.Barrier(num_arrivals=2),
    ],
  )
  return run(
    blocks.first,
    blocks.whole_first,
    blocks.whole_end,
    blocks.end,
    start_BT,
    end_BT,
    q_BTHX,
    k_BSHX,
    v_BSHU,
  )
