"""Ops, shapes and implementations that the benchmark can measure."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.benchmarks import costs

FORWARD, GRADIENTS = 'forward', 'gradients'
# A definition may take this much for its largest array; beyond that it is
# asked for the last queries (or first rows) only.
REFERENCE_BYTES = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Op:
  """One op of the benchmark.

  Attributes:
    name: as the table shows it.
    specs: named shapes.
    implementations: names, best first.
    directions: 'forward', and 'gradients' if there are any.
    cost: (spec, direction, bytes an element) -> `costs.Cost`.
    make: (spec, dtype, seed) -> arguments.
    call: (implementation, spec, *arguments) -> outputs.
    differentiable: positions of the arguments with gradients.
    sample: (spec, arguments, rows) -> arguments of the last (first) rows.
    rows: how many rows of outputs the spec has.
    reference_bytes: of the definition, a row.
    takes_last: whether `sample` takes the last rows.
    row_axis: axis of the outputs that holds the rows.
    is_selection: outputs are sets of indices.
    compared: which output the error is of; gradients are of the first.
  """

  name: str
  specs: Mapping[str, Any]
  implementations: Sequence[str]
  directions: Sequence[str]
  cost: Callable[[Any, str, int], costs.Cost]
  make: Callable[[Any, Any, int], tuple]
  call: Callable[..., Any]
  differentiable: Sequence[int] = ()
  sample: Callable[[Any, tuple, int], tuple]
  rows: Callable[[Any], int]
  reference_bytes: Callable[[Any], int]
  takes_last: bool = True
  row_axis: int = 1
  is_selection: bool = False
  compared: int = 0

  def function(self, implementation: str, spec: Any, direction: str):
    """The jitted function of the arguments that is timed."""
    forward = functools.partial(self.call, implementation, spec)
    if direction == FORWARD:
      return jax.jit(forward)

    def both(*arguments):
      def of(*some):
        whole = list(arguments)
        for i, x in zip(self.differentiable, some, strict=True):
          whole[i] = x
        return jax.tree.leaves(forward(*whole))[0]

      out, pullback = jax.vjp(of, *(arguments[i] for i in self.differentiable))
      return pullback(_cotangent(out))

    return jax.jit(both)


def _cotangent(out):
  """Deterministic, of unit size, and not constant."""
  flat = jnp.arange(out.size, dtype=jnp.uint32).reshape(out.shape)
  return jnp.cos((flat % 8191).astype(jnp.float32)).astype(out.dtype)


def error(op: Op, spec: Any, direction: str, arguments: tuple, outputs: Any):
  """Relative norm of the error against the definition in float32.

  For selections the share of rows with another set. None where the definition
  does not fit: gradients of large shapes.
  """
  rows = min(op.rows(spec), max(REFERENCE_BYTES // op.reference_bytes(spec), 1))
  is_whole = rows == op.rows(spec)
  if direction == GRADIENTS and not is_whole:
    return None
  some = arguments if is_whole else op.sample(spec, arguments, rows)
  some = jax.tree.map(_float32, some)
  desired = jax.tree.leaves(op.function('reference', spec, direction)(*some))
  actual = jax.tree.leaves(outputs)
  if direction == FORWARD:
    actual, desired = ([x[op.compared]] for x in (actual, desired))
  if not is_whole:
    part = slice(-rows, None) if op.takes_last else slice(0, rows)
    actual = [x[(slice(None),) * op.row_axis + (part,)] for x in actual]
  if op.is_selection:
    a, d = (np.sort(np.asarray(x[0])) for x in (actual, desired))
    return float(np.mean(np.any(a != d, axis=-1)))
  return max(_relative(a, d) for a, d in zip(actual, desired, strict=True))


def _float32(x):
  return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.inexact) else x


def _relative(actual, desired) -> float:
  actual, desired = jnp.float32(actual), jnp.float32(desired)
  finite = jnp.isfinite(desired)
  actual, desired = (jnp.where(finite, x, 0.0) for x in (actual, desired))
  norm = jnp.maximum(jnp.linalg.norm(desired.ravel()), 1e-30)
  return float(jnp.linalg.norm((actual - desired).ravel()) / norm)


def ops(dense_attention_xla: Callable[..., Any] | None = None) -> dict[str, Op]:
  """Every op by name.

  Args:
    dense_attention_xla: (q, k, v, *, scale) -> (out, lse), which lives above
      this package; without it dense attention has the kernels only.
  """
  return {
    op.name: op
    for op in (
      _lightning_indexer(),
      _select_topk(),
      _indexed_topk(),
      _sparse_mla_attention(),
      _indexer_kl(is_selected=False),
      _indexer_kl(is_selected=True),
      _grouped_matmul(),
      _dense_attention(dense_attention_xla),
    )
  }


def _normal(seed: int, dtype: Any, *shapes: tuple[int, ...]) -> list[jax.Array]:
  keys = jax.random.split(jax.random.key(seed), len(shapes))
  return [
    jax.random.normal(key, shape, dtype)
    for key, shape in zip(keys, shapes, strict=True)
  ]


def _module(folder: str, name: str):
  return importlib.import_module(f'pallas_kernels.{folder}.{name}')


def _op(folder: str, table: str = 'IMPLEMENTATIONS'):
  """(specs, implementations) of an op's folder."""
  implementations = getattr(_module(folder, 'api'), table)
  return {
    'specs': _module(folder, 'arg_specs').BENCHMARK_SPECS,
    'implementations': tuple(implementations),
  }


