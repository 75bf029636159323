"""Gradient of the queries of dense attention, on Hopper.

As the forward pass: a tile is 128 queries of one head, the loop runs over
blocks of keys. Probabilities come back from the saved log-sum-exp; the dot
products of out and its cotangent (delta) stand in for the softmax's sum.
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


def query_gradient(
  q_BTHX: Float[Array, 'B T H X'],
  k_BSHX: Float[Array, 'B S H X'],
  v_BSHU: Float[Array, 'B S H U'],
  d_out_BTHU: Float[Array, 'B T H U'],
  lse_BHT: Float[Array, 'B H T'],
  delta_BHT: Float[Array, 'B H T'],
  start_BT: Int[Array, 'B T'],
  end_BT: Int[Array, 'B T'],
  *,
  scale: float,
  block: config.BackwardConfig,
  target: mosaic.Target,
) -> Float[Array, 'B T H X']:
  """d_q in q's type.

  Args:
    q_BTHX: as in `mosaic_forward.forward`.
    k_BSHX: likewise.
    v_BSHU: likewise.
    d_out_BTHU: cotangent of the output, of q's type.
    lse_BHT: float32, base 2, finite everywhere.
    delta_BHT: float32 out . d_out.
    start_BT: int32 first key of each query.
    end_BT: int32, one past its last.
    scale: factor of the scores.
    block: tile sizes.
    target: where the kernel runs.
  """
  from jax.experimental.pallas import mosaic_gpu as plgpu

  batch, num_queries, num_heads, width = q_BTHX.shape
  num_keys, value_width = k_BSHX.shape[1], v_BSHU.shape[3]
  keys, stages = block.block, block.stages
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
  shape = (ROWS, keys)

  def body(
    first_gmem,
    whole_first_gmem,
    whole_end_gmem,
    end_gmem,
    start_gmem,
    end_rows_gmem,
    lse_gmem,
    delta_gmem,
    q_gmem,
    d_out_gmem,
    k_gmem,
    v_gmem,
    d_q_gmem,
    q_smem,
    d_out_smem,
    k_smem,
    v_smem,
    lse_smem,
    delta_smem,
    start_smem,
    end_smem,
    rows_full,
    full,
    free,
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

      def one_block(here, slot):
        for gmem, smem in ((k_gmem, k_smem), (v_gmem, v_smem)):
          plgpu.copy_gmem_to_smem(
            gmem.at[b, here, head], smem.at[slot], full.at[slot]
          )

      mosaic_tiles.copy_blocks(
        first, end, (free, one_block), size=keys, stages=stages
      )

    @pl.when(warpgroup < 2)
    def multiply():
      plgpu.set_max_registers(232, action='increase')
      here = pl.ds(tile * 2 * ROWS + warpgroup * ROWS, ROWS)
      ready = rows_full.at[warpgroup]
      for source, smem in (
        (q_gmem.at[b, here, head], q_smem),
        (d_out_gmem.at[b, here, head], d_out_smem),
        (lse_gmem.at[b, head, here], lse_smem),
        (delta_gmem.at[b, head, here], delta_smem),
        (start_gmem.at[b, here], start_smem),
        (end_rows_gmem.at[b, here], end_smem),
      ):
        plgpu.copy_gmem_to_smem(source, smem.at[warpgroup], ready)
      plgpu.barrier_wait(ready)

      def rows(smem):
        x = plgpu.load(smem.at[warpgroup], layout=row_layout)
        return lax.broadcast_in_dim(x, shape, [0])

      def one_block(i, d_q, *, is_masked):
        slot = lax.rem(i - first, stages)
        plgpu.barrier_wait(full.at[slot])
        scores = products.new(
          q_smem.at[warpgroup],
          k_smem.at[slot].transpose((1, 0)),
          shape,
        )
        p = jnp.exp2(scores * (scale * LOG2_E) - rows(lse_smem))
        if is_masked:
          key = plgpu.broadcasted_iota(
            jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA
          )
          key = key + i * keys
          p = jnp.where(
            (key >= rows(start_smem)) & (key < rows(end_smem)), p, 0.0
          )
        d_p = products.new(
          d_out_smem.at[warpgroup],
          v_smem.at[slot].transpose((1, 0)),
          shape,
        )
        d_scores = p * (d_p - rows(delta_smem)) * scale
        d_q = products.add(
          d_q, d_scores.astype(dtype), k_smem.at[slot], target=target
        )
        if target.interprets:
          plgpu.commit_smem()  # Products of registers read like loads there.
        plgpu.barrier_arrive(free.at[slot])
        return d_q

      d_q: Any = plgpu.layout_cast(
        jnp.zeros((ROWS, width), jnp.float32), plgpu.Layout.WGMMA
      )
      bounds = (
        first,
        whole_first_gmem[b, tile],
        whole_end_gmem[b, tile],
        end,
      )
      d_q = mosaic_tiles.over_blocks(bounds, one_block, d_q)
      q_smem[warpgroup] = d_q.astype(dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(q_smem.at[warpgroup], d_q_gmem.at[b, here, head])
      plgpu.wait_smem_to_gmem(0)

  run = mosaic_tiles.kernel(
    body,
    tasks=batch * num_heads * tiles,
    target=target,
    out_type=jax.ShapeDtypeStruct(q_BTHX.shape, dtype),
    scratch_types=[
      plgpu.SMEM((2, ROWS, width), dtype, transforms=swizzled),
      plgpu.SMEM((2, ROWS, value_width), dtype, transforms=swizzled),
      plgpu.SMEM((stages, keys, width), dtype, transforms=swizzled),
      plgpu.SMEM((stages, keys, value_width), dtype, transforms=swizzled),
      plgpu.SMEM((2, ROWS), jnp.float32),
      plgpu.SMEM((2, ROWS), jnp.float32),
      plgpu.SMEM((2, ROWS), jnp.int32),
      plgpu.SMEM((2, ROWS), jnp.int32),
      plgpu.Barrier(num_arrivals=6, num_barriers=2),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    ],
  )
  return run(
    blocks.first,
    blocks.whole_first,
    blocks.whole_end,
    blocks.end,
    start_BT,
    end_BT,
    lse_BHT,
    delta_BHT,
    q_BTHX,
    d_out_BTHU,
    k_BSHX,
    v_BSHU,
  )
