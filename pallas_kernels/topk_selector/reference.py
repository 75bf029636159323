"""The definition of the token selection: a stable descending sort.

Letters: B batch, T query tokens, S key tokens, K selected tokens.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.lightning_indexer import reference as lightning_indexer
from pallas_kernels.topk_selector.selection import Selection


def select_topk(scores_BTS: Float[Array, 'B T S'], *, k: int) -> Selection:
  """S_t of arXiv:2512.02556, Eq. 2, with the lowest index first on ties."""
  scores = jnp.where(jnp.isnan(scores_BTS), -jnp.inf, scores_BTS)
  scores = jnp.where(scores == 0, 0.0, scores)  # -0.0 ties with +0.0
  order = jnp.argsort(scores, axis=-1, stable=True, descending=True)
  best = order[..., :k].astype(jnp.int32)
  chosen = jnp.take_along_axis(scores, best, axis=-1) > -jnp.inf
  num_keys = scores.shape[-1]
  best = jnp.sort(jnp.where(chosen, best, num_keys), axis=-1)
  best = jnp.where(best == num_keys, -1, best)
  missing = max(k - num_keys, 0)
  best = jnp.pad(best, ((0, 0), (0, 0), (0, missing)), constant_values=-1)
  return Selection(indices_BTK=best)


def indexed_topk(
  q_index_BTJI: Float[Array, 'B T J I'],
  k_index_BSI: Float[Array, '_B _S I'],
  w_index_BTJ: Float[Array, 'B T J'],
  *,
  k: int,
  key_start_BT: Int32[Array, 'B T'] | None = None,
  key_end_BT: Int32[Array, 'B T'] | None = None,
  k_scale_BS: Float32[Array, '_B _S'] | None = None,
  pages_BN: Int32[Array, 'B N'] | None = None,
  scale_format: str = 'float32',
) -> Selection:
  """Eq. 1, then Eq. 2."""
  scores_BTS = lightning_indexer.lightning_indexer(
    q_index_BTJI,
    k_index_BSI,
    w_index_BTJ,
    key_start_BT=key_start_BT,
    key_end_BT=key_end_BT,
    k_scale_BS=k_scale_BS,
    pages_BN=pages_BN,
    scale_format=scale_format,
  )
  return select_topk(scores_BTS, k=k)
