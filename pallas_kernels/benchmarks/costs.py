"""Work of an op: FLOPs, and the bytes that have to move at least once.

Both are of the definition, not of an implementation: a product of [m, k] and
[k, n] is 2 m k n, causal pairs count and masked ones don't, every input is
read once and every output written once, and of keys that are selected those
that some query selects. Directions: 'forward'; 'backward', the pullback alone,
which computes scores again that the forward pass didn't keep; 'gradients',
both together.
"""

import dataclasses
from typing import Any

import numpy as np

FORWARD, BACKWARD, GRADIENTS = 'forward', 'backward', 'gradients'
DIRECTIONS = (FORWARD, BACKWARD, GRADIENTS)


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
  """Work of one call.

  Attributes:
    flops: of products; 0 for an op without.
    bytes: read and written.
    rate: how many times as fast as bfloat16's the tensor cores do these
      products: 2 for float8.
  """

  flops: int
  bytes: int
  rate: int = 1

  def __add__(self, other: 'Cost') -> 'Cost':
    return Cost(self.flops + other.flops, self.bytes + other.bytes, self.rate)


def causal_pairs(num_queries: int, num_keys: int) -> int:
  """Query-key pairs, queries aligned with the last keys."""
  return limited_pairs(num_queries, num_keys, num_keys)


def limited_pairs(num_queries: int, num_keys: int, k: int) -> int:
  """The same with at most k keys a query."""
  seen = np.arange(num_keys - num_queries, num_keys, dtype=np.int64) + 1
  return int(np.clip(seen, 0, k).sum())


def selected_pairs(spec: Any) -> int:
  """Pairs of a selection, in all entries of the batch."""
  if spec.sees_all_keys:
    return spec.batch * spec.num_queries * min(spec.topk, spec.num_keys)
  return spec.batch * limited_pairs(spec.num_queries, spec.num_keys, spec.topk)


def selected_keys(spec: Any) -> int:
  """Keys that some query of random selections selects, in the whole batch."""
  missed = 1 - min(spec.topk, spec.num_keys) / spec.num_keys
  return round(spec.batch * spec.num_keys * (1 - missed**spec.num_queries))


def lightning_indexer(spec: Any, direction: str, size: int) -> Cost:
  """Scores of all pairs in float32; `size` bytes an element of the inputs."""
  pairs = spec.batch * causal_pairs(spec.queries, spec.keys)
  product = 2 * pairs * spec.heads * spec.dim
  scores = 4 * spec.batch * spec.queries * spec.keys
  inputs = _indexer_inputs(spec.queries, spec.keys, spec.heads, spec.dim)
  inputs *= size * spec.batch
  return _total(
    direction,
    Cost(product, inputs + scores),
    Cost(3 * product, 2 * inputs + scores),
  )


def lightning_indexer_fp8(spec: Any, direction: str, size: int) -> Cost:
  """Scores from float8 q and k, float32 w and a float32 scale a key."""
  del size
  bfloat16 = lightning_indexer(spec, direction, 0)
  rows, keys = spec.batch * spec.queries, spec.batch * spec.keys
  inputs = rows * spec.heads * (spec.dim + 4) + keys * (spec.dim + 4)
  return Cost(bfloat16.flops, bfloat16.bytes + inputs, rate=2)


def select_topk(spec: Any, direction: str, size: int) -> Cost:
  """One read of the scores, one write of the indices; no products."""
  del direction
  rows = spec.indexer.batch * spec.indexer.queries
  return Cost(0, rows * (size * spec.indexer.keys + 4 * spec.k))


def indexed_topk(spec: Any, direction: str, size: int) -> Cost:
  """The indexer's products; scores need not reach memory."""
  indexer = spec.indexer
  scored = lightning_indexer(indexer, FORWARD, size)
  rows = indexer.batch * indexer.queries
  del direction
  return Cost(
    scored.flops, scored.bytes + 4 * rows * spec.k - 4 * rows * indexer.keys
  )


def sparse_mla_attention(spec: Any, direction: str, size: int) -> Cost:
  """Scores and values over the selected keys of every head."""
  width = spec.latent_dim + spec.rope_dim
  pairs = selected_pairs(spec) * spec.num_heads
  rows = spec.batch * spec.num_queries
  q, kv = rows * spec.num_heads * width, selected_keys(spec) * width
  d_kv = spec.batch * spec.num_keys * width
  out = rows * spec.num_heads * spec.latent_dim
  indices, lse = 4 * rows * spec.topk, 4 * rows * spec.num_heads
  return _total(
    direction,
    Cost(
      2 * pairs * (width + spec.latent_dim),
      size * (q + kv + out) + indices + lse,
    ),
    Cost(
      2 * pairs * (3 * width + 2 * spec.latent_dim),
      size * (2 * q + kv + d_kv + 2 * out) + indices + lse,
    ),
  )


