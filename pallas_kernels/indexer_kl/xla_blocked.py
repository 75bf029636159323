"""One sweep of the indexer's loss over key blocks, two passes a query block.

The first pass finds the normaliser of softmax(I), the second the divergence
and the gradients, recomputing the index scores: cheaper than keeping a row of
S scores, and memory stays that of a block. With g = softmax(I) - p and
m[j, s] = g[s] 1[q_j . k_s > 0], one product A[j] = sum_s m[j, s] k[s] gives
two gradients: dq[j] = w[j] A[j] and dw[j] = q[j] . A[j].

Letters: B batch, T queries, S keys, J indexer heads, I indexer width, G key
heads of the main attention, r its query heads a key head, X its width, K
selected keys, P queries of a step, M keys of a block.
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
  valid: tuple[jax.Array, ...],
  *,
  scale: float,
  config: config_lib.XlaConfig,
  head_axis: str | tuple[str, ...] | None,
  with_gradients: bool,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """Divergence of each row, and float32 gradients of the weighted sum.

  Args:
    q_index_BTJI: indexer queries.
    k_index_BSI: indexer keys.
    w_index_BTJ: head weights.
    q_BTHX: queries of the main attention.
    k_BSGX: its keys.
    lse_BTH: with no -inf.
    row_weight_BT: float32.
    valid: (start_BT, end_BT) or (indices_BTK,).
    scale: factor of the main attention's scores.
    config: block sizes.
    head_axis: see `api`; every member visits the same blocks.
    with_gradients: False skips the gradients, and returns () for them.
  """
  num_queries, num_heads = q_BTHX.shape[1:3]
  true_keys, key_heads = k_BSGX.shape[1:3]
  batch, _, index_width = k_index_BSI.shape
  queries, size = config.block_queries, config.block_keys
  dtype = k_index_BSI.dtype
  k_index_BSI = selection.pad_axis(k_index_BSI, 1, size)
  k_BGSX = jnp.swapaxes(selection.pad_axis(k_BSGX, 1, size), 1, 2)
  num_keys = k_BGSX.shape[2]
  q_BTGrX = q_BTHX.reshape(*q_BTHX.shape[:2], key_heads, -1, q_BTHX.shape[3])
  lse_BTGr = lse_BTH.reshape(*q_BTGrX.shape[:4])
  selected = len(valid) == 1

  def step(d_k, inputs):
    (q_index_BPJI, w_BPJ, q_BPGrX, lse_BPGr, weight_BP, *valid_P) = inputs
    *valid_P, first, end = valid_P
    q_index_BJPI = jnp.swapaxes(q_index_BPJI, 1, 2)
    w_BJP1 = jnp.swapaxes(w_BPJ, 1, 2)[..., None].astype(jnp.float32)
    q_BGrPX = jnp.moveaxis(q_BPGrX, 1, 3)
    lse_BGrP1 = jnp.moveaxis(lse_BPGr, 1, 3)[..., None]
    if selected:
      mask_BPS = selection.selection_mask(valid_P[0], num_keys)

    def index_scores(block):
      k_BMI = selection.block_of(k_index_BSI, block, size, 1)
      if selected:
        valid_BPM = selection.block_of(mask_BPS, block, size, 2)
      else:
        start_BP, end_BP = valid_P
        key_11M = block * size + jnp.arange(size, dtype=jnp.int32)[None, None]
        valid_BPM = key_11M >= start_BP[..., None]
        valid_BPM &= key_11M < end_BP[..., None]
      dots_BJPM = _product('bjpi,bmi->bjpm', q_index_BJPI, k_BMI)
      scores_BPM = sum_heads(w_BJP1 * jax.nn.relu(dots_BJPM), axis=1)
      return k_BMI, valid_BPM, dots_BJPM, scores_BPM

    def normalise(block, carry):
      highest_BP, total_BP = carry
      _, valid_BPM, _, scores_BPM = index_scores(block)
      scores_BPM = jnp.where(valid_BPM, scores_BPM, -jnp.inf)
      new_BP = jnp.maximum(highest_BP, jnp.max(scores_BPM, axis=-1))
      finite_BP = jnp.where(new_BP == -jnp.inf, 0.0, new_BP)
      total_BP = total_BP * jnp.exp(highest_BP - finite_BP) + jnp.sum(
        jnp.exp(scores_BPM - finite_BP[..., None]), axis=-1
      )
      return new_BP, total_BP

    rows = (batch, queries)
    highest_BP, total_BP = lax.fori_loop(
      first,
      end,
      normalise,
      (
        jnp.full(rows, -jnp.inf, jnp.float32),
        jnp.zeros(rows, jnp.float32),
      ),
    )
    # Rows without keys use no logarithm: any finite value does.
    log_total_BP = jnp.where(total_BP == 0, 0.0, highest_BP + jnp.log(total_BP))
    if with_gradients:
      wq_BIJP = jnp.transpose(
        w_BJP1 * q_index_BJPI.astype(jnp.float32), (0, 3, 1, 2)
      ).astype(dtype)

    def compare(block, carry):
      kl_BP, *sums = carry
      k_BMI, valid_BPM, dots_BJPM, scores_BPM = index_scores(block)
      k_BGMX = selection.block_of(k_BGSX, block, size, 2)
      main_BGrPM = scale * _product('bgrpx,bgmx->bgrpm', q_BGrPX, k_BGMX)
      p_BGrPM = jnp.exp(main_BGrPM - lse_BGrP1)
      mass_BPM = sum_heads(sum_heads(p_BGrPM, axis=2), axis=1)
      mass_BPM /= num_heads
      if head_axis is not None:
        mass_BPM = lax.pmean(mass_BPM, head_axis)
      p_BPM = jnp.where(valid_BPM, mass_BPM, 0.0)
      log_q_BPM = scores_BPM - log_total_BP[..., None]
      log_p_BPM = jnp.log(jnp.where(p_BPM > 0, p_BPM, 1.0))
      kl_BP += jnp.sum(
        jnp.where(valid_BPM, p_BPM * (log_p_BPM - log_q_BPM), 0.0), axis=-1
      )
      if with_gradients:
        a_BJPI, d_k_BIS = sums
        g_BPM = jnp.where(
          valid_BPM, weight_BP[..., None] * (jnp.exp(log_q_BPM) - p_BPM), 0.0
        )
        m_BJPM = jnp.where(dots_BJPM > 0, g_BPM[:, None], 0.0).astype(dtype)
        a_BJPI += _product('bjpm,bmi->bjpi', m_BJPM, k_BMI)
        d_k_BIM = _product('bijp,bjpm->bim', wq_BIJP, m_BJPM)
        d_k_BIS = selection.add_block(d_k_BIS, d_k_BIM, block, size, 2)
        sums = (a_BJPI, d_k_BIS)
      return kl_BP, *sums

    sums = ()
    if with_gradients:
      sums = (jnp.zeros(q_index_BJPI.shape, jnp.float32), *d_k)
    kl_BP, *sums = lax.fori_loop(
      first, end, compare, (jnp.zeros(rows, jnp.float32), *sums)
    )
    if not with_gradients:
      return (), (kl_BP,)
    a_BJPI, d_k_BIS = sums
    d_q_BPJI = jnp.swapaxes(w_BJP1 * a_BJPI, 1, 2)
    d_w_BJP = jnp.sum(q_index_BJPI.astype(jnp.float32) * a_BJPI, axis=-1)
    return (d_k_BIS,), (kl_BP, d_q_BPJI, jnp.swapaxes(d_w_BJP, 1, 2))

  d_k: tuple[jax.Array, ...] = ()
  if with_gradients:
    d_k = (jnp.zeros((batch, index_width, num_keys), jnp.float32),)

  def split(x, value=0):
    return selection.split_queries(x, queries, value)

  if selected:
    valid_N = (split(valid[0], -1),)
    blocks_N = selection.selected_blocks(valid_N[0], size, num_keys)
  else:
    valid_N = tuple(split(x) for x in valid)
    blocks_N = _range_blocks(valid_N[0], valid_N[1], size, num_keys)
  rows_N = (q_index_BTJI, w_index_BTJ, q_BTGrX, lse_BTGr, row_weight_BT)
  d_k, outputs = lax.scan(step, d_k, (*map(split, rows_N), *valid_N, *blocks_N))
  kl_BT, *d_rows = (selection.join_queries(x, num_queries) for x in outputs)
  if not with_gradients:
    return kl_BT, ()
  d_k_BSI = jnp.swapaxes(d_k[0], 1, 2)[:, :true_keys]
  return kl_BT, (d_rows[0], d_k_BSI, d_rows[1])


def _range_blocks(start_NBP, end_NBP, size, num_keys):
  """First key block with a valid key, and one past the last: two [N]."""
  empty_NBP = start_NBP >= end_NBP
  first_N = jnp.min(jnp.where(empty_NBP, num_keys, start_NBP), axis=(1, 2))
  end_N = jnp.max(jnp.where(empty_NBP, 0, end_NBP), axis=(1, 2))
  end_N = jnp.minimum(end_N, num_keys)
  return first_N // size, -(-end_N // size)


def _product(equation, x, y):
  return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)
