"""y[m] = x[m] @ w[e(m)], or with w transposed: the kernel of forward and dx.

A tile is 128 rows by `block_columns` columns. One warpgroup copies (TMA) a
ring of `stages` slices of x and w, two multiply (wgmma), 64 rows each; a
warpgroup without rows of its own skips the products, so that a group is
rounded up to 64 rows, not 128.

Either a block of threads stays on its multiprocessor and takes every 132nd
tile, and its copies run ahead into the next tile while the last one is stored;
or every tile is a block, which the hardware begins in order as soon as there
is room, so that tiles which share a matrix stay together in time.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic
from pallas_kernels.grouped_matmul import config, mosaic_store, row_tiles

_HALF = 64
"""Rows of a warpgroup's products."""


def product(
  x_MK: Float[Array, 'M K'],
  w_EDF: Float[Array, 'E D F'],
  group_sizes_E: Int[Array, ' E'],
  *,
  transpose_w: bool,
  block: config.MosaicConfig,
  target: mosaic.Target,
) -> Float[Array, 'M O']:
  """The product of every row with the matrix of its group, 0 past the last.

  Args:
    x_MK: bfloat16; M a multiple of 8, at least 128; K one of
      `block.block_depth`.
    w_EDF: bfloat16 matrices; K is F if `transpose_w`, else D.
    group_sizes_E: int32, rows of each expert.
    transpose_w: multiply by w[e].T.
    block: how it is cut; `block_columns` divides O.
    target: where the kernel runs.
  """
  from jax.experimental.pallas import mosaic_gpu as plgpu

  num_rows, depth = x_MK.shape
  num_experts = w_EDF.shape[0]
  width = w_EDF.shape[1 if transpose_w else 2]
  columns, step, stages = block.block_columns, block.block_depth, block.stages
  num_columns = width // columns
  part = min(block.store_columns, columns)
  tiles = row_tiles.row_tiles(
    group_sizes_E,
    num_rows,
    height=2 * _HALF,
    num_columns=num_columns,
    band=block.band,
  )
  if block.is_persistent:
    num_blocks = mosaic.num_multiprocessors(target)
  else:
    num_blocks = tiles.expert_N.shape[0]
  swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
  w_shape = (columns, step) if transpose_w else (step, columns)

  def body(
    expert_gmem,
    column_gmem,
    first_gmem,
    low_gmem,
    high_gmem,
    count_gmem,
    x_gmem,
    w_gmem,
    y_gmem,
    x_smem,
    w_smem,
    y_smem,
    full,
    free,
    plain_smem: Any = None,
  ):
    warpgroup = lax.axis_index('wg')
    first_tile = lax.axis_index('sm')
    total = count_gmem[0]
    num_tiles = (total - first_tile + num_blocks - 1) // num_blocks

    def steps_of(tile):
      return jnp.where(expert_gmem[tile] < num_experts, depth // step, 0)

    @pl.when(warpgroup == 2)
    def copy():
      plgpu.set_max_registers(block.copy_registers, action='decrease')

      def one_tile(i, done):
        tile = first_tile + i * num_blocks
        column = column_gmem[tile] * columns
        expert, first = expert_gmem[tile], first_gmem[tile]

        def one_step(k, done):
          slot = lax.rem(done, stages)

          @pl.when(done >= stages)
          def _():
            plgpu.barrier_wait(free.at[slot])

          at = pl.ds(k * step, step)
          for half in range(2):
            plgpu.copy_gmem_to_smem(
              x_gmem.at[pl.ds(first + half * _HALF, _HALF), at],
              x_smem.at[slot, half],
              full.at[slot],
            )
          here = pl.ds(column, columns)
          plgpu.copy_gmem_to_smem(
            w_gmem.at[expert, here, at]
            if transpose_w
            else w_gmem.at[expert, at, here],
            w_smem.at[slot],
            full.at[slot],
          )
          return done + 1

        return lax.fori_loop(0, steps_of(tile), one_step, done)

      done = lax.fori_loop(0, num_tiles, one_tile, jnp.int32(0))

      # No barrier is left in a phase that nobody has seen.
      def drain(i, carry):
        plgpu.barrier_wait(free.at[lax.rem(i, stages)])
        return carry

      lax.fori_loop(jnp.maximum(done - stages, 0), done, drain, ())

    @pl.when(warpgroup < 2)
    def multiply():
      plgpu.set_max_registers(block.multiply_registers, action='increase')

      def one_tile(i, done):
        tile = first_tile + i * num_blocks
        column = column_gmem[tile] * columns
        first = first_gmem[tile] + warpgroup * _HALF
        low, high = (
          jnp.clip(bound[tile] - warpgroup * _HALF, 0, _HALF)
          for bound in (low_gmem, high_gmem)
        )
        size = high - low
        steps = steps_of(tile)

        def accumulate(acc):
          def one_step(k, done):
            slot = lax.rem(done, stages)
            plgpu.barrier_wait(full.at[slot])
            w_slice = w_smem.at[slot]
            plgpu.wgmma(
              acc,
              x_smem.at[slot, warpgroup],
              w_slice.transpose((1, 0)) if transpose_w else w_slice,
            )
            # The products before these are done: their slot is free.
            plgpu.wgmma_wait(1)

            @pl.when(k > 0)
            def _():
              plgpu.barrier_arrive(free.at[lax.rem(done - 1, stages)])

            return done + 1

          busy = jnp.where(size > 0, steps, 0)
          after = lax.fori_loop(0, busy, one_step, done)
          plgpu.wgmma_wait(0)

          @pl.when(busy > 0)
          def _():
            plgpu.barrier_arrive(free.at[lax.rem(after - 1, stages)])

          return acc[...].astype(x_MK.dtype)

        y = pl.run_scoped(accumulate, plgpu.ACC((_HALF, columns), jnp.float32))

        def skip(k, carry):
          slot = lax.rem(done + k, stages)
          plgpu.barrier_wait(full.at[slot])
          plgpu.barrier_arrive(free.at[slot])
          return carry

        lax.fori_loop(0, jnp.where(size > 0, 0, steps), skip, ())

        @pl.when(size == _HALF)
        def _():
          for j in range(columns // part):
            # At most one copy still reads: the other buffer's.
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            y_part = y_smem.at[warpgroup, j % 2]
            y_part[...] = y[:, j * part : (j + 1) * part]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
              y_part,
              y_gmem.at[pl.ds(first, _HALF), pl.ds(column + j * part, part)],
            )

        @pl.when((size > 0) & (size < _HALF))
        def _():
          mosaic_store.store_rows(
            y_gmem,
            y,
            plain_smem.at[warpgroup] if target.interprets else None,
            first=first,
            low=low,
            high=high,
            column=column,
            target=target,
          )

        return done + steps

      lax.fori_loop(0, num_tiles, one_tile, jnp.int32(0))
      plgpu.wait_smem_to_gmem(0)

  scratch: list[Any] = [
    plgpu.SMEM((stages, 2, _HALF, step), x_MK.dtype, transforms=swizzled),
    plgpu.SMEM((stages, *w_shape), x_MK.dtype, transforms=swizzled),
    plgpu.SMEM((2, 2, _HALF, part), x_MK.dtype, transforms=swizzled),
    plgpu.Barrier(num_arrivals=3, num_barriers=stages),
    plgpu.Barrier(num_arrivals=2, num_barriers=stages),
  ]
  if target.interprets:
    scratch.append(plgpu.SMEM((2, _HALF, columns), x_MK.dtype))
  run = mosaic.kernel(
    body,
    target=target,
    out_type=jax.ShapeDtypeStruct((num_rows, width), x_MK.dtype),
    grid=(num_blocks,),
    grid_names=('sm',),
    num_threads=3,
    thread_name='wg',
    scratch_types=scratch,
  )
  return run(
    tiles.expert_N,
    tiles.column_N,
    tiles.first_N,
    tiles.low_N,
    tiles.high_N,
    tiles.count_1,
    x_MK,
    w_EDF,
  )
