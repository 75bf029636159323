"""Which keys a query may see, as one range of keys a query.

Causality, packed documents, padding, caches and chunked prefill all give a
half-open range: key s is valid for query t iff start[b, t] <= s < end[b, t].
Packed documents are contiguous, so this is enough, and an op can skip the
blocks outside a range. A query with start == end has no valid key.

Letters: B batch, T query tokens, S key tokens.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int


def key_ranges(
  segment_ids_BT: Int[Array, 'B T'],
) -> tuple[Int[Array, 'B T'], Int[Array, 'B T']]:
  """Causal ranges within packed documents.

  Args:
    segment_ids_BT: one id a document, its tokens contiguous; 0 is padding. Two
      documents side by side must differ in id.

  Returns:
    (start_BT, end_BT), int32: from the first token of the query's document to
    the query itself. Padding has the empty range (0, 0).

  Example:
    >>> start, end = key_ranges(jnp.array([[1, 1, 2, 0]]))
    >>> start.tolist(), end.tolist()
    ([[0, 0, 2, 0]], [[1, 2, 3, 0]])
  """
  tokens_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
  tokens_BT = jnp.broadcast_to(tokens_T, segment_ids_BT.shape)
  changes_BT = jnp.pad(
    segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1],
    ((0, 0), (1, 0)),
    constant_values=True,
  )
  start_BT = lax.cummax(jnp.where(changes_BT, tokens_BT, 0), axis=1)
  real_BT = segment_ids_BT != 0
  return (
    jnp.where(real_BT, start_BT, 0),
    jnp.where(real_BT, tokens_BT + 1, 0),
  )


def causal_ranges(
  batch: int, num_queries: int, num_keys: int
) -> tuple[Int[Array, 'B T'], Int[Array, 'B T']]:
  """Causal ranges of one document, queries aligned with the last keys.

  What every op takes None for. Query t sees keys 0 to t + S - T.

  Args:
    batch: B.
    num_queries: T.
    num_keys: S.
  """
  end_T = jnp.arange(num_queries, dtype=jnp.int32) + 1 + num_keys - num_queries
  end_BT = jnp.broadcast_to(jnp.maximum(end_T, 0), (batch, num_queries))
  return jnp.zeros_like(end_BT), end_BT


def cached_ranges(
  positions_BT: Int[Array, 'B T'],
  *,
  start_B: Int[Array, 'B'] | None = None,
) -> tuple[Int[Array, 'B T'], Int[Array, 'B T']]:
  """Ranges of queries against a cache whose slot s holds the token at s.

  For decoding (T = 1) and chunked prefill: the query's own entry is in the
  cache already, later slots may hold anything.

  Args:
    positions_BT: slot of each query; negative is padding.
    start_B: first slot in use of each sequence (left padding); None means 0.

  Returns:
    (start_BT, end_BT), int32; empty for padding.
  """
  end_BT = jnp.maximum(positions_BT.astype(jnp.int32) + 1, 0)
  start_BT = jnp.zeros_like(end_BT)
  if start_B is not None:
    start_BT = jnp.minimum(start_B.astype(jnp.int32)[:, None], end_BT)
  return start_BT, end_BT


def valid_rows(
  key_start_BT: Int[Array, 'B T'], key_end_BT: Int[Array, 'B T']
) -> Bool[Array, 'B T']:
  """True where a query has at least one valid key."""
  return key_start_BT < key_end_BT


def valid_counts(
  key_start_BT: Int[Array, 'B T'], key_end_BT: Int[Array, 'B T']
) -> Int[Array, 'B T']:
  """Number of valid keys of each query."""
  return jnp.maximum(key_end_BT - key_start_BT, 0)


def range_mask(
  key_start_BT: Int[Array, 'B T'],
  key_end_BT: Int[Array, 'B T'],
  *,
  num_keys: int,
) -> Bool[Array, 'B T S']:
  """The ranges as a boolean mask; for oracles and metrics at small sizes."""
  keys_11S = jnp.arange(num_keys, dtype=jnp.int32)[None, None]
  mask_BTS = keys_11S >= key_start_BT[..., None]
  return mask_BTS & (keys_11S < key_end_BT[..., None])
