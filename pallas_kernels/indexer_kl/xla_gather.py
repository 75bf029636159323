"""One sweep of the indexer's loss over the selected rows of each query.

Cost and memory follow K, not S. The formulas are those of `xla_blocked`.

Letters: B batch, T queries, S keys, J indexer heads, I indexer width, G key
heads of the main attention, r its query heads a key head, X its width, K
selected keys, P queries of a step.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.indexer_kl.head_sum import sum_heads
from pallas_kernels.sparse_mla_attention import config as config_lib
from pallas_kernels.sparse_mla_attention import selection


def sweep(
  q_index_BTJI: jax.Array,
  k_index_BSI: jax.Array,
  w_index_BTJ: jax.Array,
  q_BTHX: jax.Array,
  k_BSGX: jax.Array,
  lse_BTH: jax.Array,
  row_weight_BT: jax.Array,
  valid: tuple[jax.Array],
  *,
  scale: float,
  config: config_lib.XlaConfig,
  head_axis: str | tuple[str, ...] | None,
  with_gradients: bool,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """Divergence of each row, and float32 gradients of the weighted sum.

  Takes what `xla_blocked.sweep` takes, with `valid` = (indices_BTK,).
  """
  num_queries, num_heads = q_BTHX.shape[1:3]
  dtype = k_index_BSI.dtype
  q_BTGrX = q_BTHX.reshape(
    *q_BTHX.shape[:2], k_BSGX.shape[2], -1, q_BTHX.shape[3]
  )
  lse_BTGr = lse_BTH.reshape(*q_BTGrX.shape[:4])

  def step(d_k, inputs):
    q_BPJI, w_BPJ, q_BPGrX, lse_BPGr, weight_BP, indices_BPK = inputs
    valid_BPK = indices_BPK >= 0
    w_BPJ1 = w_BPJ[..., None].astype(jnp.float32)

    k_BPKGX = selection.gather_rows(k_BSGX, indices_BPK)
    main_BPGrK = scale * _product('bpgrx,bpkgx->bpgrk', q_BPGrX, k_BPKGX)
    p_BPGrK = jnp.exp(main_BPGrK - lse_BPGr[..., None])
    mass_BPK = sum_heads(sum_heads(p_BPGrK, axis=3), axis=2)
    mass_BPK /= num_heads
    if head_axis is not None:
      mass_BPK = lax.pmean(mass_BPK, head_axis)
    p_BPK = jnp.where(valid_BPK, mass_BPK, 0.0)

    k_BPKI = selection.gather_rows(k_index_BSI, indices_BPK)
    dots_BPJK = _product('bpji,bpki->bpjk', q_BPJI, k_BPKI)
    scores_BPK = sum_heads(w_BPJ1 * jax.nn.relu(dots_BPJK), axis=2)
    log_total_BP1 = jax.nn.logsumexp(
      scores_BPK, axis=-1, keepdims=True, where=valid_BPK
    )
    log_total_BP1 = jnp.where(log_total_BP1 == -jnp.inf, 0.0, log_total_BP1)
    log_q_BPK = scores_BPK - log_total_BP1
    log_p_BPK = jnp.log(jnp.where(p_BPK > 0, p_BPK, 1.0))
    kl_BP = jnp.sum(
      jnp.where(valid_BPK, p_BPK * (log_p_BPK - log_q_BPK), 0.0), axis=-1
    )
    if not with_gradients:
      return (), (kl_BP,)

    g_BPK = jnp.where(
      valid_BPK, weight_BP[..., None] * (jnp.exp(log_q_BPK) - p_BPK), 0.0
    )
    m_BPJK = jnp.where(dots_BPJK > 0, g_BPK[:, :, None], 0.0).astype(dtype)
    a_BPJI = _product('bpjk,bpki->bpji', m_BPJK, k_BPKI)
    q_BPJI = q_BPJI.astype(jnp.float32)
    d_rows_BPKI = _product(
      'bpjk,bpji->bpki', m_BPJK, (w_BPJ1 * q_BPJI).astype(dtype)
    )
    d_k_BSI = selection.add_rows(
      d_k[0],
      indices_BPK,
      d_rows_BPKI,
      in_sorted_order=config.sorted_scatter,
    )
    d_w_BPJ = jnp.sum(q_BPJI * a_BPJI, axis=-1)
    return (d_k_BSI,), (kl_BP, w_BPJ1 * a_BPJI, d_w_BPJ)

  def split(x, value=0):
    return selection.split_queries(x, config.block_queries, value)

  d_k: tuple[jax.Array, ...] = ()
  if with_gradients:
    d_k = (jnp.zeros(k_index_BSI.shape, jnp.float32),)
  rows_N = (q_index_BTJI, w_index_BTJ, q_BTGrX, lse_BTGr, row_weight_BT)
  d_k, outputs = lax.scan(step, d_k, (*map(split, rows_N), split(valid[0], -1)))
  kl_BT, *d_rows = (selection.join_queries(x, num_queries) for x in outputs)
  if not with_gradients:
    return kl_BT, ()
  return kl_BT, (d_rows[0], d_k[0], d_rows[1])


def _product(equation, x, y):
  return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)
