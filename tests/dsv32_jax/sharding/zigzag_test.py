"""Zigzag order: a permutation that shares causal attention out evenly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.functional import masking
from dsv32_jax.sharding import zigzag


def _order(length, n):
  """By the definition: shard i holds chunks i and 2n - 1 - i."""
  chunks = np.split(np.arange(length), 2 * n)
  return np.concatenate(
    [chunks[c] for i in range(n) for c in (i, 2 * n - 1 - i)]
  )


@pytest.mark.parametrize('n', [1, 2, 3, 4, 8])
@pytest.mark.parametrize('axis', [0, 1, 2])
def test_zigzag_holds_an_early_and_a_late_chunk_a_shard(n, axis):
  shape = [2, 3, 5]
  shape[axis] = 48
  x = jnp.arange(np.prod(shape)).reshape(shape)
  permuted = zigzag.to_zigzag(x, n, axis)
  order = _order(48, n) if n > 1 else np.arange(48)
  np.testing.assert_array_equal(permuted, np.take(np.asarray(x), order, axis))
  np.testing.assert_array_equal(zigzag.to_natural(permuted, n, axis), x)


@pytest.mark.parametrize('n', [2, 4, 8])
def test_zigzag_gives_every_shard_the_same_causal_pairs(n):
  """Contiguous shares would differ by nearly a factor of two from the mean."""
  length = 64 * n
  start, end = masking.key_ranges(jnp.ones((1, length), jnp.int32))
  pairs = zigzag.to_zigzag(end - start, n).reshape(n, -1).sum(axis=1)
  chunk = length // (2 * n)
  # A chunk's own causal pairs: the part that is not a whole block of keys.
  assert np.ptp(pairs) <= chunk * (chunk + 1) // 2
  assert int(pairs.sum()) == length * (length + 1) // 2
  contiguous = np.asarray(end - start).reshape(n, -1).sum(axis=1)
  assert np.ptp(contiguous) > length**2 // (4 * n)


def test_zigzag_gradient_is_the_inverse_order():
  x = jnp.arange(12.0)[None]
  (gradient,) = jax.vjp(lambda x: zigzag.to_zigzag(x, 3), x)[1](x)
  np.testing.assert_array_equal(gradient, zigzag.to_natural(x, 3))


@pytest.mark.parametrize(
  'function', [zigzag.to_zigzag, zigzag.to_natural], ids=lambda f: f.__name__
)
def test_zigzag_refuses_a_length_that_does_not_divide(function):
  with pytest.raises(ValueError, match=r'20 tokens .* 8 shards: .* 16'):
    function(jnp.zeros((1, 20)), 8)