def _last(arguments: tuple, rows: int, *which: int) -> tuple:
  """Arguments with the last rows of those at `which`."""
  return tuple(
    x[:, -rows:] if i in which else x for i, x in enumerate(arguments)
  )


def _lightning_indexer() -> Op:
  api = _module('lightning_indexer', 'api')

  def make(spec, dtype, seed):
    return tuple(_normal(
      seed, dtype,
      (spec.batch, spec.queries, spec.heads, spec.dim),
      (spec.batch, spec.keys, spec.dim),
      (spec.batch, spec.queries, spec.heads),
    ))  # fmt: skip

  def call(implementation, spec, q, k, w):
    del spec
    return api.lightning_indexer(q, k, w, implementation=implementation)

  return Op(
    name='lightning_indexer',
    directions=(FORWARD, GRADIENTS),
    cost=costs.lightning_indexer,
    make=make,
    call=call,
    differentiable=(0, 1, 2),
    sample=lambda spec, arguments, rows: _last(arguments, rows, 0, 2),
    rows=lambda spec: spec.queries,
    reference_bytes=lambda spec: 4 * spec.batch * spec.heads * spec.keys,
    **_op('lightning_indexer'),
  )


def _select_topk() -> Op:
  api = _module('topk_selector', 'api')

  def make(spec, dtype, seed):
    del dtype  # Scores are float32 whatever the model's type.
    shape = (spec.indexer.batch, spec.indexer.queries, spec.indexer.keys)
    (scores_BTS,) = _normal(seed, jnp.float32, shape)
    query_T = jnp.arange(shape[1]) + shape[2] - shape[1]
    is_seen_TS = jnp.arange(shape[2])[None] <= query_T[:, None]
    return (jnp.where(is_seen_TS[None], scores_BTS, -jnp.inf),)

  def call(implementation, spec, scores):
    return api.select_topk(scores, k=spec.k, implementation=implementation)

  return Op(
    name='select_topk',
    directions=(FORWARD,),
    cost=lambda spec, direction, size: costs.select_topk(spec, direction, 4),
    make=make,
    call=call,
    sample=lambda spec, arguments, rows: _last(arguments, rows, 0),
    rows=lambda spec: spec.indexer.queries,
    reference_bytes=lambda spec: 16 * spec.indexer.batch * spec.indexer.keys,
    is_selection=True,
    **_op('topk_selector', 'SELECT_TOPK_IMPLEMENTATIONS'),
  )


