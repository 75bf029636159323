"""The kernels of the indexer's loss over blocks of queries, in one sweep.

XLA computes, elementwise in blocks of p and I, the divergence and
g = row_weight * (softmax(I) - p). A selection is one list of queries and one of
keys, whatever sequence they are from; ranges go sequence by sequence.

Letters: B batch, T queries, S keys, J indexer heads, I indexer width, G key
heads of the main attention, H its heads, X its width, K columns of the scores
(selected keys or all), P queries of a block, N all queries.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.indexer_kl import (
  mosaic_gradients,
  mosaic_scores,
  mosaic_target,
  mosaic_target_heads,
)
from pallas_kernels.indexer_kl.mosaic_rows import TILE

INDEX_HEADS = 64
"""Indexer heads are padded to the rows of an instruction."""

INDEX_WIDTH = 128
"""So are their columns, to the one width measured."""


def sweep(
  arrays,
  row_weight_BT,
  valid,
  scale,
  config,
  target,
  head_axis,
  with_gradients,
):
  """Divergence of each row, and gradients of q_index, k_index and w_index.

  Args:
    arrays: q_index_BTJI, k_index_BSI, w_index_BTJ, q_BTHX, k_BSGX and lse_BTH
      (with inf, and no -inf, where a head has no normaliser).
    row_weight_BT: weight of each row.
    valid: (indices_BTK,) or (start_BT, end_BT); a row of weight 0 has no keys.
    scale: factor of the main attention's scores.
    config: pipelines and sizes of the blocks.
    target: where the kernels run.
    head_axis: mesh axes that the heads are cut over, or None; see `api`.
    with_gradients: False leaves them out, as ().
  """
  q_index_BTJI, k_index_BSI, w_index_BTJ, q_BTHX, k_BSGX, lse_BTH = arrays
  batch, num_queries, index_heads, index_width = q_index_BTJI.shape
  num_heads = q_BTHX.shape[2]
  num_keys = k_BSGX.shape[1]
  per_head = k_BSGX.shape[2] != 1
  selected = len(valid) == 1
  # Sizes that tiles divide. Heads and columns of zeros change nothing.
  q_index_BTJI = _pad(_pad(q_index_BTJI, 2, INDEX_HEADS), 3, INDEX_WIDTH)
  w_index_BTJ = _pad(w_index_BTJ.astype(jnp.float32), 2, INDEX_HEADS)
  k_index_BSI = _pad(k_index_BSI, 2, INDEX_WIDTH)
  q_BTHX, k_BSGX = _pad(q_BTHX, 3, TILE), _pad(k_BSGX, 3, TILE)
  if not per_head:
    q_BTHX = _pad(q_BTHX, 2, 8)
    lse_BTH = _pad(lse_BTH, 2, 8, jnp.inf)
    k_BSGX = k_BSGX[:, :, 0]
  rows = (q_index_BTJI, w_index_BTJ, q_BTHX, lse_BTH, row_weight_BT)
  step = functools.partial(
    _block,
    scale=scale,
    mean_over=num_heads,
    config=config,
    target=target,
    head_axis=head_axis,
    with_gradients=with_gradients,
  )
  if selected:
    # One list of queries and one of keys.
    indices_BTK = _pad(valid[0], 2, TILE, -1)
    offset_B11 = num_keys * jnp.arange(batch, dtype=jnp.int32)[:, None, None]
    indices_BTK = jnp.where(indices_BTK < 0, -1, indices_BTK + offset_B11)
    rows = (*rows, indices_BTK)
    rows_N = (x.reshape(1, -1, *x.shape[2:]) for x in rows)
    keys = (k_index_BSI.reshape(-1, k_index_BSI.shape[2]),)
    keys += (k_BSGX.reshape(-1, k_BSGX.shape[2]),)
    keys_1 = tuple(x[None] for x in keys)
    columns = indices_BTK.shape[2]
  else:
    multiple = mosaic_target_heads.TILE if per_head else TILE
    keys_1 = tuple(_pad(x, 1, multiple) for x in (k_index_BSI, k_BSGX))
    rows_N = (*rows, *valid)
    columns = keys_1[0].shape[1]
  outputs, d_k = _over_blocks(
    step,
    tuple(rows_N),
    keys_1,
    largest=_largest_block(config, columns, selected),
    # Blocks of queries, or pairs of them.
    multiple=mosaic_target_heads.TILE if per_head else 2,
    with_gradients=with_gradients,
  )
  outputs = tuple(x.reshape(batch, num_queries, *x.shape[2:]) for x in outputs)
  if not with_gradients:
    return outputs[0], ()
  d_k = d_k[:, :num_keys] if not selected else d_k
  d_k_BSI = d_k.reshape(batch, num_keys, -1)[..., :index_width]
  kl_BT, d_q_BTJI, d_w_BTJ = outputs
  d_q_BTJI = d_q_BTJI[:, :, :index_heads, :index_width]
  return kl_BT, (d_q_BTJI, d_k_BSI, d_w_BTJ[:, :, :index_heads])


def _largest_block(config, columns, selected):
  elements = config.selected_elements if selected else config.block_elements
  return max(elements // columns, 512)


def _over_blocks(step, rows, keys, *, largest, multiple, with_gradients):
  """Runs `step` over blocks of queries, for each entry of the leading axis.

  Args:
    step: of (rows of a block, keys, key gradient so far); see `_block`.
    rows: [M, N, ...] each; padded with what makes a row invalid.
    keys: (k_index [M, S, I], k [M, S, ...]).
    largest: queries of a block at most, a multiple of `multiple`.
    multiple: what the queries of a block must be a multiple of.
    with_gradients: whether there is a key gradient.

  Returns:
    The outputs, [M, N, ...] each, and the key gradient [M, S, I].
  """
  num_queries = rows[0].shape[1]
  num_blocks = -(-num_queries // largest)
  queries = round_up(-(-num_queries // num_blocks), multiple)
  # Row weights are 0 in the padding, and indices -1: rows without keys.
  rows = tuple(
    _pad(x, 1, queries, -1 if x.dtype == jnp.int32 and x.ndim == 3 else 0)
    for x in rows
  )

  def entry(arrays):
    rows, keys = arrays
    blocks = tuple(x.reshape(-1, queries, *x.shape[1:]) for x in rows)
    d_k = jnp.zeros(keys[0].shape, jnp.float32) if with_gradients else ()
    d_k, outputs = _scan(lambda d_k, block: step(block, keys, d_k), d_k, blocks)
    outputs = tuple(x.reshape(-1, *x.shape[2:]) for x in outputs)
    return (), (tuple(x[:num_queries] for x in outputs), d_k)

  return _scan(lambda _, arrays: entry(arrays), (), (rows, keys))[1]


def _scan(function, carry, arrays):
  """`lax.scan`, without a loop if there is one entry only."""
  if jax.tree.leaves(arrays)[0].shape[0] > 1:
    return lax.scan(function, carry, arrays)
  carry, outputs = function(carry, jax.tree.map(lambda x: x[0], arrays))
  return carry, jax.tree.map(lambda x: x[None], outputs)


def _block(
  rows,
  keys,
  d_k,
  *,
  scale,
  mean_over,
  config,
  target,
  head_axis,
  with_gradients,
):
  """`d_k` with a block's added, and its divergence (and other gradients)."""
  q_index_PJI, w_PJ, q_PHX, lse_PH, weight_P, *valid = rows
  k_index_SI, k = keys
  selected = len(valid) == 1
  num_columns = valid[0].shape[1] if selected else k_index_SI.shape[0]
  shared = {'scale': scale, 'mean_over': mean_over, 'on': target}
  with jax.named_scope('indexer_kl_target'):
    if k.ndim == 3:
      p_PK = mosaic_target_heads.target(
        q_PHX, k, lse_PH, *valid, stages=config.heads_stages, **shared
      )
    else:
      p_PK = mosaic_target.target(
        q_PHX,
        k,
        lse_PH,
        *(valid if selected else (None,)),
        *((None, None) if selected else valid),
        blocks=config.target,
        num_columns=num_columns,
        **shared,
      )
    if head_axis is not None:
      p_PK = lax.pmean(p_PK, head_axis)
  with jax.named_scope('indexer_kl_scores'):
    scores_PK = mosaic_scores.scores(
      q_index_PJI,
      k_index_SI,
      w_PJ,
      tuple(valid),
      num_columns=num_columns,
      blocks=config.scores,
      on=target,
    )
  with jax.named_scope('indexer_kl_divergence'):
    valid_PK = _valid(valid, num_columns)
    kl_P, g_PK = divergence(scores_PK, p_PK, valid_PK, weight_P)
  if not with_gradients:
    return d_k, (kl_P,)
  with jax.named_scope('indexer_kl_gradients'):
    d_q_PJI, d_w_PJ, d_k = _gradients(
      q_index_PJI, k_index_SI, w_PJ, g_PK, valid, d_k, config, target
    )
  return d_k, (kl_P, d_q_PJI, d_w_PJ)


