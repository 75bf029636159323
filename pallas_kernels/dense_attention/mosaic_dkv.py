"""Gradients of the keys and values of dense attention, on Hopper.

A tile is 128 keys of one head, 64 for each of two warpgroups, and the loop
runs over blocks of queries: everything is transposed, so that both sums stay
in registers, and nothing is added up in an order that changes between runs.
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


def key_gradients(
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
) -> tuple[Float[Array, 'B S H X'], Float[Array, 'B S H U']]:
  """(d_k, d_v) in q's type; arguments as `mosaic_dq.query_gradient`."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  batch, num_queries, num_heads, width = q_BTHX.shape
  num_keys, value_width = k_BSHX.shape[1], v_BSHU.shape[3]
  queries, stages = block.block, block.stages
  dtype = q_BTHX.dtype
  tiles = num_keys // (2 * ROWS)
  blocks = key_blocks.query_blocks(
    start_BT, end_BT, num_keys=num_keys, rows=2 * ROWS, columns=queries
  )
  together = mosaic_tiles.heads_at_a_time(
    num_heads, num_queries * (width + value_width) * 2, block.l2_bytes
  )
  swizzled = mosaic_tiles.swizzled()
  column_layout = plgpu.Layout.WGMMA.reduce(0)
  shape = (ROWS, queries)

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
    d_k_gmem,
    d_v_gmem,
    k_smem,
    v_smem,
    q_smem,
    d_out_smem,
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
      last_first=False,
    )
    first, end = first_gmem[b, tile], end_gmem[b, tile]

    @pl.when(warpgroup == 2)
    def copy():
      plgpu.set_max_registers(24, action='decrease')

      def one_block(here, slot):
        for source, smem in (
          (q_gmem.at[b, here, head], q_smem),
          (d_out_gmem.at[b, here, head], d_out_smem),
          (lse_gmem.at[b, head, here], lse_smem),
          (delta_gmem.at[b, head, here], delta_smem),
          (start_gmem.at[b, here], start_smem),
          (end_rows_gmem.at[b, here], end_smem),
        ):
          plgpu.copy_gmem_to_smem(source, smem.at[slot], full.at[slot])

      mosaic_tiles.copy_blocks(
        first, end, (free, one_block), size=queries, stages=stages
      )

    @pl.when(warpgroup < 2)
    def multiply():
      plgpu.set_max_registers(240, action='increase')
      row = tile * 2 * ROWS + warpgroup * ROWS
      here = pl.ds(row, ROWS)
      ready = rows_full.at[warpgroup]
      for gmem, smem in ((k_gmem, k_smem), (v_gmem, v_smem)):
        plgpu.copy_gmem_to_smem(
          gmem.at[b, here, head], smem.at[warpgroup], ready
        )
      plgpu.barrier_wait(ready)

      def columns(smem, slot):
        x = plgpu.load(smem.at[slot], layout=column_layout)
        return lax.broadcast_in_dim(x, shape, [1])

      def one_block(i, carry, *, is_masked):
        d_k, d_v = carry
        slot = lax.rem(i - first, stages)
        plgpu.barrier_wait(full.at[slot])
        scores = products.new(
          k_smem.at[warpgroup],
          q_smem.at[slot].transpose((1, 0)),
          shape,
        )
        p = jnp.exp2(scores * (scale * LOG2_E) - columns(lse_smem, slot))
        if is_masked:
          key = plgpu.broadcasted_iota(
            jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA
          )
          key = key + row
          p = jnp.where(
            (key >= columns(start_smem, slot))
            & (key < columns(end_smem, slot)),
            p,
            0.0,
          )
        d_v = products.add(
          d_v, p.astype(dtype), d_out_smem.at[slot], target=target
        )
        d_p = products.new(
          v_smem.at[warpgroup],
          d_out_smem.at[slot].transpose((1, 0)),
          shape,
        )
        d_scores = p * (d_p - columns(delta_smem, slot)) * scale
        d_k = products.add(
          d_k, d_scores.astype(dtype), q_smem.at[slot], target=target
        )
        if target.interprets:
          plgpu.commit_smem()  # Products of registers read like loads there.
        plgpu.barrier_arrive(free.at[slot])
        return d_k, d_v

      carry: Any = tuple(
        plgpu.layout_cast(
          jnp.zeros((ROWS, columns), jnp.float32), plgpu.Layout.WGMMA
        )
        for columns in (width, value_width)
      )
      bounds = (
        first,
        whole_first_gmem[b, tile],
        whole_end_gmem[b, tile],
        end,
      )
      carry = mosaic_tiles.over_blocks(bounds, one_block, carry)
      # The memory of keys and values is free now.
      for x, smem, gmem in zip(
        carry, (k_smem, v_smem), (d_k_gmem, d_v_gmem), strict=True
      ):
        smem[warpgroup] = x.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem.at[warpgroup], gmem.at[b, here, head])
      plgpu.wait_smem_to_gmem(0)

  run = mosaic_tiles.kernel(
    body,
    tasks=batch * num_heads * tiles,
    target=target,
    out_type=(
      jax.ShapeDtypeStruct(k_BSHX.shape, dtype),
      jax.ShapeDtypeStruct(v_BSHU.shape, dtype),
    ),
    scratch_types=[
      plgpu.SMEM((2, ROWS, width), dtype, transforms=swizzled),
      plgpu.SMEM((2, ROWS, value_width), dtype, transforms=swizzled),
      plgpu.SMEM((stages, queries, width), dtype, transforms=swizzled),
      plgpu.SMEM((stages, queries, value_width), dtype, transforms=swizzled),
      plgpu.SMEM((stages, queries), jnp.float32),
      plgpu.SMEM((stages, queries), jnp.float32),
      plgpu.SMEM((stages, queries), jnp.int32),
      plgpu.SMEM((stages, queries), jnp.int32),
      plgpu.Barrier(num_arrivals=2, num_barriers=2),
      plgpu.Barrier(num_arrivals=6, num_barriers=stages),
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
