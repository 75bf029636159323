"""Random arguments that several ops need."""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp


def module(folder: str, name: str):
  """A module of an op's folder."""
  return importlib.import_module(f'pallas_kernels.{folder}.{name}')


def specs_and_implementations(
  folder: str, table: str = 'IMPLEMENTATIONS'
) -> dict[str, Any]:
  """`Op.specs` and `Op.implementations` of an op's folder."""
  implementations = getattr(module(folder, 'api'), table)
  return {
    'specs': module(folder, 'arg_specs').BENCHMARK_SPECS,
    'implementations': tuple(implementations),
  }


def normal(seed: int, dtype: Any, *shapes: tuple[int, ...]) -> list[jax.Array]:
  keys = jax.random.split(jax.random.key(seed), len(shapes))
  return [
    jax.random.normal(key, shape, dtype)
    for key, shape in zip(keys, shapes, strict=True)
  ]


def random_indices(seed: int, spec: Any) -> jax.Array:
  """Distinct keys of every query that it sees, -1 where there are fewer."""
  batch, queries, keys = spec.batch, spec.num_queries, spec.num_keys
  k = min(spec.topk, keys)
  first = keys if spec.sees_all_keys else keys - queries

  def some(key_and_query):
    key, query_C = key_and_query
    scores = jax.random.uniform(key, (batch, query_C.shape[0], keys))
    seen = jnp.arange(keys)[None] <= query_C[:, None] + first
    scores, indices = jax.lax.top_k(jnp.where(seen[None], scores, -1.0), k)
    return jnp.where(scores < 0, -1, indices).astype(jnp.int32)

  chunk = next(c for c in range(min(queries, 128), 0, -1) if not queries % c)
  query_NC = jnp.arange(queries).reshape(-1, chunk)
  random = jax.random.split(jax.random.key(seed), query_NC.shape[0])
  indices = jax.jit(lambda x: jax.lax.map(some, x))((random, query_NC))
  indices = jnp.moveaxis(indices, 0, 1).reshape(batch, queries, k)
  missing = ((0, 0), (0, 0), (0, spec.topk - k))
  return jnp.pad(indices, missing, constant_values=-1)


def log_sum_exp(spec: Any, q, k, indices):
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