def _valid(valid, num_columns):
  if len(valid) == 1:
    return valid[0] >= 0
  start_P, end_P = valid
  column_1K = jnp.arange(num_columns, dtype=jnp.int32)[None]
  return (column_1K >= start_P[:, None]) & (column_1K < end_P[:, None])


def divergence(
  scores_PK: jax.Array,
  p_PK: jax.Array,
  valid_PK: jax.Array,
  weight_P: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """KL of each row, and weight * (softmax(scores) - p), 0 where not valid."""
  p_PK = jnp.where(valid_PK, p_PK, 0.0)
  log_total_P1 = jax.nn.logsumexp(
    scores_PK, axis=-1, keepdims=True, where=valid_PK
  )
  log_total_P1 = jnp.where(log_total_P1 == -jnp.inf, 0.0, log_total_P1)
  log_q_PK = jnp.where(valid_PK, scores_PK - log_total_P1, 0.0)
  log_p_PK = jnp.log(jnp.where(p_PK > 0, p_PK, 1.0))
  kl_P = jnp.sum(p_PK * (log_p_PK - log_q_PK), axis=-1)
  g_PK = weight_P[:, None] * (jnp.exp(log_q_PK) - p_PK)
  return kl_P, jnp.where(valid_PK, g_PK, 0.0)


def _gradients(q_PJI, k_SI, w_PJ, g_PK, valid, d_k, config, target):
  """d_q, d_w and the sum of d_k; the interpreter's summands are added here."""
  indices_PK, spans = (valid[0], ()) if len(valid) == 1 else (None, valid)
  summed = d_k
  if target.interprets:
    summed = jnp.zeros((*g_PK.shape, k_SI.shape[1]), jnp.float32)
  d_q_PJI, d_w_PJ, summed = mosaic_gradients.gradients(
    q_PJI,
    k_SI,
    w_PJ,
    g_PK,
    indices_PK,
    tuple(spans),
    summed,
    blocks=config.gradients,
    on=target,
  )
  if not target.interprets:
    return d_q_PJI, d_w_PJ, summed
  if indices_PK is None:
    return d_q_PJI, d_w_PJ, d_k + jnp.sum(summed, axis=0)
  rows = jnp.where(indices_PK < 0, k_SI.shape[0], indices_PK)
  return d_q_PJI, d_w_PJ, d_k.at[rows].add(summed, mode='drop')


def round_up(size, multiple):
  return -(-size // multiple) * multiple


def _pad(x, axis, multiple, value=0):
  missing = -x.shape[axis] % multiple
  if not missing:
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, missing)
  return jnp.pad(x, widths, constant_values=value)
