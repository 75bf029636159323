"""Types that sums are taken in."""

from typing import Any

import jax.numpy as jnp


def accumulator(dtype: Any) -> jnp.dtype:
  """float32, or `dtype` where that is wider: no sum is narrower than its terms.

  Example:
    >>> accumulator(jnp.bfloat16)
    dtype('float32')
  """
  return jnp.promote_types(dtype, jnp.float32)
