"""Index keys and latent rows as a cache of pages holds them."""

import jax
import jax.numpy as jnp
import numpy as np


def to_pages(*arrays, page, seed=0, spare=3, garbage=np.nan):
  """Rows [B, S, ...] in shuffled pages of pools with garbage beside them.

  Returns:
    (pages_BN, pools [P, page, ...]); S must be a multiple of `page`.
  """
  batch, num_keys = arrays[0].shape[:2]
  used = batch * num_keys // page
  rng = np.random.default_rng(seed)
  pages = rng.permutation(used + spare)[:used]
  pools = []
  for x in arrays:
    x_PpX = np.asarray(x).reshape(used, page, *x.shape[2:])
    pool = np.full((used + spare, *x_PpX.shape[1:]), garbage).astype(x.dtype)
    pool[pages] = x_PpX
    pools.append(jnp.asarray(pool))
  pages_BN = jnp.asarray(pages.reshape(batch, -1), jnp.int32)
  return pages_BN, *pools


def decode_ranges(batch, queries, num_keys, *, seed=0):
  """Ranges of rows of different lengths, the first of them empty."""
  rng = np.random.default_rng(seed)
  end = rng.integers(num_keys // 3, num_keys + 1, (batch, queries))
  start = rng.integers(0, num_keys // 4, (batch, queries))
  end[0, 0] = start[0, 0]
  return jnp.asarray(start, jnp.int32), jnp.asarray(end, jnp.int32)


def random_index(batch, queries, num_keys, heads, dim, *, seed=0):
  """Random float32 (q_BTJI, k_BSI, w_BTJ)."""
  keys = jax.random.split(jax.random.key(seed), 3)
  shapes = (
    (batch, queries, heads, dim),
    (batch, num_keys, dim),
    (batch, queries, heads),
  )
  return tuple(map(jax.random.normal, keys, shapes))
