"""The kernel of the float8 matrix product.

A tile is 64 rows a multiplying warpgroup by `columns` outputs. One warpgroup
copies (TMA) a ring of slices of 128 along the contraction, with their scales.
Hopper's float8 accumulator keeps few bits, so a product covers one slice only;
the multiplying warpgroups scale it and add it up in registers (as DeepSeek-V3
does, arXiv:2412.19437, section 3.3.2), one while the other's products run.

Letters: M rows, K contraction, O outputs, G groups of the contraction.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels import mosaic
from pallas_kernels.fp8_matmul import config

GROUP = 128
"""Length of the contraction that shares scales; one slice."""

_ROWS = 64
# Of a thread that multiplies, and of one that copies.
_REGISTERS = (232, 40)


def tile_rows(sizes: config.MosaicConfig) -> int:
  """Rows of a tile."""
  return _ROWS if sizes.splits_columns else 2 * _ROWS


def product(
  x_MK: Float[Array, 'M K'],
  w_OK: Float[Array, 'O K'],
  x_scale_GM: Float[Array, 'G M'],
  w_scale_GO: Float[Array, 'G O'],
  *,
  sizes: config.MosaicConfig,
  target: mosaic.Target,
) -> Float[Array, 'M O']:
  """The product in bfloat16.

  Args:
    x_MK: float8_e4m3fn, M a multiple of `tile_rows`.
    w_OK: float8_e4m3fn, O a multiple of the tile's outputs.
    x_scale_GM: float32.
    w_scale_GO: float32.
    sizes: how it is cut.
    target: where the kernel runs.
  """
  from jax.experimental.pallas import mosaic_gpu as plgpu

  rows, depth = x_MK.shape
  outputs = len(w_OK)
  columns, stages = sizes.columns, sizes.stages
  row_parts, column_parts = (1, 2) if sizes.splits_columns else (2, 1)
  tile = row_parts * _ROWS, column_parts * columns
  steps = depth // GROUP
  num_tiles = rows // tile[0], outputs // tile[1]
  swizzled = (plgpu.TilingTransform((8, GROUP)), plgpu.SwizzleTransform(GROUP))
  out_swizzle = min(128, 2 * columns)
  out_transforms = (
    plgpu.TilingTransform((8, out_swizzle // 2)),
    plgpu.SwizzleTransform(out_swizzle),
  )
  row_layout = plgpu.Layout.WGMMA.reduce(1)
  column_layout = plgpu.Layout.WGMMA.reduce(0)

  def body(
    x_gmem,
    w_gmem,
    x_scale_gmem,
    w_scale_gmem,
    y_gmem,
    x_smem,
    w_smem,
    x_scale_smem,
    w_scale_smem,
    y_smem,
    full,
    free,
  ):
    warpgroup = lax.axis_index('wg')
    # Tiles that run at a time share their rows: the weights stream past.
    first_row = lax.axis_index('row') * tile[0]
    first_column = lax.axis_index('column') * tile[1]

    @pl.when(warpgroup == 2)
    def copy():
      plgpu.set_max_registers(_REGISTERS[1], action='decrease')

      def one_step(k, carry):
        slot = lax.rem(k, stages)

        @pl.when(k >= stages)
        def _():
          plgpu.barrier_wait(free.at[slot])

        at = pl.ds(k * GROUP, GROUP)
        for i in range(row_parts):
          here = pl.ds(first_row + i * _ROWS, _ROWS)
          plgpu.copy_gmem_to_smem(
            x_gmem.at[here, at], x_smem.at[slot, i], full.at[slot]
          )
          plgpu.copy_gmem_to_smem(
            x_scale_gmem.at[k, here], x_scale_smem.at[slot, i], full.at[slot]
          )
        for i in range(column_parts):
          here = pl.ds(first_column + i * columns, columns)
          plgpu.copy_gmem_to_smem(
            w_gmem.at[here, at], w_smem.at[slot, i], full.at[slot]
          )
          plgpu.copy_gmem_to_smem(
            w_scale_gmem.at[k, here], w_scale_smem.at[slot, i], full.at[slot]
          )
        return carry

      lax.fori_loop(0, steps, one_step, ())

      # No barrier is left in a phase that nobody has seen.
      def drain(k, carry):
        plgpu.barrier_wait(free.at[lax.rem(k, stages)])
        return carry

      lax.fori_loop(max(steps - stages, 0), steps, drain, ())

    @pl.when(warpgroup < 2)
    def multiply():
      plgpu.set_max_registers(_REGISTERS[0], action='increase')
      row_part = warpgroup if row_parts == 2 else 0
      column_part = warpgroup if column_parts == 2 else 0

      def start(k, part_ref):
        """Starts the product of slice k; its scales."""
        slot = lax.rem(k, stages)
        plgpu.barrier_wait(full.at[slot])
        scales = (
          plgpu.load(x_scale_smem.at[slot, row_part], layout=row_layout),
          plgpu.load(w_scale_smem.at[slot, column_part], layout=column_layout),
        )
        plgpu.wgmma(
          part_ref,
          x_smem.at[slot, row_part],
          w_smem.at[slot, column_part].transpose((1, 0)),
        )
        return scales

      def add(k, total, part, scales):
        plgpu.barrier_arrive(free.at[lax.rem(k, stages)])
        x_scale, w_scale = scales
        part *= lax.broadcast_in_dim(w_scale, part.shape, [1])
        return total + part * lax.broadcast_in_dim(x_scale, part.shape, [0])

      accumulator = plgpu.ACC((_ROWS, columns), jnp.float32)

      def one(k, total):
        def scoped(part_ref):
          scales = start(k, part_ref)
          return add(k, total, part_ref[...], scales)

        return pl.run_scoped(scoped, accumulator)

      def two(pair, total):
        # The second product runs while the first is added up.
        def scoped(first_ref, second_ref):
          k = 2 * pair
          first_scales = start(k, first_ref)
          second_scales = start(k + 1, second_ref)
          part = plgpu.wgmma_accumulator_load(first_ref, wait_n=1)
          after = add(k, total, part, first_scales)
          return add(k + 1, after, second_ref[...], second_scales)

        return pl.run_scoped(scoped, accumulator, accumulator)

      zeros = plgpu.layout_cast(
        jnp.zeros((_ROWS, columns), jnp.float32), plgpu.Layout.WGMMA
      )
      done, total = 0, zeros
      if sizes.pairs:
        done = steps // 2 * 2
        total = lax.fori_loop(0, steps // 2, two, total)
      if done < steps:
        total = lax.fori_loop(done, steps, one, total)
      mine = y_smem.at[warpgroup]
      mine[...] = total.astype(jnp.bfloat16)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(
        mine,
        y_gmem.at[
          pl.ds(first_row + row_part * _ROWS, _ROWS),
          pl.ds(first_column + column_part * columns, columns),
        ],
      )
      plgpu.wait_smem_to_gmem(0)

  e4m3 = jnp.float8_e4m3fn
  copies = 2 * (row_parts + column_parts)
  return mosaic.kernel(
    body,
    target=target,
    kernel_name='fp8_matmul',
    out_type=jax.ShapeDtypeStruct((rows, outputs), jnp.bfloat16),
    grid=(num_tiles[1], num_tiles[0]),
    grid_names=('column', 'row'),
    num_threads=3,
    thread_name='wg',
    scratch_types=[
      plgpu.SMEM((stages, row_parts, _ROWS, GROUP), e4m3, transforms=swizzled),
      plgpu.SMEM(
        (stages, column_parts, columns, GROUP), e4m3, transforms=swizzled
      ),
      plgpu.SMEM((stages, row_parts, _ROWS), jnp.float32),
      plgpu.SMEM((stages, column_parts, columns), jnp.float32),
      plgpu.SMEM((2, _ROWS, columns), jnp.bfloat16, transforms=out_transforms),
      plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
      plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    ],
  )(x_MK, w_OK, x_scale_GM, w_scale_GO)
