"""Block-scaled FP8 (e4m3) and the Hadamard rotation that goes with it.

A block is a stretch of the trailing dimensions that shares one float32 scale:
(128,) for activations ("1x128"), (128, 128) for weights, (128, 1, 1) for a
weight with heads whose columns have a scale each. Dimensions that are not a
multiple of the block end in a smaller one.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

E4M3_MAX = 448.0
# Floor of the largest magnitude of a block, so that a block of zeros has a
# scale (DeepSeek-V3.2-Exp's kernels; vLLM uses 1e-10).
AMAX_FLOOR = 1e-4
SCALE_FORMATS = ('float32', 'ue8m0')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
  """FP8 values with a scale a block: the array is values * scale.

  Attributes:
    values: float8_e4m3fn, any shape.
    scale: float32; the blocked trailing dimensions hold one entry a block.
      The multiplier, although checkpoints call it `weight_scale_inv`.
    block: size of a block in the trailing dimensions; leading ones (stacked
      layers, experts) have scales of their own.
  """

  # Any, as jax rebuilds pytrees with shapes, specs or stacked arrays inside.
  values: Any
  scale: Any
  block: tuple[int, ...] = dataclasses.field(metadata={'static': True})

  @property
  def shape(self) -> tuple[int, ...]:
    return self.values.shape

  @property
  def ndim(self) -> int:
    return len(self.values.shape)


def hadamard_rotation(x: Float[Array, '*batch I']) -> Float[Array, '*batch I']:
  """Multiplies by the orthogonal Sylvester-Hadamard matrix H / sqrt(I).

  The rotation leaves dot products as they are when both sides take it and
  only spreads outliers before FP8; apply it to indexer queries and keys or to
  neither.

  Args:
    x: [..., I], I a power of two. Accumulates in float32.

  Returns:
    The rotated array in x's type.

  Raises:
    ValueError: I is not a power of two.
  """
  dim = x.shape[-1]
  if dim < 1 or dim & (dim - 1):
    raise ValueError(f'x.shape={x.shape} must end in a power of two')
  index = jnp.arange(dim, dtype=jnp.uint32)
  # H[i, j] = (-1)^(number of common bits): Sylvester's recursion, closed.
  common = jax.lax.population_count(index[:, None] & index[None, :])
  matrix = jnp.where(common % 2 == 1, -1.0, 1.0).astype(x.dtype)
  rotated = jnp.matmul(x, matrix, preferred_element_type=jnp.float32)
  return (rotated / math.sqrt(dim)).astype(x.dtype)


def block_scale(
  amax: Float[Array, '*shape'], *, scale_format: str = 'ue8m0'
) -> Float[Array, '*shape']:
  """Scale of a block whose largest magnitude is `amax`.

  Args:
    amax: largest magnitudes; floored at 1e-4.
    scale_format: 'float32' for amax / 448, 'ue8m0' for the next power of two
      that is not smaller, read off the bits of the quotient.

  Returns:
    float32.

  Raises:
    ValueError: unknown `scale_format`.
  """
  if scale_format not in SCALE_FORMATS:
    raise ValueError(
      f'scale_format={scale_format!r} must be one of {SCALE_FORMATS}'
    )
  scale = jnp.maximum(amax.astype(jnp.float32), AMAX_FLOOR) / E4M3_MAX
  if scale_format == 'float32':
    return scale
  bits = jax.lax.bitcast_convert_type(scale, jnp.int32)
  exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
  return jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)


def to_e4m3(x: Float[Array, '*shape']) -> Float[Array, '*shape']:
  """Casts to float8_e4m3fn, saturating at +-448.

  The cast alone turns magnitudes beyond 464 into NaN.
  """
  return jnp.clip(x, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)


def quantize(
  x: Float[Array, '*shape'],
  *,
  block: tuple[int, ...] = (128,),
  scale_format: str = 'ue8m0',
) -> QuantizedArray:
  """Casts to FP8 with a scale a block.

  Args:
    x: array of at least as many dimensions as `block`.
    block: sizes in the trailing dimensions: (128,) or (128, 128).
    scale_format: see `block_scale`.

  Raises:
    ValueError: a block size is below 1, x has too few dimensions, or the
      scale format is unknown.
  """
  _check_block(x.shape, block)
  x_f32 = x.astype(jnp.float32)
  lead = x.ndim - len(block)
  counts = [-(-n // b) for n, b in zip(x.shape[lead:], block, strict=True)]
  padding = [(0, 0)] * lead + [
    (0, c * b - n)
    for n, c, b in zip(x.shape[lead:], counts, block, strict=True)
  ]
  split = [size for pair in zip(counts, block, strict=True) for size in pair]
  tiles = jnp.pad(jnp.abs(x_f32), padding).reshape(*x.shape[:lead], *split)
  inner_axes = tuple(lead + 2 * i + 1 for i in range(len(block)))
  amax = jnp.max(tiles, axis=inner_axes)
  scale = block_scale(amax, scale_format=scale_format)
  values = to_e4m3(x_f32 / _expand(scale, x.shape, block))
  return QuantizedArray(values=values, scale=scale, block=tuple(block))


def dequantize(quantized: QuantizedArray) -> Float[Array, '*shape']:
  """Values * scale in float32; blocks at the edge may be smaller.

  Raises:
    ValueError: the shape of the scale is not one entry a block.
  """
  values, scale, block = quantized.values, quantized.scale, quantized.block
  _check_block(values.shape, block)
  lead = values.ndim - len(block)
  expected = values.shape[:lead] + tuple(
    -(-n // b) for n, b in zip(values.shape[lead:], block, strict=True)
  )
  if scale.shape != expected:
    raise ValueError(
      f'scale.shape={scale.shape} must be {expected} for '
      f'values.shape={values.shape} in blocks of {block}'
    )
  return values.astype(jnp.float32) * _expand(scale, values.shape, block)


def fake_quantize(
  x: Float[Array, '*shape'],
  *,
  block: tuple[int, ...] = (128,),
  scale_format: str = 'ue8m0',
) -> Float[Array, '*shape']:
  """Rounds to what FP8 can hold, in x's type; the gradient passes straight.

  Args: as `quantize`.
  """

  @jax.custom_jvp
  def round_trip(x):
    quantized = quantize(x, block=block, scale_format=scale_format)
    return dequantize(quantized).astype(x.dtype)

  @round_trip.defjvp
  def round_trip_jvp(primals, tangents):
    return round_trip(*primals), tangents[0]

  return round_trip(x)


def _expand(
  scale: Array, shape: tuple[int, ...], block: tuple[int, ...]
) -> Array:
  """Repeats every scale over its block, cut to `shape`."""
  lead = len(shape) - len(block)
  for axis, size in enumerate(block, start=lead):
    if size == 1:
      continue
    scale = jnp.repeat(scale, size, axis=axis)
    scale = jax.lax.slice_in_dim(scale, 0, shape[axis], axis=axis)
  return scale


def _check_block(shape: tuple[int, ...], block: tuple[int, ...]) -> None:
  if len(block) > len(shape) or not block or min(block) < 1:
    raise ValueError(
      f'block={block} must hold positive sizes, at most one for each '
      f'dimension of shape={shape}'
    )
