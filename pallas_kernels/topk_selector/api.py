"""Public signatures of the token selection: shapes, errors, dispatch.

Letters: B batch, T query tokens, S key tokens, J indexer heads, I index head
dim, K selected tokens.

The rule, the same for every function and implementation here: the selected
set holds the k highest scores of a query; among equal scores the lowest index
wins; -inf and NaN are never selected; -0.0 equals +0.0. Scores are exactly 0
wherever no head product is positive, so ties are common, and the rule is what
makes training, decode and every backend select the same set
(arXiv:2512.02556, Eq. 2 leaves it open).
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels import dispatch
from pallas_kernels.lightning_indexer import api as lightning_indexer_api
from pallas_kernels.topk_selector import (
  jax_triton,
  pallas_mosaic_gpu,
  reference,
  xla,
)
from pallas_kernels.topk_selector.selection import Selection

# Best first. A device kernel is one file more, and one line here.
SELECT_TOPK_IMPLEMENTATIONS = {
  'mosaic_gpu': pallas_mosaic_gpu.select_topk,
  'triton': jax_triton.select_topk,
  'xla': xla.select_topk,
  'reference': reference.select_topk,
}
INDEXED_TOPK_IMPLEMENTATIONS = {
  'mosaic_gpu': pallas_mosaic_gpu.indexed_topk,
  'triton': jax_triton.indexed_topk,
  'xla': xla.indexed_topk,
  'reference': reference.indexed_topk,
}
_SELECTION_MASK_IMPLEMENTATIONS = {
  'mosaic_gpu': pallas_mosaic_gpu.selection_mask,
  'xla': xla.selection_mask,
}


def select_topk(
  scores_BTS: Float[Array, 'B T S'],
  *,
  k: int,
  implementation: dispatch.Implementation = None,
) -> Selection:
  """The k keys of highest score of each query (arXiv:2512.02556, Eq. 2).

  Not differentiable: the scores get no gradient.

  Example:
    >>> selected = select_topk(scores_BTS, k=64)
    >>> selected.indices_BTK, selected.valid_BTK

  Args:
    scores_BTS: float32 or bfloat16; -inf and NaN are never selected.
    k: width of the result, at least 1; may exceed S.
    implementation: see `pallas_kernels.dispatch`.

  Returns:
    Selection with indices_BTK [B, T, k], -1 where fewer than k keys are valid.

  Raises:
    ValueError: k below 1, or scores of another dtype or rank.
  """
  _check_k(k)
  _check_scores(scores_BTS)
  return dispatch.call(
    'select_topk',
    SELECT_TOPK_IMPLEMENTATIONS,
    implementation,
    scores_BTS,
    k=k,
  )


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
  implementation: dispatch.Implementation = None,
) -> Selection:
  """`select_topk(lightning_indexer(...))` without the [B, T, S] scores.

  Scores and selects a block of queries at a time, over the keys that the block
  can see; memory grows linearly in T. Not differentiable.

  Example:
    >>> selected = indexed_topk(q_BTJI, k_BSI, w_BTJ, k=64)

  Over a pool of pages of quantised keys, as decoding has them:

    >>> values, scale = quantize_index_keys(pool_PpI)
    >>> selected = indexed_topk(
    ...   q_BTJI,
    ...   values,
    ...   w_BTJ,
    ...   k=64,
    ...   k_scale_BS=scale,
    ...   pages_BN=pages_BN,
    ...   key_start_BT=start_BT,
    ...   key_end_BT=end_BT,
    ... )

  Args:
    q_index_BTJI: see `lightning_indexer`.
    k_index_BSI: see `lightning_indexer`.
    w_index_BTJ: see `lightning_indexer`.
    k: width of the result, at least 1; may exceed S.
    key_start_BT: int32, first valid key of each query.
    key_end_BT: int32, one past the last. None for both: causal, aligned at the
      end.
    k_scale_BS: see `lightning_indexer`.
    pages_BN: see `lightning_indexer`; the indices count keys in the order of
      the row, s = 0 .. N * page - 1 (`physical_indices` makes rows of the pool
      of them).
    scale_format: see `lightning_indexer`.
    implementation: see `pallas_kernels.dispatch`.

  Returns:
    Selection with indices_BTK [B, T, k], -1 where fewer than k keys are valid.

  Raises:
    ValueError: k below 1, or arguments that don't fit together.
  """
  _check_k(k)
  lightning_indexer_api.check_arguments(
    q_index_BTJI,
    k_index_BSI,
    w_index_BTJ,
    k_scale_BS=k_scale_BS,
    pages_BN=pages_BN,
    scale_format=scale_format,
  )
  return dispatch.call(
    'indexed_topk',
    INDEXED_TOPK_IMPLEMENTATIONS,
    implementation,
    q_index_BTJI,
    k_index_BSI,
    w_index_BTJ,
    k=k,
    key_start_BT=key_start_BT,
    key_end_BT=key_end_BT,
    k_scale_BS=k_scale_BS,
    pages_BN=pages_BN,
    scale_format=scale_format,
  )


def selection_mask(
  scores_BTS: Float[Array, 'B T S'], *, k: int
) -> Bool[Array, 'B T S']:
  """The set of `select_topk` as a mask, without making indices.

  Cheaper than indices where the consumer wants a mask over a block of keys.

  Raises:
    ValueError: k below 1, or scores of another dtype or rank.
  """
  _check_k(k)
  _check_scores(scores_BTS)
  return dispatch.call(
    'selection_mask', _SELECTION_MASK_IMPLEMENTATIONS, None, scores_BTS, k=k
  )


def indices_to_mask(
  indices_BTK: Int32[Array, 'B T K'], num_keys: int
) -> Bool[Array, 'B T S']:
  """Mask [B, T, num_keys] of the keys that `indices_BTK` names; -1 is none."""
  B, T, _ = indices_BTK.shape
  b = lax.broadcasted_iota(jnp.int32, indices_BTK.shape, 0)
  t = lax.broadcasted_iota(jnp.int32, indices_BTK.shape, 1)
  # A negative index would count from the end; one past the end is dropped.
  s = jnp.where(indices_BTK < 0, num_keys, indices_BTK)
  empty_BTS = jnp.zeros((B, T, num_keys), jnp.bool_)
  return empty_BTS.at[b, t, s].set(True, mode='drop')


def _check_k(k: int) -> None:
  if k < 1:
    raise ValueError(f'k is {k}; expected at least 1')


def _check_scores(scores_BTS: Array) -> None:
  if scores_BTS.ndim != 3 or scores_BTS.dtype not in (
    jnp.float32,
    jnp.bfloat16,
  ):
    raise ValueError(
      f'scores_BTS is {scores_BTS.dtype}{list(scores_BTS.shape)}; expected '
      'float32 or bfloat16 [B, T, S]'
    )
