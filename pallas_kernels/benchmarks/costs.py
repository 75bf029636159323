"""Work of an op: FLOPs, and the bytes that have to move at least once.

Both are of the definition, not of an implementation: a product of [m, k] and
[k, n] is 2 m k n, causal pairs count and masked ones don't, every input is
read once and every output written once. Gradients recompute what the forward
pass didn't keep; `gradients` counts forward and backward together.
"""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
  """Work of one call.

  Attributes:
    flops: of products; 0 for an op without.
    bytes: read and written.
  """

  flops: int
  bytes: int


def causal_pairs(num_queries: int, num_keys: int) -> int:
  """Query-key pairs, queries aligned with the last keys."""
  return limited_pairs(num_queries, num_keys, num_keys)


def limited_pairs(num_queries: int, num_keys: int, k: int) -> int:
  """The same with at most k keys a query."""
  seen = np.arange(num_keys - num_queries, num_keys, dtype=np.int64) + 1
  return int(np.clip(seen, 0, k).sum())


def lightning_indexer(spec: Any, direction: str, size: int) -> Cost:
  """Scores of all pairs in float32; `size` bytes an element of the inputs."""
  pairs = spec.batch * causal_pairs(spec.queries, spec.keys)
  product = 2 * pairs * spec.heads * spec.dim
  scores = 4 * spec.batch * spec.queries * spec.keys
  inputs = (
    size
    * spec.batch
    * _indexer_inputs(spec.queries, spec.keys, spec.heads, spec.dim)
  )
  if direction == 'forward':
    return Cost(product, inputs + scores)
  return Cost(4 * product, 3 * inputs + 2 * scores)


def select_topk(spec: Any, direction: str, size: int) -> Cost:
  """One read of the scores, one write of the indices; no products."""
  del direction
  rows = spec.indexer.batch * spec.indexer.queries
  return Cost(0, rows * (size * spec.indexer.keys + 4 * spec.k))


def indexed_topk(spec: Any, direction: str, size: int) -> Cost:
  """The indexer's products; scores need not reach memory."""
  indexer = spec.indexer
  scored = lightning_indexer(indexer, 'forward', size)
  rows = indexer.batch * indexer.queries
  del direction
  return Cost(
    scored.flops, scored.bytes + 4 * rows * spec.k - 4 * rows * indexer.keys
  )


def sparse_mla_attention(spec: Any, direction: str, size: int) -> Cost:
  """Scores and values over the selected keys of every head."""
  width = spec.latent_dim + spec.rope_dim
  pairs = spec.batch * limited_pairs(spec.num_queries, spec.num_keys, spec.topk)
  rows = spec.batch * spec.num_queries
  q, kv = rows * spec.num_heads * width, spec.batch * spec.num_keys * width
  out = rows * spec.num_heads * spec.latent_dim
  indices = 4 * rows * spec.topk
  forward = 2 * pairs * spec.num_heads * (width + spec.latent_dim)
  if direction == 'forward':
    return Cost(forward, size * (q + kv + out) + indices)
  backward = 2 * pairs * spec.num_heads * (3 * width + 2 * spec.latent_dim)
  return Cost(
    forward + backward, size * (3 * q + 3 * kv + 3 * out) + 2 * indices
  )


def indexer_kl(
  spec: Any, direction: str, size: int, *, is_selected: bool
) -> Cost:
  """Target of all heads and scores of the indexer, over one set of keys."""
  limit = spec.topk if is_selected else spec.num_keys
  pairs = spec.batch * limited_pairs(spec.num_queries, spec.num_keys, limit)
  target = 2 * pairs * spec.num_heads * spec.width
  scores = 2 * pairs * spec.index_heads * spec.index_dim
  rows = spec.batch * spec.num_queries
  indexer = spec.batch * _indexer_inputs(
    spec.num_queries, spec.num_keys, spec.index_heads, spec.index_dim
  )
  attention = spec.width * (
    rows * spec.num_heads + spec.batch * spec.num_keys * spec.num_key_heads
  )
  bytes_read = size * (indexer + attention) + 4 * rows * spec.num_heads
  bytes_read += 4 * rows * spec.topk if is_selected else 0
  if direction == 'forward':
    return Cost(target + scores, bytes_read)
  return Cost(target + 3 * scores, bytes_read + size * indexer)


def grouped_matmul(spec: Any, direction: str, size: int) -> Cost:
  """One product a row; forward, and two more for the gradients."""
  product = 2 * spec.num_rows * spec.input_dim * spec.output_dim
  x = spec.num_rows * spec.input_dim
  y = spec.num_rows * spec.output_dim
  w = spec.num_experts * spec.input_dim * spec.output_dim
  if direction == 'forward':
    return Cost(product, size * (x + w + y))
  return Cost(3 * product, size * 3 * (x + w + y))


def dense_attention(spec: Any, direction: str, size: int) -> Cost:
  """Causal attention with a key a head."""
  pairs = spec.batch * causal_pairs(spec.num_queries, spec.num_keys)
  widths = spec.width + spec.value_width
  queries = spec.batch * spec.num_queries * spec.num_heads * widths
  keys = spec.batch * spec.num_keys * spec.num_heads * widths
  forward = 2 * pairs * spec.num_heads * widths
  if direction == 'forward':
    return Cost(forward, size * (queries + keys))
  backward = (
    2 * pairs * spec.num_heads * (3 * spec.width + 2 * spec.value_width)
  )
  return Cost(forward + backward, size * 3 * (queries + keys))


def _indexer_inputs(queries: int, keys: int, heads: int, dim: int) -> int:
  """Elements of q, k and w."""
  return queries * heads * dim + keys * dim + queries * heads
