"""Tests of the indexer's float8 vectors, every implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import lightning_indexer
from pallas_kernels.lightning_indexer import arg_specs, quantization


@pytest.mark.parametrize(
  ('amax', 'scale'),
  [
    (0.0, 2.0**-22),
    (1e-4, 2.0**-22),
    (1.0, 2.0**-8),
    (3.5, 2.0**-7),  # exactly a power of two: not rounded up
    (448.0, 1.0),
    (449.0, 2.0),
  ],
)
def test_quantize_power_of_two_scale_is_as_published(amax, scale):
  x = jnp.asarray([[amax, -amax / 3, 0.0]])
  _, actual = quantization.quantize(x, power_of_two=True)
  assert actual[0] == scale


def test_quantize_largest_value_is_448_and_nothing_is_nan():
  x = jax.random.normal(jax.random.key(0), (7, 5, 32)) * 1e6
  values, scale = quantization.quantize(x)
  assert values.dtype == jnp.float8_e4m3fn
  assert scale.shape == (7, 5)
  values = np.asarray(values, np.float32)
  assert np.all(np.isfinite(values))
  np.testing.assert_array_equal(np.abs(values).max(-1), 448)
  again = values * np.asarray(scale)[..., None]
  np.testing.assert_array_less(
    np.abs(again - x), np.abs(x) / 16 + scale[..., None]
  )


@pytest.mark.parametrize('scale', [1e-8, 1e-3, 1.0, 1e5])
def test_round_trip_equals_the_cast_to_the_last_bit(scale):
  x = jax.random.normal(jax.random.key(1), (4096, 64)) ** 5 * scale
  values, scales = quantization.quantize(x)
  desired = np.asarray(values, np.float32) * np.asarray(scales)[..., None]
  np.testing.assert_array_equal(jax.jit(quantization.round_trip)(x), desired)


def test_quantize_zero_vector_stays_zero():
  values, scale = quantization.quantize(jnp.zeros((2, 8)))
  assert not np.any(np.asarray(values, np.float32))
  assert np.all(np.isfinite(scale))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_quantized_scores_are_those_of_the_folded_form(dtype):
  """I = k_s sum_j (w_j q_s_j) ReLU(q8 . k8), as the published kernel has it."""
  q, k, w = arg_specs.TEST_SPECS['several_windows'].make(seed=1, dtype=dtype)
  q8, q_scale = quantization.quantize(q)
  k8, k_scale = quantization.quantize(k)
  q8, q_scale, k8, k_scale, w64 = (
    np.asarray(x.astype(jnp.float32)).astype(np.float64)
    for x in (q8, q_scale, k8, k_scale, w)
  )
  dots = np.maximum(np.einsum('btji,bsi->btjs', q8, k8), 0)
  desired = np.einsum('btj,btjs->bts', w64 * q_scale, dots) * k_scale[:, None]
  for name in ('xla', 'reference'):
    scores = np.asarray(
      lightning_indexer(q, k, w, quantized=True, implementation=name)
    )
    finite = np.isfinite(scores)
    error = np.linalg.norm(scores[finite] - desired[finite])
    assert error < 1e-5 * np.linalg.norm(desired[finite]), name


@pytest.mark.slow
def test_quantized_gradients_of_xla_match_the_reference():
  # Vectors long enough that no product is zero but for the scales' rounding.
  spec = arg_specs.ArgSpec(batch=1, queries=150, keys=150, heads=2, dim=64)
  q, k, w = spec.make(seed=2)
  g = jax.random.normal(jax.random.key(3), (1, 150, 150))

  def total(q, k, w, name):
    scores = lightning_indexer(q, k, w, quantized=True, implementation=name)
    return jnp.sum(jnp.where(jnp.isfinite(scores), scores, 0) * g)

  grads = [
    jax.grad(total, argnums=(0, 1, 2))(q, k, w, name)
    for name in ('xla', 'reference')
  ]
  for actual, desired in zip(*grads, strict=True):
    error = jnp.linalg.norm(actual - desired)
    assert error < 1e-3 * jnp.linalg.norm(desired)
