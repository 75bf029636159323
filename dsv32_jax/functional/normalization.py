"""Normalisation over the last dimension; statistics are a float32 island."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def rms_norm(
  x: Float[Array, '*batch D'],
  weight_D: Float[Array, ' D'],
  *,
  epsilon: float = 1e-6,
  dtype: DTypeLike | None = None,
) -> Float[Array, '*batch D']:
  """Divides by the root mean square and multiplies by a weight.

  Everything, the multiplication by the weight included, runs in float32 and
  the result is cast once, as DeepSeek-V3's code does (Hugging Face casts
  before the weight, which rounds bfloat16 twice).

  Args:
    x: [..., D], any float type.
    weight_D: [D].
    epsilon: added to the mean square.
    dtype: type of the result, x's if None. Lets a caller normalise an
      unrounded float32 sum into the compute type.
  """
  x_f32 = x.astype(jnp.float32)
  mean_square = jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True)
  normed = x_f32 * jax.lax.rsqrt(mean_square + epsilon)
  return (normed * _as_row(weight_D, x.ndim)).astype(dtype or x.dtype)


def layer_norm(
  x: Float[Array, '*batch D'],
  weight_D: Float[Array, ' D'],
  bias_D: Float[Array, ' D'],
  *,
  epsilon: float = 1e-6,
  dtype: DTypeLike | None = None,
) -> Float[Array, '*batch D']:
  """Subtracts the mean, divides by the deviation, applies weight and bias.

  The lightning indexer normalises its keys with this (not with RMSNorm);
  epsilon is 1e-6 there, where PyTorch's default would be 1e-5.

  Args:
    x: [..., D], any float type.
    weight_D: [D].
    bias_D: [D].
    epsilon: added to the variance.
    dtype: type of the result, x's if None.
  """
  x_f32 = x.astype(jnp.float32)
  centred = x_f32 - jnp.mean(x_f32, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
  normed = centred * jax.lax.rsqrt(variance + epsilon)
  scaled = normed * _as_row(weight_D, x.ndim) + _as_row(bias_D, x.ndim)
  return scaled.astype(dtype or x.dtype)


def _as_row(vector_D: Array, ndim: int) -> Array:
  """Gives a vector the rank of the array it multiplies."""
  return vector_D.astype(jnp.float32).reshape((1,) * (ndim - 1) + (-1,))
