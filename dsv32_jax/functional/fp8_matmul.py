"""Matrix products with weights that stay in FP8.

Activations are quantised on the way, 1 x 128; products of FP8 values are summed
in float32 within a block of the contraction and scaled outside (spec section
3.6; arXiv:2412.19437, section 3.3). On a Hopper GPU a kernel does it on the FP8
tensor cores; elsewhere the same numbers are computed in a type that holds FP8
values exactly.

Letters: M rows, K contraction (filled up to whole groups), O outputs, G groups
of the contraction.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv32_jax.functional.quantization import QuantizedArray
from pallas_kernels.fp8_matmul import fp8_matmul as kernel

_GROUP = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MatmulWeight:
  """A quantised weight as products read it: the contraction last.

  Attributes:
    values_OK: float8_e4m3fn; 0 where a group is filled up.
    scale_GO: float32 multipliers.
    contracted: dimensions that are summed over, as the weight has them.
    outputs: the others.
    run: entries of the contraction, from the last on, that groups divide
      without a gap but at the end of each such stretch.
  """

  # Any, as jax rebuilds pytrees with shapes, specs or stacked arrays inside.
  values_OK: Any
  scale_GO: Any
  contracted: tuple[int, ...] = dataclasses.field(metadata={'static': True})
  outputs: tuple[int, ...] = dataclasses.field(metadata={'static': True})
  run: int = dataclasses.field(metadata={'static': True})


def prepare(weight: QuantizedArray, *, contract_dims: int = 1) -> MatmulWeight:
  """Turns a weight once, when it is loaded, into what products read.

  Args:
    weight: [*contracted, *outputs]; blocks of any sizes.
    contract_dims: how many of its first dimensions are summed over.

  Raises:
    ValueError: there aren't so many dimensions, or none is left.
  """
  shape = weight.values.shape
  if not 0 < contract_dims < len(shape):
    raise ValueError(
      f'contract_dims={contract_dims} of a weight of shape {shape}: must be '
      'from 1 up to one less than its dimensions'
    )
  block = (1,) * (len(shape) - len(weight.block)) + tuple(weight.block)
  contracted, outputs = shape[:contract_dims], shape[contract_dims:]
  # The last contracted dimension that is cut into blocks; those after it lie in
  # one block each, and make its entries longer.
  cut = contract_dims - 1
  while cut > 0 and block[cut] >= shape[cut]:
    cut -= 1
  inner = math.prod(contracted[cut + 1 :])
  size = min(block[cut], shape[cut]) * inner
  run = shape[cut] * inner
  missing = -run % size

  scale = weight.scale
  for axis in (*range(cut), *range(contract_dims, len(shape))):
    if block[axis] > 1:
      scale = jnp.repeat(scale, block[axis], axis=axis)
      scale = jax.lax.slice_in_dim(scale, 0, shape[axis], axis=axis)
  scale_GO = scale.reshape(-1, math.prod(outputs))
  group = _group(size)
  scale_GO = jnp.repeat(scale_GO, size // group, axis=0)

  values = weight.values.reshape(-1, run, math.prod(outputs))
  values = jnp.pad(values, ((0, 0), (0, missing), (0, 0)))
  values_OK = values.reshape(-1, math.prod(outputs)).T
  return MatmulWeight(values_OK, scale_GO, contracted, outputs, run)


def fp8_matmul(
  x: Float[Array, '...'],
  weight: QuantizedArray | MatmulWeight,
  *,
  contract_dims: int = 1,
  scale_format: str = 'ue8m0',
  out_dtype: Any = None,
  implementation: str | None = None,
) -> Float[Array, '...']:
  """Sums over the last dimensions of x and the first of the weight, in FP8.

  Without gradients.

  Example:
    >>> w = quantization.quantize(jnp.ones((256, 2, 64)), block=(128, 1, 1))
    >>> fp8_matmul(jnp.ones((3, 5, 256), jnp.bfloat16), w).shape
    (3, 5, 2, 64)

  Args:
    x: float32 or bfloat16 [*batch, *contracted].
    weight: [*contracted, *outputs]. A `QuantizedArray` is turned on each call:
      `prepare` it where it is used more than once.
    contract_dims: how many dimensions are summed over; a `MatmulWeight` knows.
    scale_format: of x's scales, 'ue8m0' or 'float32'.
    out_dtype: of the result; None for x's.
    implementation: see `pallas_kernels.dispatch`.

  Returns:
    [*batch, *outputs].

  Raises:
    ValueError: shapes don't fit.
    NotImplementedError: it is differentiated.
  """
  if isinstance(weight, QuantizedArray):
    weight = prepare(weight, contract_dims=contract_dims)
  contracted = weight.contracted
  batch = x.shape[: x.ndim - len(contracted)]
  if x.shape[len(batch) :] != contracted:
    raise ValueError(
      f'x.shape={x.shape} must end in {contracted}, which the weight contracts'
    )
  depth = weight.values_OK.shape[1]
  stretches = math.prod(contracted) // weight.run
  x_MsK = x.reshape(-1, stretches, weight.run)
  missing = depth // stretches - weight.run
  x_MK = jnp.pad(x_MsK, ((0, 0), (0, 0), (0, missing))).reshape(-1, depth)
  y_MO = kernel(
    x_MK,
    weight.values_OK,
    weight.scale_GO,
    scale_format=scale_format,
    out_dtype=out_dtype,
    implementation=implementation,
  )
  return y_MO.reshape(*batch, *weight.outputs)


def _group(size: int) -> int:
  """Groups in which x is quantised, of a block of the contraction."""
  return _GROUP if size % _GROUP == 0 else size
