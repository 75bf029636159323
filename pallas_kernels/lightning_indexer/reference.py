"""The definition of the lightning indexer. Holds [B, T, J, S]: small sizes.

Letters: B batch, T query tokens, S key tokens, J indexer heads, I index head
dim.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32


def lightning_indexer(
  q_index_BTJI: Float[Array, 'B T J I'],
  k_index_BSI: Float[Array, 'B S I'],
  w_index_BTJ: Float[Array, 'B T J'],
  *,
  key_start_BT: Int32[Array, 'B T'] | None = None,
  key_end_BT: Int32[Array, 'B T'] | None = None,
) -> Float32[Array, 'B T S']:
  """I[t,s] = sum_j w[t,j] ReLU(q[t,j] . k[s]); arXiv:2512.02556, Eq. 1."""
  q, k, w = (
    x.astype(jnp.float32) for x in (q_index_BTJI, k_index_BSI, w_index_BTJ)
  )
  T, S = q.shape[1], k.shape[1]
  if key_start_BT is None or key_end_BT is None:
    key_end_BT = (jnp.arange(T) + 1 + S - T)[None]
    key_start_BT = jnp.zeros_like(key_end_BT)
  dots_BTJS = jnp.einsum('btji,bsi->btjs', q, k, precision='highest')
  scores_BTS = jnp.einsum(
    'btj,btjs->bts', w, jax.nn.relu(dots_BTJS), precision='highest'
  )
  scores_BTS = jnp.where(scores_BTS == 0, 0.0, scores_BTS)  # no -0.0
  s = jnp.arange(S)[None, None]
  valid_BTS = (s >= key_start_BT[..., None]) & (s < key_end_BT[..., None])
  return jnp.where(valid_BTS, scores_BTS, -jnp.inf)
