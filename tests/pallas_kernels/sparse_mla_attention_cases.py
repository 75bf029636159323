"""Inputs and comparisons that the tests of sparse MLA's kernels share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic
from pallas_kernels.sparse_mla_attention import arg_specs

needs_api = pytest.mark.skipif(
  not mosaic.has_api(), reason='needs the Mosaic GPU API of jax 0.11'
)

# Relative norms; bfloat16 keeps 8 bits, 2e-3 of an element on average.
VALUE_ERROR = 4e-3
GRADIENT_ERROR = 1e-2


def spec_of(**sizes):
  return arg_specs.ArgSpec(dtype='bfloat16', **sizes)


def inputs(key, spec):
  keys = jax.random.split(key, 4)
  width = spec.latent_dim + spec.rope_dim
  rows = (spec.batch, spec.num_queries, spec.num_heads)
  q = jax.random.normal(keys[0], (*rows, width), spec.dtype)
  shape = (spec.batch, spec.num_keys, width)
  kv = jax.random.normal(keys[1], shape, spec.dtype)
  d_out = jax.random.normal(keys[2], (*rows, spec.latent_dim), spec.dtype)
  return q, kv, d_out, selection(keys[3], spec)


def selection(key, spec):
  """Rows of every length, empty ones too, -1 in between."""
  seed = int(jax.random.randint(key, (), 0, 2**30))
  rng = np.random.default_rng(seed)
  shape = (spec.batch, spec.num_queries, spec.topk)
  indices = np.full(shape, -1, np.int32)
  for number, (b, t) in enumerate(np.ndindex(*shape[:2])):
    most = min(spec.topk, spec.num_keys)
    count = (most, 0, 1, int(rng.integers(most)))[number % 4]
    chosen = rng.choice(spec.num_keys, count, replace=False)
    row = np.concatenate([chosen, np.full(spec.topk - count, -1)])
    indices[b, t] = rng.permutation(row)
  return jnp.asarray(indices)


def gathered(q, kv, indices, *, latent_dim, scale):
  """`reference` on the selected rows only: it fits at real sizes.

  A key that is named twice counts twice, as in the kernels.
  """
  q, kv = q.astype(jnp.float32), kv.astype(jnp.float32)
  rows = jax.vmap(lambda rows, i: rows[jnp.maximum(i, 0)])(kv, indices)
  scores = scale * jnp.einsum('bthx,btkx->bthk', q, rows, precision='highest')
  scores = jnp.where((indices >= 0)[:, :, None], scores, -jnp.inf)
  highest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
  highest = jnp.where(highest == -jnp.inf, 0.0, highest)
  p = jnp.exp(scores - highest)
  total = jnp.sum(p, axis=-1, keepdims=True)
  p /= jnp.where(total == 0, 1.0, total)
  out = jnp.einsum(
    'bthk,btkc->bthc', p, rows[..., :latent_dim], precision='highest'
  )
  return out, (highest + jnp.log(total))[..., 0]


def values_and_gradients(function, spec, q, kv, indices, d_out):
  attend = functools.partial(
    function, latent_dim=spec.latent_dim, scale=spec.scale
  )
  (out, lse), pullback = jax.vjp(lambda q, kv: attend(q, kv, indices), q, kv)
  return out, lse, *pullback((d_out.astype(out.dtype), jnp.zeros_like(lse)))


def relative_error(actual, desired):
  actual, desired = np.asarray(actual, float), np.asarray(desired, float)
  assert np.all(np.isfinite(actual))
  return np.linalg.norm(actual - desired) / np.linalg.norm(desired)


def assert_close(actual, desired):
  out, lse, *gradients = actual
  desired_out, desired_lse, *desired_gradients = desired
  assert relative_error(out, desired_out) < VALUE_ERROR
  lse, desired_lse = np.asarray(lse), np.asarray(desired_lse)
  np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(desired_lse))
  finite = np.isfinite(desired_lse)
  np.testing.assert_allclose(
    lse[finite], desired_lse[finite], atol=1e-4, rtol=1e-4
  )
  for x, y in zip(gradients, desired_gradients, strict=True):
    assert relative_error(x, y) < GRADIENT_ERROR


def float32(*arrays):
  return tuple(x.astype(jnp.float32) for x in arrays)
