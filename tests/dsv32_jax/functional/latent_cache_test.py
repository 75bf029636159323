"""What is written into pages and read back."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.functional import latent_cache


def _cache(**formats):
  return latent_cache.init(
    areas=4,
    area_size=2,
    latent_dim=3,
    index_dim=4,
    dtype=jnp.float32,
    **formats,
  )


def test_pages_are_written_in_their_order_and_nowhere_else():
  latent = np.arange(2 * 3 * 3, dtype=np.float32).reshape(2, 3, 3) + 1
  keys = jnp.ones((2, 3, 4))
  pages = jnp.array([[2, 0], [3, -1]])
  cache = latent_cache.append(
    _cache(), jnp.asarray(latent), keys, jnp.array([1, 0]), pages
  )
  expected = np.zeros((4, 2, 3), np.float32)
  expected[2, 1], expected[0] = latent[0, 0], latent[0, 1:]
  expected[3] = latent[1, :2]  # The third token has no page.
  np.testing.assert_array_equal(cache.latent_AOX, expected)
  rows = latent_cache.latent_rows(cache.latent_AOX, pages, jnp.float32)
  np.testing.assert_array_equal(rows[0, 1:], latent[0])


@pytest.mark.parametrize('index_format', ['compute', 'fp8'])
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_pages_never_hold_what_is_not_finite(index_format, value):
  """Others read them under a mask, and 0 times NaN is NaN."""
  cache = latent_cache.append(
    _cache(index_format=index_format),
    jnp.full((1, 2, 3), value),
    jnp.full((1, 2, 4), value),
    jnp.array([0]),
    jnp.array([[1]]),
  )
  for leaf in (cache.latent_AOX, cache.k_index_AOI.astype(jnp.float32)):
    assert np.isfinite(leaf).all()
