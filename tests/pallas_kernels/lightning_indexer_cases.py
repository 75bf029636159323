"""Inputs of the indexer's tests, and the definition in numpy.

Numpy, because compiling the reference for a GPU takes longer than all else.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lightning_indexer import quantization

SHAPES = {
  'v32': (1, 64, 4096, 64, 128),
  'ragged': (2, 101, 1003, 64, 128),
  'glm': (2, 67, 1000, 32, 128),
  'small': (2, 100, 777, 16, 64),
  'decode': (3, 1, 3000, 64, 128),
}


def make(batch, queries, keys, heads, dim, *, seed=0):
  """Random bfloat16 q and k, float32 w and gradient of the scores."""
  names = jax.random.split(jax.random.key(seed), 4)
  shapes = (
    (batch, queries, heads, dim),
    (batch, keys, dim),
    (batch, queries, heads),
    (batch, queries, keys),
  )
  dtypes = (jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32)
  return [
    jax.random.normal(name, shape, dtype)
    for name, shape, dtype in zip(names, shapes, dtypes, strict=True)
  ]


def ragged_ranges(batch, queries, keys, *, seed=1):
  """Random ranges, some empty; the first half shares a short one."""
  rng = np.random.default_rng(seed)
  start = rng.integers(0, keys, (batch, queries))
  end = np.minimum(start + rng.integers(-3, keys, (batch, queries)), keys)
  start[:, : queries // 2] = 3
  end[:, : queries // 2] = 60
  end[:, queries // 4] = start[:, queries // 4]
  return (jnp.asarray(x, jnp.int32) for x in (start, np.maximum(end, 0)))


def causal_ranges(batch, queries, keys):
  end = jnp.arange(1, queries + 1, dtype=jnp.int32) + keys - queries
  end = jnp.broadcast_to(end[None], (batch, queries))
  return jnp.zeros_like(end), end


def as_used(x, *, quantized):
  """What the kernel computes with, as float32 numpy."""
  if not quantized:
    return np.asarray(x.astype(jnp.float32))
  values, scale = quantization.quantize(x)
  values = np.asarray(values.astype(jnp.float32))
  return values * np.asarray(scale)[..., None]


def valid_pairs(start, end, num_keys):
  s = np.arange(num_keys)
  start, end = (np.asarray(x)[..., None] for x in (start, end))
  return (s >= start) & (s < end)


def all_dots(q, k):
  batch, queries, heads, dim = q.shape
  dots = np.matmul(q.reshape(batch, -1, dim), np.swapaxes(k, 1, 2))
  return dots.reshape(batch, queries, heads, -1)


def numpy_scores(q, k, w, start, end, *, quantized=False):
  q, k = (as_used(x, quantized=quantized) for x in (q, k))
  w = np.asarray(w).astype(np.float32)
  scores = np.zeros((*q.shape[:2], k.shape[1]), np.float32)
  for j in range(q.shape[2]):
    dots = np.matmul(q[:, :, j], np.swapaxes(k, 1, 2))
    scores += w[:, :, j, None] * np.maximum(dots, 0)
  return np.where(valid_pairs(start, end, k.shape[1]), scores, -np.inf)


def numpy_gradients(q, k, w, g, start, end, *, quantized=False):
  q, k = (as_used(x, quantized=quantized) for x in (q, k))
  g = np.where(valid_pairs(start, end, k.shape[1]), np.asarray(g), 0)
  dots = all_dots(q, k)
  p = np.where(dots > 0, g[:, :, None], 0)
  dw = np.sum(p * dots, axis=-1)
  p = p * np.asarray(w)[..., None]
  p = p.reshape(p.shape[0], -1, p.shape[-1])
  dq = np.matmul(p, k).reshape(q.shape)
  dk = np.matmul(np.swapaxes(p, 1, 2), q.reshape(q.shape[0], -1, q.shape[-1]))
  return dq, dk, dw


def both_ranges(batch, queries, keys):
  return (
    causal_ranges(batch, queries, keys),
    tuple(ragged_ranges(batch, queries, keys)),
  )


def poison():
  """Leaves NaN in memory that the next outputs are likely to take."""
  jax.block_until_ready(jnp.full((2**26,), jnp.nan))
