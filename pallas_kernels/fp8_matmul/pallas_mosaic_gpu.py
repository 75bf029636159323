"""Float8 matrix product on Hopper GPUs: what the kernel takes, and padding.

Letters: M rows, K contraction, O outputs, G groups of the contraction.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import mosaic
from pallas_kernels.fp8_matmul import config, mosaic_kernel
from pallas_kernels.lightning_indexer import quantization


@functools.partial(
  jax.jit, static_argnames=('power_of_two', 'out_dtype', 'sizes', 'target')
)
def fp8_matmul(
  x_MK: Array,
  w_OK: Array,
  w_scale_GO: Array,
  *,
  power_of_two: bool,
  out_dtype: Any,
  sizes: config.MosaicConfig | None = None,
  target: mosaic.Target = mosaic.Target.DEVICE,
) -> Float[Array, 'M O']:
  """See `pallas_kernels.fp8_matmul`.

  Raises:
    NotImplementedError: not on a Hopper GPU, groups of another size than 128,
      or outputs that no tile divides.
  """
  mosaic.require(target)
  rows, depth = x_MK.shape
  groups, outputs = w_scale_GO.shape
  if depth != groups * mosaic_kernel.GROUP:
    raise NotImplementedError(
      f'{groups} groups of a contraction over {depth}: the kernel takes groups '
      f'of {mosaic_kernel.GROUP}'
    )
  if sizes is None:
    sizes = config.mosaic_config(num_rows=rows, num_outputs=outputs)
  if sizes is None or out_dtype != jnp.bfloat16 or not rows:
    raise NotImplementedError(
      f'{rows} rows of {outputs} outputs in {jnp.dtype(out_dtype).name}: the '
      'kernel gives multiples of 64 in bfloat16'
    )
  x8_MGk, x_scale_MG = quantization.quantize(
    x_MK.reshape(rows, groups, -1), power_of_two=power_of_two
  )
  missing = -rows % mosaic_kernel.tile_rows(sizes)
  y_MO = mosaic_kernel.product(
    jnp.pad(x8_MGk.reshape(rows, depth), ((0, missing), (0, 0))),
    w_OK,
    jnp.pad(x_scale_MG.T, ((0, 0), (0, missing))),
    w_scale_GO,
    sizes=sizes,
    target=target,
  )
  return y_MO[:rows]
