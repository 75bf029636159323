"""Definition of the grouped matrix product: dense over all experts."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def grouped_matmul(
  x_MD: Float[Array, 'M D'],
  w_EDF: Float[Array, 'E D F'],
  group_sizes_E: Int[Array, ' E'],
) -> Float[Array, 'M F']:
  """y[m] = sum_e [m in group e] x[m] @ w[e], in float32."""
  end_E = jnp.cumsum(group_sizes_E)
  row_M = jnp.arange(x_MD.shape[0])
  is_member_ME = (row_M[:, None] >= (end_E - group_sizes_E)[None, :]) & (
    row_M[:, None] < end_E[None, :]
  )
  x_EMD = jnp.where(
    is_member_ME.T[:, :, None], x_MD[None].astype(jnp.float32), 0
  )
  y_MF = jnp.einsum(
    'emd,edf->mf',
    x_EMD,
    w_EDF.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )
  return y_MF.astype(x_MD.dtype)
