"""RoPE and YaRN against golden values and a complex-number oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.functional import rotary
from tests.support import tolerances

YARN = {'factor': 40, 'original_max_position_embeddings': 4096}


def _oracle(x, positions, inv_freq, *, interleaved):
  """Every pair as a complex number times exp(i * angle), in float64."""
  x = np.asarray(x, np.float64)
  half = x.shape[-1] // 2
  angle = np.asarray(positions)[..., None] * np.asarray(inv_freq, np.float64)
  angle = angle.reshape(*angle.shape[:2], *[1] * (x.ndim - 3), half)
  out = np.empty_like(x)
  first = np.arange(half) * 2 if interleaved else np.arange(half)
  second = first + (1 if interleaved else half)
  turned = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angle)
  out[..., first], out[..., second] = turned.real, turned.imag
  return out


def test_inverse_frequencies_yarn_matches_goldens():
  actual = rotary.inverse_frequencies(64, theta=10000, **YARN)
  golden = {
    0: 1.0,
    9: 0.07498942093,
    10: 0.05623413252,
    11: 0.03900692657,
    16: 0.0055,
    20: 7.90569415e-4,
    22: 1.77827941e-4,
    23: 3.33380358e-5,
    31: 3.33380358e-6,
  }
  assert actual.shape == (32,)
  np.testing.assert_allclose(
    actual[np.array(list(golden))], list(golden.values()), rtol=1e-7
  )


def test_inverse_frequencies_without_yarn_is_geometric():
  actual = rotary.inverse_frequencies(8, theta=10000.0)
  np.testing.assert_allclose(actual, [1.0, 0.1, 0.01, 0.001], rtol=1e-6)


def test_inverse_frequencies_tiny_original_length_scales_all_but_first():
  # low = high = 0 here: the ramp must neither divide by zero nor stay flat.
  actual = rotary.inverse_frequencies(
    8, theta=1e4, factor=40, original_max_position_embeddings=4
  )
  np.testing.assert_allclose(
    actual, [1.0, 0.1 / 40, 0.01 / 40, 0.001 / 40], rtol=1e-6
  )


@pytest.mark.parametrize(
  ('width', 'kwargs', 'expected'),
  [
    (192, {}, 0.0721687836),
    (192, {'factor': 40, 'mscale_all_dim': 1.0}, 0.1352337789),
    (24, {'factor': 40.0, 'mscale_all_dim': 1.0}, 0.3824988883),
    (192, {'factor': 40, 'mscale_all_dim': 0.0}, 0.0721687836),
    (192, {'factor': 1, 'mscale_all_dim': 1.0}, 0.0721687836),
  ],
)
def test_softmax_scale_matches_goldens(width, kwargs, expected):
  assert rotary.softmax_scale(width, **kwargs) == pytest.approx(
    expected, abs=1e-10
  )


@pytest.mark.parametrize('interleaved', [True, False])
@pytest.mark.parametrize('heads', [(), (3,)])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_apply_matches_complex_rotation(key, interleaved, heads, dtype):
  x = jax.random.normal(key, (2, 7, *heads, 16), dtype)
  positions = jnp.arange(14, dtype=jnp.int32).reshape(2, 7) * 3
  inv_freq = rotary.inverse_frequencies(16, theta=1e4)
  actual = rotary.apply(x, positions, inv_freq, interleaved=interleaved)
  desired = _oracle(
    x.astype(jnp.float32), positions, inv_freq, interleaved=interleaved
  )
  assert actual.dtype == x.dtype
  tolerances.assert_close(actual, desired, dtype=dtype)


def test_apply_layouts_share_angles_but_not_pairs(key):
  x = jax.random.normal(key, (1, 5, 2, 8))
  positions = jnp.arange(5, dtype=jnp.int32)[None]
  inv_freq = rotary.inverse_frequencies(8, theta=1e4)
  half = rotary.apply(x, positions, inv_freq, interleaved=False)
  mixed = rotary.apply(x, positions, inv_freq, interleaved=True)
  assert np.abs(half[:, 1:] - mixed[:, 1:]).max() > 0.1
  # The same numbers once the channels are put in the other order.
  order = np.array([0, 4, 1, 5, 2, 6, 3, 7])
  reordered = rotary.apply(x[..., order], positions, inv_freq, interleaved=True)
  np.testing.assert_array_equal(reordered, half[..., order])


@pytest.mark.parametrize('interleaved', [True, False])
def test_apply_dot_product_depends_on_distance_only(key, interleaved):
  q, k = jax.random.normal(key, (2, 1, 1, 16))
  inv_freq = rotary.inverse_frequencies(16, theta=1e4)

  def dot(q_at, k_at):
    turned = rotary.apply(
      jnp.stack([q, k], axis=1),
      jnp.array([[q_at, k_at]], jnp.int32),
      inv_freq,
      interleaved=interleaved,
    )
    return float(jnp.vdot(turned[0, 0], turned[0, 1]))

  assert dot(12, 5) == pytest.approx(dot(107, 100), abs=1e-4)
  assert dot(12, 5) != pytest.approx(dot(13, 5), abs=1e-2)


@pytest.mark.parametrize(
  ('dim', 'kwargs', 'message'),
  [
    (7, {'theta': 1e4}, 'dim=7'),
    (8, {'theta': 1.0}, 'theta=1.0'),
    (8, {'theta': 1e4, 'factor': 4.0}, 'original_max_position_embeddings'),
    (8, {'theta': 1e4, **YARN, 'factor': 0.5}, 'factor=0.5'),
  ],
)
def test_inverse_frequencies_impossible_arguments_are_refused(
  dim, kwargs, message
):
  with pytest.raises(ValueError, match=message):
    rotary.inverse_frequencies(dim, **kwargs)


def test_apply_wrong_number_of_frequencies_is_refused():
  with pytest.raises(ValueError, match='inv_freq has 3'):
    rotary.apply(
      jnp.zeros((1, 2, 8)),
      jnp.zeros((1, 2), jnp.int32),
      jnp.zeros(3),
      interleaved=True,
    )
