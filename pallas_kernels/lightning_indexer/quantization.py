"""Vectors in float8_e4m3fn with one scale each, as DeepSeek's indexer has them.

Letters: N any leading dims, I index head dim.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float8e4m3fn, Float32

MAX = 448.0
"""The largest float8_e4m3fn; a cast of more than 464 gives NaN."""

SCALE_FORMATS = ('float32', 'ue8m0')
"""max|x| / 448, or the next power of two that is not below it."""

_SMALLEST_AMAX = 1e-4


def quantize_index_keys(
  k_NI: Float[Array, '*N I'], *, scale_format: str = 'float32'
) -> tuple[Float8e4m3fn[Array, '*N I'], Float32[Array, '*N']]:
  """Index keys as a cache holds them: I + 4 bytes a key.

  With the result as `k_index_BSI` and `k_scale_BS`, `lightning_indexer` and
  `indexed_topk` give to the bit what `lightning_indexer(quantized=True)` gives
  for the keys themselves.

  Example:
    >>> values, scale = quantize_index_keys(jnp.ones((1, 3, 128)))
    >>> values.shape, scale.shape
    ((1, 3, 128), (1, 3))

  Args:
    k_NI: keys, float32 or bfloat16, of any leading dimensions: [B, S, I], or a
      pool of pages [P, page, I].
    scale_format: 'float32' for scales max|k| / 448, 'ue8m0' for powers of two
      (DeepSeek-V3.2-Exp's `scale_fmt`).

  Returns:
    (values float8_e4m3fn [*N, I], scale float32 [*N]).

  Raises:
    ValueError: unknown scale format.
  """
  check_scale_format(scale_format)
  return quantize(k_NI, power_of_two=scale_format == 'ue8m0')


def check_scale_format(scale_format: str) -> None:
  """Raises ValueError for a name that isn't among `SCALE_FORMATS`."""
  if scale_format not in SCALE_FORMATS:
    raise ValueError(
      f'scale_format={scale_format!r} must be one of {SCALE_FORMATS}'
    )


def quantize(
  x_NI: Float[Array, '*N I'], *, power_of_two: bool = False
) -> tuple[Array, Float32[Array, '*N']]:
  """Rounds each vector to float8_e4m3fn times a float32 scale.

  Example:
    >>> values, scale = quantize(k_BSI)
    >>> k_BSI_again = values.astype(jnp.float32) * scale[..., None]

  Args:
    x_NI: vectors; one head of a query, or one key.
    power_of_two: scales 2^n, rounded up (the ue8m0 format), else max|x| / 448.

  Returns:
    (values float8_e4m3fn [*N, I], scale float32 [*N]).
  """
  x_NI = x_NI.astype(jnp.float32)
  scale_N = _scale(x_NI, power_of_two)
  values_NI = jnp.clip(x_NI / scale_N[..., None], -MAX, MAX)
  return values_NI.astype(jnp.float8_e4m3fn), scale_N


def rounded(
  x_NI: Float[Array, '*N I'], *, power_of_two: bool = False
) -> tuple[Float32[Array, '*N I'], Float32[Array, '*N']]:
  """`quantize` with the values in float32, to compute with."""
  x_NI = x_NI.astype(jnp.float32)
  scale_N = _scale(x_NI, power_of_two)
  return _round(jnp.clip(x_NI / scale_N[..., None], -MAX, MAX)), scale_N


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def round_trip(
  x_NI: Float[Array, '*N I'], power_of_two: bool = False
) -> Float32[Array, '*N I']:
  """`quantize` and back, in float32; its derivative is the identity."""
  values_NI, scale_N = rounded(x_NI, power_of_two=power_of_two)
  return values_NI * scale_N[..., None]


@round_trip.defjvp
def _round_trip_jvp(
  power_of_two: bool, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
  return round_trip(primals[0], power_of_two), tangents[0].astype(jnp.float32)


def _scale(x_NI: Array, power_of_two: bool) -> Array:
  amax_N = jnp.max(jnp.abs(x_NI), axis=-1)
  scale_N = jnp.maximum(amax_N, _SMALLEST_AMAX) / MAX
  if not power_of_two:
    return scale_N
  mantissa_N, exponent_N = jnp.frexp(scale_N)  # mantissa in [1/2, 1)
  exponent_N -= (mantissa_N == 0.5).astype(exponent_N.dtype)
  return jnp.ldexp(jnp.ones_like(scale_N), exponent_N)


def _round(x: Array) -> Array:
  """The nearest float8_e4m3fn, without a cast: XLA drops one there and back.

  Three bits after the leading one; below 2^-6 a fixed step of 2^-9.
  """
  normal = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=3)
  return jnp.where(jnp.abs(x) < 2.0**-6, jnp.round(x * 512) / 512, normal)
