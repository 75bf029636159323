"""The definition of the float8 matrix product. Holds [M, G, O]: small sizes.

Letters: M rows, K contraction, O outputs, G groups of the contraction.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.lightning_indexer import quantization


def fp8_matmul(
  x_MK: Array,
  w_OK: Array,
  w_scale_GO: Array,
  *,
  power_of_two: bool,
  out_dtype: Any,
) -> Float[Array, 'M O']:
  """See `pallas_kernels.fp8_matmul`."""
  G = len(w_scale_GO)
  x_MGk = x_MK.reshape(len(x_MK), G, -1)
  x_MGk, x_scale_MG = quantization.quantize(x_MGk, power_of_two=power_of_two)
  w_OGk = w_OK.reshape(len(w_OK), G, -1)
  products_MGO = jnp.einsum(
    'mgk,ogk->mgo',
    x_MGk.astype(jnp.float32),
    w_OGk.astype(jnp.float32),
    precision='highest',
  )
  products_MGO *= x_scale_MG[..., None] * w_scale_GO[None]
  return jnp.sum(products_MGO, axis=1).astype(out_dtype)
