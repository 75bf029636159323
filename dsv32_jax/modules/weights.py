"""How a weight matrix is made: initialiser, dtype and logical axes."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from dsv32_jax.config.model import ModelConfig


def weight(
  module: nn.Module,
  cfg: ModelConfig,
  name: str,
  shape: tuple[int, ...],
  logical_axes: tuple[str, ...],
  *,
  dtype: DTypeLike | None = None,
) -> Array:
  """A normal(0, initializer_range) matrix, cast to the compute dtype.

  Args:
    module: owner of the parameter.
    cfg: gives the initialiser range, the parameter and the compute dtype.
    name: the paper's name of the matrix, as `w_dq`.
    shape: its dims, in the order of the einsum that uses it.
    logical_axes: one name of `sharding.axes` a dim.
    dtype: compute in this dtype instead of `cfg.precision.compute`.

  Returns:
    The matrix in the dtype it is multiplied in.
  """
  init = nn.with_logical_partitioning(
    nn.initializers.normal(cfg.initializer_range), logical_axes
  )
  value = module.param(name, init, shape, jnp.dtype(cfg.precision.param))
  return value.astype(dtype or cfg.precision.compute)