def _indexed_topk() -> Op:
  api = _module('topk_selector', 'api')
  indexer = _lightning_indexer()

  def call(implementation, spec, q, k, w):
    return api.indexed_topk(q, k, w, k=spec.k, implementation=implementation)

  return Op(
    name='indexed_topk',
    directions=(FORWARD,),
    cost=costs.indexed_topk,
    make=lambda spec, dtype, seed: indexer.make(spec.indexer, dtype, seed),
    call=call,
    sample=lambda spec, arguments, rows: _last(arguments, rows, 0, 2),
    rows=lambda spec: spec.indexer.queries,
    reference_bytes=lambda spec: indexer.reference_bytes(spec.indexer),
    is_selection=True,
    **_op('topk_selector', 'INDEXED_TOPK_IMPLEMENTATIONS'),
  )


def _random_indices(seed: int, spec: Any) -> jax.Array:
  """Distinct causal keys of every query, -1 where there are fewer than k."""
  batch, queries, keys = spec.batch, spec.num_queries, spec.num_keys
  k = min(spec.topk, keys)

  def some(key_and_query):
    key, query_C = key_and_query
    scores = jax.random.uniform(key, (batch, query_C.shape[0], keys))
    seen = jnp.arange(keys)[None] <= query_C[:, None] + keys - queries
    scores, indices = jax.lax.top_k(jnp.where(seen[None], scores, -1.0), k)
    return jnp.where(scores < 0, -1, indices).astype(jnp.int32)

  chunk = next(c for c in range(min(queries, 128), 0, -1) if not queries % c)
  query_NC = jnp.arange(queries).reshape(-1, chunk)
  random = jax.random.split(jax.random.key(seed), query_NC.shape[0])
  indices = jax.jit(lambda x: jax.lax.map(some, x))((random, query_NC))
  indices = jnp.moveaxis(indices, 0, 1).reshape(batch, queries, k)
  missing = ((0, 0), (0, 0), (0, spec.topk - k))
  return jnp.pad(indices, missing, constant_values=-1)


def _log_sum_exp(spec: Any, q, k, indices):
  """Of the attention scores of each head over the causal or given keys.

  `indexer_kl` takes the target's normaliser for granted, so it must be right.
  """
  batch, queries = q.shape[:2]
  keys, group = spec.num_keys, spec.num_heads // spec.num_key_heads
  row_bytes = 4 * batch * spec.num_heads * keys
  chunk = next(
    c
    for c in range(queries, 0, -1)
    if not queries % c and (c == 1 or c * row_bytes <= 2**28)
  )

  def some(q, k, indices, first):
    part = jax.lax.dynamic_slice_in_dim(q, first, chunk, 1)
    part = part.reshape(batch, chunk, spec.num_key_heads, group, -1)
    scores = spec.scale * jnp.einsum(
      'btghx,bsgx->btghs', part, k, preferred_element_type=jnp.float32
    )
    if indices is None:
      query_C = first + jnp.arange(chunk) + keys - queries
      is_seen = (jnp.arange(keys)[None] <= query_C[:, None])[None]
    else:
      chosen = jax.lax.dynamic_slice_in_dim(indices, first, chunk, 1)
      b, t, _ = jnp.indices(chosen.shape)
      is_seen = jnp.zeros((batch, chunk, keys), bool)
      is_seen = is_seen.at[b, t, jnp.where(chosen < 0, keys, chosen)].set(
        True, mode='drop'
      )
    scores = jnp.where(is_seen[:, :, None, None], scores, -jnp.inf)
    return jax.nn.logsumexp(scores, axis=-1).reshape(batch, chunk, -1)

  @jax.jit
  def every(q, k, indices):
    firsts = jnp.arange(0, queries, chunk)
    return jax.lax.map(functools.partial(some, q, k, indices), firsts)

  lse = every(q, k, indices)
  return jnp.moveaxis(lse, 0, 1).reshape(batch, queries, -1)


