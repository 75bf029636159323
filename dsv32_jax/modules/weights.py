"""How a weight matrix is made and multiplied with."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from dsv32_jax.config.model import ModelConfig
from dsv32_jax.functional import fp8_matmul, quantization
from dsv32_jax.functional.fp8_matmul import MatmulWeight
from dsv32_jax.functional.quantization import QuantizedArray


def weight(
  module: nn.Module,
  cfg: ModelConfig,
  name: str,
  shape: tuple[int, ...],
  logical_axes: tuple[str, ...],
  *,
  dtype: DTypeLike | None = None,
) -> Any:
  """A normal(0, initializer_range) matrix, cast to the compute dtype.

  Where the variables hold a `QuantizedArray` of the same shape in its place (an
  import that keeps FP8), its values are multiplied by their scales here. A
  `MatmulWeight` (`inference.prepare_fp8`) is returned as it is, for `product`.

  Args:
    module: owner of the parameter.
    cfg: gives the initialiser range, the parameter and the compute dtype.
    name: the paper's name of the matrix, as `w_dq`.
    shape: its dims, in the order of the einsum that uses it.
    logical_axes: one name of `sharding.axes` a dim.
    dtype: compute in this dtype instead of `cfg.precision.compute`.

  Returns:
    The matrix in the dtype it is multiplied in.

  Raises:
    ValueError: when a quantised matrix is differentiated.
  """
  if module.has_variable('params', name):
    prepared = module.get_variable('params', name)
    if isinstance(prepared, MatmulWeight):
      return prepared
  init = nn.with_logical_partitioning(
    nn.initializers.normal(cfg.initializer_range), logical_axes
  )
  # Any: flax compares shapes leaf by leaf and lets a `QuantizedArray` pass.
  value: Any = module.param(name, init, shape, jnp.dtype(cfg.precision.param))
  if isinstance(value, QuantizedArray):
    where = '/'.join((*module.path, name))
    return _dequantized(value, dtype or cfg.precision.compute, where)
  return value.astype(dtype or cfg.precision.compute)


def product(spec: str, x: Array, w: Array | MatmulWeight) -> Array:
  """An einsum of activations and one weight, or the same product in FP8.

  Args:
    spec: the einsum; sums over the last dims of x and the first of w.
    x: activations.
    w: what `weight` gives.
  """
  if isinstance(w, MatmulWeight):
    return fp8_matmul.fp8_matmul(x, w)
  return jnp.einsum(spec, x, w)


def _dequantized(value: QuantizedArray, dtype: DTypeLike, where: str) -> Array:
  """Values * scales in `dtype`; refuses to be differentiated."""

  @jax.custom_jvp
  def multiply(values: Array, scale: Array) -> Array:
    whole = QuantizedArray(values, scale, value.block)
    return quantization.dequantize(whole).astype(dtype)

  @multiply.defjvp
  def refuse(primals: Any, tangents: Any) -> Any:
    raise ValueError(
      f'{where}: got an FP8 matrix with scales, expected an array to train; '
      "load the checkpoint with quantized='dequantize'"
    )

  return multiply(value.values, value.scale)
