"""Grouped matrix products on Hopper GPUs: forward, dx and dw.

`mosaic_rows` holds the kernel of y and dx, `mosaic_weights` that of dw.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic
from pallas_kernels.grouped_matmul import (
  config,
  mosaic_rows,
  mosaic_weights,
  row_tiles,
)

_LEAST_ROWS = 128
"""Boxes are cut from the arrays, so these must not be smaller than a box."""


def grouped_matmul(
  x_MD: Float[Array, 'M D'],
  w_EDF: Float[Array, 'E D F'],
  group_sizes_E: Int[Array, ' E'],
) -> Float[Array, 'M F']:
  """See `api.grouped_matmul`."""
  return grouped_matmul_for(mosaic.Target.DEVICE, x_MD, w_EDF, group_sizes_E)


def grouped_matmul_for(
  target: mosaic.Target,
  x_MD: Float[Array, 'M D'],
  w_EDF: Float[Array, 'E D F'],
  group_sizes_E: Int[Array, ' E'],
) -> Float[Array, 'M F']:
  """`grouped_matmul` built for a target.

  Raises:
    NotImplementedError: another type than bfloat16, a width that is no
      multiple of 128, or no Hopper GPU.
  """
  if x_MD.dtype != jnp.bfloat16:
    raise NotImplementedError(
      f'grouped_matmul on Mosaic GPU takes bfloat16, got {x_MD.dtype}'
    )
  _, dim, width = w_EDF.shape
  if dim % 128 or width % 128:
    raise NotImplementedError(
      'grouped_matmul on Mosaic GPU takes D and F that are multiples of 128, '
      f'got D={dim} and F={width}'
    )
  mosaic.require(target)
  num_rows = x_MD.shape[0]
  missing = max(_LEAST_ROWS - num_rows, -num_rows % row_tiles.ALIGNMENT)
  x_MD = jnp.pad(x_MD, ((0, missing), (0, 0)))
  return _grouped_matmul(target, x_MD, w_EDF, group_sizes_E)[:num_rows]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(
  target: mosaic.Target, x_MD: Array, w_EDF: Array, group_sizes_E: Array
) -> Array:
  return _product(target, x_MD, w_EDF, group_sizes_E, transpose_w=False)


def _forward(
  target: mosaic.Target, x_MD: Array, w_EDF: Array, group_sizes_E: Array
):
  y_MF = _grouped_matmul(target, x_MD, w_EDF, group_sizes_E)
  return y_MF, (x_MD, w_EDF, group_sizes_E)


def _backward(target: mosaic.Target, residuals, dy_MF: Array):
  x_MD, w_EDF, group_sizes_E = residuals
  dx_MD = _product(target, dy_MF, w_EDF, group_sizes_E, transpose_w=True)
  dw_EDF = mosaic_weights.weight_gradient(
    x_MD,
    dy_MF,
    group_sizes_E,
    block=config.mosaic_weights_config(
      w_EDF.shape[2], x_MD.shape[0], w_EDF.shape[0]
    ),
    target=target,
  )
  return dx_MD, dw_EDF, None


_grouped_matmul.defvjp(_forward, _backward)


def _product(
  target: mosaic.Target,
  x_MK: Array,
  w_EDF: Array,
  group_sizes_E: Array,
  *,
  transpose_w: bool,
) -> Array:
  width = w_EDF.shape[1 if transpose_w else 2]
  return mosaic_rows.product(
    x_MK,
    w_EDF,
    group_sizes_E,
    transpose_w=transpose_w,
    block=config.mosaic_rows_config(width, x_MK.shape[0], w_EDF.shape[0]),
    target=target,
  )