def _sparse_mla_attention() -> Op:
  api = _module('sparse_mla_attention', 'api')

  def make(spec, dtype, seed):
    width = spec.latent_dim + spec.rope_dim
    q, kv = _normal(
      seed, dtype,
      (spec.batch, spec.num_queries, spec.num_heads, width),
      (spec.batch, spec.num_keys, width),
    )  # fmt: skip
    return q, kv, _random_indices(seed, spec)

  def call(implementation, spec, q, kv, indices):
    result = api.sparse_mla_attention(
      q,
      kv,
      indices,
      latent_dim=spec.latent_dim,
      scale=spec.scale,
      implementation=implementation,
    )
    return result.out_BTHC, result.lse_BTH

  return Op(
    name='sparse_mla_attention',
    directions=(FORWARD, GRADIENTS),
    cost=costs.sparse_mla_attention,
    make=make,
    call=call,
    differentiable=(0, 1),
    sample=lambda spec, arguments, rows: _last(arguments, rows, 0, 2),
    rows=lambda spec: spec.num_queries,
    reference_bytes=lambda spec: (
      4
      * spec.batch
      * (
        spec.num_heads * max(spec.topk, spec.num_keys)
        + spec.topk * (spec.latent_dim + spec.rope_dim)
      )
    ),
    **_op('sparse_mla_attention'),
  )


def _indexer_kl(*, is_selected: bool) -> Op:
  api = _module('indexer_kl', 'api')

  def make(spec, dtype, seed):
    q_index, k_index, w_index, q, k = _normal(
      seed, dtype,
      (spec.batch, spec.num_queries, spec.index_heads, spec.index_dim),
      (spec.batch, spec.num_keys, spec.index_dim),
      (spec.batch, spec.num_queries, spec.index_heads),
      (spec.batch, spec.num_queries, spec.num_heads, spec.width),
      (spec.batch, spec.num_keys, spec.num_key_heads, spec.width),
    )  # fmt: skip
    indices = _random_indices(seed, spec) if is_selected else None
    lse = _log_sum_exp(spec, q, k, indices)
    shape = (spec.batch, spec.num_queries)
    weight = jnp.full(shape, 1 / (shape[0] * shape[1]), jnp.float32)
    arguments = (q_index, k_index, w_index, q, k, lse, weight)
    return arguments if indices is None else (*arguments, indices)

  def call(implementation, spec, *arguments):
    selection = {'indices_BTK': arguments[7]} if is_selected else {}
    output = api.indexer_kl(
      *arguments[:7],
      scale=spec.scale,
      implementation=implementation,
      **selection,
    )
    return output.loss, output.kl_BT

  def sample(spec, arguments, rows):
    return _last(arguments, rows, 0, 2, 3, 5, 6, 7)

  return Op(
    name='indexer_kl_selected' if is_selected else 'indexer_kl_all',
    directions=(FORWARD, GRADIENTS),
    cost=functools.partial(costs.indexer_kl, is_selected=is_selected),
    make=make,
    call=call,
    compared=1,
    differentiable=(0, 1, 2),
    sample=sample,
    rows=lambda spec: spec.num_queries,
    reference_bytes=lambda spec: (
      4 * spec.batch * max(spec.num_heads, spec.index_heads) * spec.num_keys
    ),
    **_op('indexer_kl'),
  )


