"""dw[e] = sum over the rows of group e of x[m]^T dy[m]: the kernel of dw.

As in `mosaic_rows`, one warpgroup copies and two multiply; a tile is 128 by
`block_columns` of one matrix, and the loop runs over the rows of its group, 64
at a time. The first and the last slice of a group may hold rows of others: x
is set to zero there, and dy too past the last group, where it may be anything
(0 * NaN would be NaN).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic
from pallas_kernels.grouped_matmul import config, row_tiles

_HALF = 64
"""Rows of dw of a warpgroup's products."""
_STEP = 64
"""Rows of x and dy of a slice."""


def weight_gradient(
  x_MD: Float[Array, 'M D'],
  dy_MF: Float[Array, 'M F'],
  group_sizes_E: Int[Array, ' E'],
  *,
  block: config.MosaicConfig,
  target: mosaic.Target,
) -> Float[Array, 'E D F']:
  """Sum over a group of x[m]^T dy[m], in x's type; 0 for an empty group.

  Args:
    x_MD: bfloat16; M a multiple of 8, at least 64; D of 128.
    dy_MF: bfloat16; F a multiple of `block.block_columns`.
    group_sizes_E: int32, rows of each expert.
    block: how it is cut.
    target: where the kernel runs.
  """
  from jax.experimental.pallas import mosaic_gpu as plgpu

  dim, width = x_MD.shape[1], dy_MF.shape[1]
  num_experts = group_sizes_E.shape[0]
  columns, stages = block.block_columns, block.stages
  num_columns, num_heights = width // columns, dim // (2 * _HALF)
  part = min(block.store_columns, columns)
  num_blocks = mosaic.num_multiprocessors(target)
  tiles_each = num_columns * num_heights
  total = num_experts * tiles_each
  swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

  def body(
    first_gmem,
    low_gmem,
    high_gmem,
    count_gmem,
    x_gmem,
    dy_gmem,
    dw_gmem,
    x_smem,
    dy_smem,
    dw_smem,
    full,
    free,
    masked,
  ):
    warpgroup = lax.axis_index('wg')
    first_tile = lax.axis_index('sm')
    num_tiles = (total - first_tile + num_blocks - 1) // num_blocks

    def place(i):
      """Expert, first row and first column of this block's i-th tile."""
      tile = first_tile + i * num_blocks
      expert = tile // tiles_each
      inside = lax.rem(tile, tiles_each)
      return (
        expert,
        inside // num_columns * 2 * _HALF,
        lax.rem(inside, num_columns) * columns,
      )

    def steps_of(expert):
      return (high_gmem[expert] + _STEP - 1) // _STEP

    @pl.when(warpgroup == 2)
    def copy():
      plgpu.set_max_registers(block.copy_registers, action='decrease')

      def one_tile(i, done):
        expert, row, column = place(i)
        first = first_gmem[expert]

        def one_step(k, done):
          slot = lax.rem(done, stages)

          @pl.when(done >= stages)
          def _():
            plgpu.barrier_wait(free.at[slot])

          here = pl.ds(first + k * _STEP, _STEP)
          for half in range(2):
            plgpu.copy_gmem_to_smem(
              x_gmem.at[here, pl.ds(row + half * _HALF, _HALF)],
              x_smem.at[slot, half],
              full.at[slot],
            )
          plgpu.copy_gmem_to_smem(
            dy_gmem.at[here, pl.ds(column, columns)],
            dy_smem.at[slot],
            full.at[slot],
          )
          return done + 1

        return lax.fori_loop(0, steps_of(expert), one_step, done)

      done = lax.fori_loop(0, num_tiles, one_tile, jnp.int32(0))

      # No barrier is left in a phase that nobody has seen.
      def drain(i, carry):
        plgpu.barrier_wait(free.at[lax.rem(i, stages)])
        return carry

      lax.fori_loop(jnp.maximum(done - stages, 0), done, drain, ())

    def clear(ref, low, high):
      """Sets the rows outside [low, high) to zero."""
      row = plgpu.broadcasted_iota(
        jnp.int32, ref.shape, 0, layout=plgpu.Layout.WGMMA
      )
      value = plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)
      ref[...] = jnp.where(
        (row >= low) & (row < high), value, jnp.zeros_like(value)
      )

    @pl.when(warpgroup < 2)
    def multiply():
      plgpu.set_max_registers(block.multiply_registers, action='increase')

      def one_tile(i, done):
        expert, row, column = place(i)
        first = first_gmem[expert]
        low, high = low_gmem[expert], high_gmem[expert]
        steps = steps_of(expert)

        def accumulate(acc):
          def one_step(k, done):
            slot = lax.rem(done, stages)
            plgpu.barrier_wait(full.at[slot])
            low_here, high_here = low - k * _STEP, high - k * _STEP

            @pl.when((low_here > 0) | (high_here < _STEP))
            def _():
              clear(x_smem.at[slot, warpgroup], low_here, high_here)
              plgpu.commit_smem()

            # Past the last group. Each warpgroup clears half of dy.
            @pl.when(first + (k + 1) * _STEP > count_gmem[0])
            def _():
              middle = columns // 2
              for half in range(2):

                @pl.when(warpgroup == half)
                def _(half=half):
                  at = pl.ds(half * middle, middle)
                  clear(dy_smem.at[slot, :, at], low_here, high_here)

              plgpu.commit_smem()
              plgpu.barrier_arrive(masked)
              plgpu.barrier_wait(masked)

            plgpu.wgmma(
              acc,
              x_smem.at[slot, warpgroup].transpose((1, 0)),
              dy_smem.at[slot],
            )
            plgpu.wgmma_wait(1)

            @pl.when(k > 0)
            def _():
              plgpu.barrier_arrive(free.at[lax.rem(done - 1, stages)])

            return done + 1

          after = lax.fori_loop(0, steps, one_step, done)
          plgpu.wgmma_wait(0)

          @pl.when(steps > 0)
          def _():
            plgpu.barrier_arrive(free.at[lax.rem(after - 1, stages)])

          return acc[...].astype(x_MD.dtype), after

        dw, after = pl.run_scoped(
          accumulate, plgpu.ACC((_HALF, columns), jnp.float32)
        )
        for j in range(columns // part):
          plgpu.wait_smem_to_gmem(1, wait_read_only=True)
          dw_part = dw_smem.at[warpgroup, j % 2]
          dw_part[...] = dw[:, j * part : (j + 1) * part]
          plgpu.commit_smem()
          plgpu.copy_smem_to_gmem(
            dw_part,
            dw_gmem.at[
              expert,
              pl.ds(row + warpgroup * _HALF, _HALF),
              pl.ds(column + j * part, part),
            ],
          )
        return after

      lax.fori_loop(0, num_tiles, one_tile, jnp.int32(0))
      plgpu.wait_smem_to_gmem(0)

  run = mosaic.kernel(
    body,
    target=target,
    out_type=jax.ShapeDtypeStruct((num_experts, dim, width), x_MD.dtype),
    grid=(num_blocks,),
    grid_names=('sm',),
    num_threads=3,
    thread_name='wg',
    scratch_types=[
      plgpu.SMEM((stages, 2, _STEP, _HALF), x_MD.dtype, transforms=swizzled),
      plgpu.SMEM((stages, _STEP, columns), x_MD.dtype, transforms=swizzled),
      plgpu.SMEM((2, 2, _HALF, part), x_MD.dtype, transforms=swizzled),
      plgpu.Barrier(num_arrivals=3, num_barriers=stages),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      plgpu.Barrier(num_arrivals=2),
    ],
  )
  sizes_E = group_sizes_E.astype(jnp.int32)
  end_E = jnp.cumsum(sizes_E)
  start_E = end_E - sizes_E
  first_E = start_E // row_tiles.ALIGNMENT * row_tiles.ALIGNMENT
  return run(
    first_E,
    start_E - first_E,
    jnp.where(sizes_E > 0, end_E - first_E, 0),
    end_E[-1:],
    x_MD,
    dy_MF,
  )
