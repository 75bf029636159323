"""Attention, sparse and dense, as the benchmark measures it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.benchmarks import costs, inputs
from pallas_kernels.benchmarks.costs import DIRECTIONS, FORWARD
from pallas_kernels.benchmarks.op import Op


def sparse_mla_attention() -> Op:
  api = inputs.module('sparse_mla_attention', 'api')

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
    directions=DIRECTIONS,
    cost=costs.sparse_mla_attention,
    make=_make_sparse,
    call=call,
    differentiable=(0, 1),
    row_arguments=(0, 2),
    is_positional=False,
    rows=lambda spec: spec.num_queries,
    reference_bytes=_sparse_reference_bytes,
    **inputs.specs_and_implementations('sparse_mla_attention'),
  )


def _make_sparse(spec, dtype, seed):
  width = spec.latent_dim + spec.rope_dim
  q, kv = inputs.normal(
    seed, dtype,
    (spec.batch, spec.num_queries, spec.num_heads, width),
    (spec.batch, spec.num_keys, width),
  )  # fmt: skip
  return q, kv, inputs.random_indices(seed, spec)


def _sparse_reference_bytes(spec: Any) -> int:
  keys = spec.num_heads * max(spec.topk, spec.num_keys)
  width = spec.latent_dim + spec.rope_dim
  return 4 * spec.batch * (keys + spec.topk * width)


def sparse_mla_attention_fp8() -> Op:
  """Over the cache of 656-byte rows."""
  api = inputs.module('sparse_mla_attention', 'api')
  cache = inputs.module('sparse_mla_attention', 'fp8_cache')

  def make(spec, dtype, seed):
    q, kv, indices = _make_sparse(spec, dtype, seed)
    return q, jax.jit(cache.pack_fp8_cache)(kv), indices

  def call(implementation, spec, q, rows, indices):
    result = api.sparse_mla_attention_fp8_cache(
      q, rows, indices, scale=spec.scale, implementation=implementation
    )
    return result.out_BTHC, result.lse_BTH

  folder = inputs.specs_and_implementations(
    'sparse_mla_attention', 'FP8_CACHE_IMPLEMENTATIONS'
  )
  folder['specs'] = {
    name: spec
    for name, spec in folder['specs'].items()
    if (spec.latent_dim, spec.rope_dim) == (cache.LATENT_DIM, cache.ROPE_DIM)
  }
  return Op(
    name='sparse_mla_attention_fp8',
    directions=(FORWARD,),
    cost=functools.partial(
      costs.sparse_mla_attention_fp8, row_bytes=cache.ROW_BYTES
    ),
    make=make,
    call=call,
    row_arguments=(0, 2),
    is_positional=False,
    rows=lambda spec: spec.num_queries,
    reference_bytes=_sparse_reference_bytes,
    **folder,
  )


def dense_attention(xla: Callable[..., Any] | None) -> Op:
  """Dense attention, by its kernels and, if given, by XLA."""
  kernel = inputs.module('dense_attention', 'pallas_mosaic_gpu')

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
    return tuple(inputs.normal(
      seed, dtype,
      (*queries, spec.width),
      (*keys, spec.width),
      (*keys, spec.value_width),
    ))  # fmt: skip

  return Op(
    name='dense_attention',
    specs=inputs.module('dense_attention', 'arg_specs').BENCHMARK_SPECS,
    implementations=tuple(table),
    directions=DIRECTIONS,
    cost=costs.dense_attention,
    make=make,
    call=lambda implementation, spec, *x: table[implementation](*x, spec.scale),
    differentiable=(0, 1, 2),
    row_arguments=(0,),
    rows=lambda spec: spec.num_queries,
    reference_bytes=lambda spec: (
      4 * spec.batch * spec.num_heads * spec.num_keys
    ),
  )
