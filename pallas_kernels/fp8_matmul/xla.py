"""Float8 matrix product on any backend: a group of the contraction at a time.

The products are of float8 values in a type that holds them exactly, so that
they are those of a float8 unit with float32 sums.

Letters: M rows, K contraction, O outputs, G groups of the contraction.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.lightning_indexer import quantization


@functools.partial(jax.jit, static_argnames=('power_of_two', 'out_dtype'))
def fp8_matmul(
  x_MK: Array,
  w_OK: Array,
  w_scale_GO: Array,
  *,
  power_of_two: bool,
  out_dtype: Any,
) -> Float[Array, 'M O']:
  """See `pallas_kernels.fp8_matmul`."""
  rows, outputs, groups = len(x_MK), len(w_OK), len(w_scale_GO)
  exact = jnp.float32 if jax.default_backend() == 'cpu' else jnp.bfloat16
  x_MGk, x_scale_MG = quantization.rounded(
    x_MK.reshape(rows, groups, -1), power_of_two=power_of_two
  )
  w_OGk = w_OK.reshape(outputs, groups, -1)

  def add(y_MO: Array, group: Array) -> tuple[Array, None]:
    x_Mk = lax.dynamic_index_in_dim(x_MGk, group, 1, keepdims=False)
    w_Ok = lax.dynamic_index_in_dim(w_OGk, group, 1, keepdims=False)
    product_MO = jnp.einsum(
      'mk,ok->mo',
      x_Mk.astype(exact),
      w_Ok.astype(exact),
      precision='highest',
      preferred_element_type=jnp.float32,
    )
    x_scale_M = lax.dynamic_index_in_dim(x_scale_MG, group, 1, keepdims=False)
    w_scale_O = lax.dynamic_index_in_dim(w_scale_GO, group, 0, keepdims=False)
    return y_MO + product_MO * (x_scale_M[:, None] * w_scale_O[None]), None

  with jax.named_scope('fp8_matmul'):
    y_MO, _ = lax.scan(
      add, jnp.zeros((rows, outputs), jnp.float32), jnp.arange(groups)
    )
    return y_MO.astype(out_dtype)
