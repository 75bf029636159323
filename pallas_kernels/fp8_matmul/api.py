"""Public signature of the float8 matrix product.

Letters: M rows, K contraction, O outputs, G groups of the contraction.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn, Float32

from pallas_kernels import dispatch
from pallas_kernels.fp8_matmul import pallas_mosaic_gpu, reference, xla
from pallas_kernels.lightning_indexer import quantization

IMPLEMENTATIONS = {
  'mosaic_gpu': pallas_mosaic_gpu.fp8_matmul,
  'xla': xla.fp8_matmul,
  'reference': reference.fp8_matmul,
}


def fp8_matmul(
  x_MK: Float[Array, 'M K'],
  w_OK: Float8e4m3fn[Array, 'O K'],
  w_scale_GO: Float32[Array, 'G O'],
  *,
  scale_format: str = 'ue8m0',
  out_dtype: Any = None,
  implementation: dispatch.Implementation = None,
) -> Float[Array, 'M O']:
  """y = x @ w.T with both sides in float8 (arXiv:2412.19437, section 3.3).

  The contraction is cut into G equal groups (of 128 in DeepSeek-V3). A row of x
  is quantised group by group, and

    y[m, o] = sum_g x_scale[m, g] w_scale[g, o] sum_{k in g} x8[m, k] w8[o, k],

  both sums in float32. Without gradients.

  Example:
    >>> x = jnp.ones((2, 256), jnp.bfloat16)
    >>> w = jnp.ones((3, 256), jnp.float8_e4m3fn)
    >>> fp8_matmul(x, w, jnp.ones((2, 3))).shape
    (2, 3)

  Args:
    x_MK: float32 or bfloat16.
    w_OK: float8_e4m3fn weights with the contraction last, as checkpoints have
      them and tensor cores read them.
    w_scale_GO: float32 multipliers of w; G divides K.
    scale_format: of x's scales: 'ue8m0' for powers of two, 'float32' for
      max|x| / 448.
    out_dtype: of y; None for x's.
    implementation: see `pallas_kernels.dispatch`.

  Raises:
    ValueError: shapes, dtypes or the scale format don't fit.
    NotImplementedError: it is differentiated.
  """
  check_arguments(x_MK, w_OK, w_scale_GO, scale_format)
  return dispatch.call(
    'fp8_matmul',
    IMPLEMENTATIONS,
    implementation,
    _without_gradient(x_MK),
    w_OK,
    w_scale_GO,
    power_of_two=scale_format == 'ue8m0',
    out_dtype=jnp.dtype(out_dtype or x_MK.dtype),
  )


@jax.custom_jvp
def _without_gradient(x_MK):
  return x_MK


@_without_gradient.defjvp
def _(primals, tangents):
  raise NotImplementedError(
    'fp8_matmul has no gradients; multiply by dequantised weights'
  )


def check_arguments(
  x_MK: Array, w_OK: Array, w_scale_GO: Array, scale_format: str
) -> None:
  """Refuses shapes and dtypes that don't fit, naming the argument."""
  quantization.check_scale_format(scale_format)
  if x_MK.ndim != 2 or x_MK.dtype not in (jnp.float32, jnp.bfloat16):
    raise ValueError(
      f'x_MK is {x_MK.dtype}{list(x_MK.shape)}; expected float32 or bfloat16 '
      '[M, K]'
    )
  depth = x_MK.shape[1]
  if (
    w_OK.ndim != 2 or w_OK.shape[1] != depth or w_OK.dtype != jnp.float8_e4m3fn
  ):
    raise ValueError(
      f'w_OK is {w_OK.dtype}{list(w_OK.shape)}; expected float8_e4m3fn '
      f'[O, {depth}] as x_MK is {list(x_MK.shape)}'
    )
  if (
    w_scale_GO.ndim != 2
    or w_scale_GO.shape[1] != len(w_OK)
    or w_scale_GO.dtype != jnp.float32
    or depth % max(len(w_scale_GO), 1)
    or not w_scale_GO.size
  ):
    raise ValueError(
      f'w_scale_GO is {w_scale_GO.dtype}{list(w_scale_GO.shape)}; expected '
      f'float32 [G, {len(w_OK)}], G a divisor of {depth}'
    )
