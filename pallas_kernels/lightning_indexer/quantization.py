"""Vectors in float8_e4m3fn with one scale each, as DeepSeek's indexer has them.

Letters: N any leading dims, I index head dim.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

MAX = 448.0
"""The largest float8_e4m3fn; a cast of more than 464 gives NaN."""

_SMALLEST_AMAX = 1e-4


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
  scale_N = _scale(x_NI)
  if power_of_two:
    mantissa_N, exponent_N = jnp.frexp(scale_N)  # mantissa in [1/2, 1)
    exponent_N -= (mantissa_N == 0.5).astype(exponent_N.dtype)
    scale_N = jnp.ldexp(jnp.ones_like(scale_N), exponent_N)
  values_NI = jnp.clip(x_NI / scale_N[..., None], -MAX, MAX)
  return values_NI.astype(jnp.float8_e4m3fn), scale_N


def rounded(
  x_NI: Float[Array, '*N I'],
) -> tuple[Float32[Array, '*N I'], Float32[Array, '*N']]:
  """`quantize` with the values in float32, to compute with."""
  x_NI = x_NI.astype(jnp.float32)
  scale_N = _scale(x_NI)
  return _round(jnp.clip(x_NI / scale_N[..., None], -MAX, MAX)), scale_N


@jax.custom_jvp
def round_trip(x_NI: Float[Array, '*N I']) -> Float32[Array, '*N I']:
  """`quantize` and back, in float32; its derivative is the identity."""
  values_NI, scale_N = rounded(x_NI)
  return values_NI * scale_N[..., None]


@round_trip.defjvp
def _round_trip_jvp(
  primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
  return round_trip(primals[0]), tangents[0].astype(jnp.float32)


def _scale(x_NI: Array) -> Array:
  amax_N = jnp.max(jnp.abs(x_NI), axis=-1)
  return jnp.maximum(amax_N, _SMALLEST_AMAX) / MAX


def _round(x: Array) -> Array:
  """The nearest float8_e4m3fn, without a cast: XLA drops one there and back.

  Three bits after the leading one; below 2^-6 a fixed step of 2^-9.
  """
  normal = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=3)
  return jnp.where(jnp.abs(x) < 2.0**-6, jnp.round(x * 512) / 512, normal)