def _grouped_matmul() -> Op:
  api = _module('grouped_matmul', 'api')

  def make(spec, dtype, seed):
    x, w = _normal(
      seed, dtype,
      (spec.num_rows, spec.input_dim),
      (spec.num_experts, spec.input_dim, spec.output_dim),
    )  # fmt: skip
    even = np.full(spec.num_experts, 1 / spec.num_experts)
    sizes = np.random.default_rng(seed).multinomial(spec.num_rows, even)
    return x, w, jnp.asarray(sizes, jnp.int32)

  def call(implementation, spec, x, w, sizes):
    del spec
    return api.grouped_matmul(x, w, sizes, implementation=implementation)

  def sample(spec, arguments, rows):
    x, w, sizes = arguments
    end = np.cumsum(np.asarray(sizes))
    start = end - np.asarray(sizes)
    experts = int(np.searchsorted(end, rows)) + 1
    first = np.clip(rows - start[:experts], 0, np.asarray(sizes)[:experts])
    return x[:rows], w[:experts], jnp.asarray(first, jnp.int32)

  return Op(
    name='grouped_matmul',
    directions=(FORWARD, GRADIENTS),
    cost=costs.grouped_matmul,
    make=make,
    call=call,
    differentiable=(0, 1),
    sample=sample,
    rows=lambda spec: spec.num_rows,
    reference_bytes=lambda spec: 4 * spec.num_experts * spec.input_dim,
    takes_last=False,
    row_axis=0,
    **_op('grouped_matmul'),
  )


def _dense_attention(xla: Callable[..., Any] | None) -> Op:
  kernel = _module('dense_attention', 'pallas_mosaic_gpu')

  def mosaic_gpu(q, k, v, scale):
    shape = q.shape[:2]
    end = jnp.arange(shape[1], dtype=jnp.int32) + 1 + k.shape[1] - shape[1]
    start_BT = jnp.zeros(shape, jnp.int32)
    end_BT = jnp.broadcast_to(end, shape)
    return kernel.dense_attention(q, k, v, start_BT, end_BT, scale=scale)

  def cudnn(q, k, v, scale):
    if jax.default_backend() != 'gpu':
      raise NotImplementedError('cuDNN runs on GPUs')
    # Values as wide as keys: the public function knows one width only.
    missing = q.shape[3] - v.shape[3]
    wide = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, missing)))
    out = jax.nn.dot_product_attention(
      q, k, wide, scale=scale, is_causal=True, implementation='cudnn'
    )
    return (out[..., : v.shape[3]],)

  def reference(q, k, v, scale):
    scores = jnp.einsum('bthx,bshx->bhts', q, k, precision='highest') * scale
    offset = k.shape[1] - q.shape[1]
    is_seen = jnp.tril(jnp.ones(scores.shape[2:], bool), offset)
    p = jax.nn.softmax(jnp.where(is_seen[None, None], scores, -jnp.inf))
    return (jnp.einsum('bhts,bshu->bthu', p, v, precision='highest'),)

  table: dict[str, Callable[..., Any]] = {
    'mosaic_gpu': mosaic_gpu,
    'cudnn': cudnn,
    'reference': reference,
  }
  if xla is not None:
    table['xla'] = lambda q, k, v, scale: xla(q, k, v, scale=scale)

  def make(spec, dtype, seed):
    queries = (spec.batch, spec.num_queries, spec.num_heads)
    keys = (spec.batch, spec.num_keys, spec.num_heads)
    return tuple(_normal(
      seed, dtype,
      (*queries, spec.width),
      (*keys, spec.width),
      (*keys, spec.value_width),
    ))  # fmt: skip

  return Op(
    name='dense_attention',
    specs=_module('dense_attention', 'arg_specs').BENCHMARK_SPECS,
    implementations=tuple(table),
    directions=(FORWARD, GRADIENTS),
    cost=costs.dense_attention,
    make=make,
    call=lambda implementation, spec, *x: table[implementation](*x, spec.scale),
    differentiable=(0, 1, 2),
    sample=lambda spec, arguments, rows: _last(arguments, rows, 0),
    rows=lambda spec: spec.num_queries,
    reference_bytes=lambda spec: (
      4 * spec.batch * spec.num_heads * spec.num_keys
    ),
  )
