"""The definition of the indexer's loss: whole score tensors, float32.

Letters: B batch, T queries, S keys, J indexer heads, I indexer width, H heads
of the main attention, G of its keys, X its width, K selected keys.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def indexer_kl(
  q_index_BTJI: Float[Array, 'B T J I'],
  k_index_BSI: Float[Array, 'B S I'],
  w_index_BTJ: Float[Array, 'B T J'],
  q_BTHX: Float[Array, 'B T H X'],
  k_BSGX: Float[Array, 'B S G X'],
  lse_BTH: Float[Array, 'B T H'],
  row_weight_BT: Float[Array, 'B T'],
  *,
  scale: int | float,
  indices_BTK: Int[Array, 'B T K'] | None = None,
  key_start_BT: Int[Array, 'B T'] | None = None,
  key_end_BT: Int[Array, 'B T'] | None = None,
  head_axis: str | tuple[str, ...] | None = None,
) -> tuple[Float[Array, ''], Float[Array, 'B T']]:
  """arXiv:2512.02556, Eq. 3 (ranges) and Eq. 4 (selection); see `api`."""
  q_index, k_index, w_index, q, k = (
    x.astype(jnp.float32)
    for x in (q_index_BTJI, k_index_BSI, w_index_BTJ, q_BTHX, k_BSGX)
  )
  keys_11S = jnp.arange(k.shape[1])[None, None]
  if indices_BTK is None:
    assert key_start_BT is not None, 'api fills it'
    assert key_end_BT is not None, 'api fills it'
    valid_BTS = keys_11S >= key_start_BT[..., None]
    valid_BTS &= keys_11S < key_end_BT[..., None]
  else:
    valid_BTS = jnp.any(indices_BTK[..., None] == keys_11S[None], axis=2)
  valid_BTS &= (row_weight_BT != 0)[..., None]

  k_BSHX = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
  scores = scale * jnp.einsum('bthx,bshx->bths', q, k_BSHX, precision='highest')
  mass_BTHS = jnp.exp(scores - lse_BTH[..., None])
  p_BTS = jnp.mean(mass_BTHS, axis=2, where=valid_BTS[:, :, None])
  if head_axis is not None:
    p_BTS = jax.lax.pmean(p_BTS, head_axis)
  p_BTS = jax.lax.stop_gradient(jnp.where(valid_BTS, p_BTS, 0.0))

  dots = jnp.einsum('btji,bsi->btjs', q_index, k_index, precision='highest')
  index_scores_BTS = jnp.sum(w_index[..., None] * jax.nn.relu(dots), axis=2)
  log_q_BTS = jax.nn.log_softmax(index_scores_BTS, axis=-1, where=valid_BTS)
  log_q_BTS = jnp.where(valid_BTS, log_q_BTS, 0.0)
  entropy_BTS = jax.scipy.special.xlogy(p_BTS, p_BTS)
  kl_BT = jnp.sum(entropy_BTS - p_BTS * log_q_BTS, axis=-1)
  return jnp.sum(row_weight_BT * kl_BT), kl_BT
