"""Index scores and token selection, as the benchmark measures them."""

from typing import Any

import jax.numpy as jnp

from pallas_kernels.benchmarks import costs, inputs
from pallas_kernels.benchmarks.costs import DIRECTIONS, FORWARD
from pallas_kernels.benchmarks.op import Op

FP8 = jnp.float8_e4m3fn


def lightning_indexer() -> Op:
  api = inputs.module('lightning_indexer', 'api')

  def call(implementation, spec, q, k, w):
    del spec
    return api.lightning_indexer(q, k, w, implementation=implementation)

  return Op(
    name='lightning_indexer',
    directions=DIRECTIONS,
    cost=costs.lightning_indexer,
    make=_make,
    call=call,
    differentiable=(0, 1, 2),
    row_arguments=(0, 2),
    rows=lambda spec: spec.queries,
    reference_bytes=_reference_bytes,
    **inputs.specs_and_implementations('lightning_indexer'),
  )


def _make(spec, dtype, seed):
  return tuple(inputs.normal(
    seed, dtype,
    (spec.batch, spec.queries, spec.heads, spec.dim),
    (spec.batch, spec.keys, spec.dim),
    (spec.batch, spec.queries, spec.heads),
  ))  # fmt: skip


def _reference_bytes(spec: Any) -> int:
  return 4 * spec.batch * spec.heads * spec.keys


def lightning_indexer_fp8() -> Op:
  """The scores alone, of inputs in float8 already, as a cache holds them."""
  api = inputs.module('lightning_indexer', 'api')
  kernel = inputs.module('lightning_indexer', 'pallas_mosaic_gpu')
  quantization = inputs.module('lightning_indexer', 'quantization')

  def make(spec, dtype, seed):
    q, k, w = _make(spec, dtype, seed)
    k, k_scale = quantization.quantize(k)
    # Unit scales for the queries: a factor of the weights like any other.
    return q.astype(FP8), k, w.astype(jnp.float32), k_scale

  def call(implementation, spec, q, k, w, k_scale):
    if implementation == 'mosaic_gpu':
      end = jnp.arange(spec.queries, dtype=jnp.int32) + 1
      end_BT = jnp.broadcast_to(
        end + spec.keys - spec.queries, (spec.batch, spec.queries)
      )
      return kernel.score_chunk(
        q, k, w, jnp.zeros_like(end_BT), end_BT, k_scale_BS=k_scale
      )
    q, k = (x.astype(jnp.float32) for x in (q, k))
    scores = api.lightning_indexer(q, k, w, implementation=implementation)
    # The scales are positive, so they commute with ReLU.
    return scores * k_scale[:, None]

  return Op(
    name='lightning_indexer_fp8',
    directions=(FORWARD,),
    cost=costs.lightning_indexer_fp8,
    make=make,
    call=call,
    row_arguments=(0, 2),
    rows=lambda spec: spec.queries,
    reference_bytes=_reference_bytes,
    **inputs.specs_and_implementations('lightning_indexer'),
  )


def select_topk() -> Op:
  api = inputs.module('topk_selector', 'api')

  def make(spec, dtype, seed):
    del dtype  # Scores are float32 whatever the model's type.
    shape = (spec.indexer.batch, spec.indexer.queries, spec.indexer.keys)
    (scores_BTS,) = inputs.normal(seed, jnp.float32, shape)
    if spec.sees_all_keys:
      return (scores_BTS,)
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
    row_arguments=(0,),
    rows=lambda spec: spec.indexer.queries,
    reference_bytes=lambda spec: 16 * spec.indexer.batch * spec.indexer.keys,
    is_selection=True,
    **inputs.specs_and_implementations(
      'topk_selector', 'SELECT_TOPK_IMPLEMENTATIONS'
    ),
  )


def indexed_topk() -> Op:
  api = inputs.module('topk_selector', 'api')

  def call(implementation, spec, q, k, w):
    return api.indexed_topk(q, k, w, k=spec.k, implementation=implementation)

  folder = inputs.specs_and_implementations(
    'topk_selector', 'INDEXED_TOPK_IMPLEMENTATIONS'
  )
  # Its scores are causal; the other shapes are of scores without -inf.
  folder['specs'] = {
    name: spec
    for name, spec in folder['specs'].items()
    if not spec.sees_all_keys
  }
  return Op(
    name='indexed_topk',
    directions=(FORWARD,),
    cost=costs.indexed_topk,
    make=lambda spec, dtype, seed: _make(spec.indexer, dtype, seed),
    call=call,
    row_arguments=(0, 2),
    rows=lambda spec: spec.indexer.queries,
    reference_bytes=lambda spec: _reference_bytes(spec.indexer),
    is_selection=True,
    **folder,
  )