def sparse_mla_attention_fp8(
  spec: Any, direction: str, size: int, *, row_bytes: int
) -> Cost:
  """The forward pass over rows of so many bytes; products in bfloat16."""
  plain = sparse_mla_attention(spec, direction, size)
  width = spec.latent_dim + spec.rope_dim
  fewer = selected_keys(spec) * (size * width - row_bytes)
  return Cost(plain.flops, plain.bytes - fewer)


def indexer_kl(
  spec: Any, direction: str, size: int, *, is_selected: bool
) -> Cost:
  """Target of all heads and scores of the indexer, over one set of keys.

  The forward pass of a differentiated call computes the gradients too, so that
  there is no backward pass to count by itself.
  """
  target, scores = _kl_products(spec, is_selected)
  indexer, attention = _kl_inputs(spec, size)
  rows = spec.batch * spec.num_queries
  bytes_read = indexer + attention + 4 * rows * spec.num_heads
  bytes_read += 4 * rows * spec.topk if is_selected else 0
  if direction == FORWARD:
    return Cost(target + scores, bytes_read)
  return Cost(target + 3 * scores, bytes_read + indexer)


def indexer_target(
  spec: Any, direction: str, size: int, *, is_selected: bool
) -> Cost:
  """A target that is written; with a selection, scores, KL and gradient too.

  Then not the target is written but the gradient with respect to the scores,
  of the same shape, and the divergence.
  """
  del direction
  target, scores = _kl_products(spec, is_selected)
  indexer, attention = _kl_inputs(spec, size)
  rows = spec.batch * spec.num_queries
  lse, weight_and_kl = 4 * rows * spec.num_heads, 2 * 4 * rows
  if not is_selected:
    return Cost(target, attention + lse + 4 * _kl_pairs(spec, False))
  return Cost(
    target + scores,
    indexer + attention + lse + weight_and_kl + 2 * 4 * rows * spec.topk,
  )


def indexer_gradients(spec: Any, direction: str, size: int) -> Cost:
  """Gradients of q (size), k and w (float32) from those of selected scores."""
  del direction
  _, scores = _kl_products(spec, True)
  indexer, _ = _kl_inputs(spec, size)
  rows = spec.batch * spec.num_queries
  outputs = size * rows * spec.index_heads * spec.index_dim
  outputs += 4 * rows * spec.index_heads
  outputs += 4 * spec.batch * spec.num_keys * spec.index_dim
  return Cost(3 * scores, indexer + outputs + 2 * 4 * rows * spec.topk)


def _kl_products(spec: Any, is_selected: bool) -> tuple[int, int]:
  """FLOPs of the target of every head, and of the indexer's scores."""
  pairs = _kl_pairs(spec, is_selected)
  return (
    2 * pairs * spec.num_heads * spec.width,
    2 * pairs * spec.index_heads * spec.index_dim,
  )


def _kl_pairs(spec: Any, is_selected: bool) -> int:
  if is_selected:
    return selected_pairs(spec)
  return spec.batch * causal_pairs(spec.num_queries, spec.num_keys)


def _kl_inputs(spec: Any, size: int) -> tuple[int, int]:
  """Bytes of the indexer's q, k and w, and of the main attention's q and k."""
  rows, keys = spec.batch * spec.num_queries, spec.batch * spec.num_keys
  indexer = spec.batch * _indexer_inputs(
    spec.num_queries, spec.num_keys, spec.index_heads, spec.index_dim
  )
  attention = spec.width * (rows * spec.num_heads + keys * spec.num_key_heads)
  return size * indexer, size * attention


def grouped_matmul(spec: Any, direction: str, size: int) -> Cost:
  """One product a row; two for the gradients."""
  product = 2 * spec.num_rows * spec.input_dim * spec.output_dim
  x = spec.num_rows * spec.input_dim
  y = spec.num_rows * spec.output_dim
  w = spec.num_experts * spec.input_dim * spec.output_dim
  return _total(
    direction,
    Cost(product, size * (x + w + y)),
    Cost(2 * product, size * (2 * x + 2 * w + y)),
  )


def dense_attention(spec: Any, direction: str, size: int) -> Cost:
  """Causal attention with a key a head."""
  pairs = spec.batch * causal_pairs(spec.num_queries, spec.num_keys)
  pairs *= spec.num_heads
  widths = spec.width + spec.value_width
  queries = spec.batch * spec.num_queries * spec.num_heads * widths
  keys = spec.batch * spec.num_keys * spec.num_heads * widths
  return _total(
    direction,
    Cost(2 * pairs * widths, size * (queries + keys)),
    Cost(
      2 * pairs * (3 * spec.width + 2 * spec.value_width),
      size * 2 * (queries + keys),
    ),
  )


def _total(direction: str, forward: Cost, backward: Cost) -> Cost:
  return {
    FORWARD: forward,
    BACKWARD: backward,
    GRADIENTS: forward + backward,
  }[direction]


def _indexer_inputs(queries: int, keys: int, heads: int, dim: int) -> int:
  """Elements of q, k and w."""
  return queries * heads * dim + keys * dim + queries * heads
