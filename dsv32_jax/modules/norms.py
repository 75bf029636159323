"""Normalisation layers with their parameters."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv32_jax.functional import normalization
from dsv32_jax.sharding import axes


def ones_param(module: nn.Module, name: str, size: int, axis: str = axes.NORM):
  """A float32 scale vector; norms keep float32 weights (spec 3.1)."""
  init: Callable = nn.with_logical_partitioning(nn.initializers.ones, (axis,))
  return module.param(name, init, (size,), jnp.float32)


class RMSNorm(nn.Module):
  """RMSNorm in float32, weight included, then cast back (spec 3.1).

  Attributes:
    size: width of the last axis.
    eps: added to the mean square.
  """

  size: int
  eps: float

  @nn.compact
  def __call__(self, x: Float[Array, '*B D']) -> Float[Array, '*B D']:
    return normalization.rms_norm(
      x, ones_param(self, 'scale', self.size), epsilon=self.eps
    )


class LayerNorm(nn.Module):
  """LayerNorm with bias: only the indexer's key norm (spec 3.4)."""

  size: int
  eps: float = 1e-6

  @nn.compact
  def __call__(self, x: Float[Array, '*B D']) -> Float[Array, '*B D']:
    scale = ones_param(self, 'scale', self.size, axes.INDEX_DIM)
    bias = self.param(
      'bias',
      nn.with_logical_partitioning(nn.initializers.zeros, (axes.INDEX_DIM,)),
      (self.size,),
      jnp.float32,
    )
    return normalization.layer_norm(x, scale, bias, epsilon=self.eps)
