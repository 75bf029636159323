"""Norms against float64, and the float32 island in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.functional import normalization
from tests.support import tolerances


def _inputs(key, shape=(3, 5, 32), dtype='float32'):
  keys = jax.random.split(key, 3)
  x = (2 + 3 * jax.random.normal(keys[0], shape)).astype(dtype)
  weight = 1 + 0.3 * jax.random.normal(keys[1], shape[-1:])
  bias = jax.random.normal(keys[2], shape[-1:])
  return x, weight, bias


def _float64(*arrays):
  return (np.asarray(a.astype(jnp.float32), np.float64) for a in arrays)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_rms_norm_matches_float64(key, dtype):
  x, weight, _ = _inputs(key, dtype=dtype)
  actual = normalization.rms_norm(x, weight, epsilon=1e-6)
  x64, weight64 = _float64(x, weight)
  mean_square = np.mean(x64**2, axis=-1, keepdims=True)
  assert actual.dtype == x.dtype
  tolerances.assert_close(
    actual, x64 / np.sqrt(mean_square + 1e-6) * weight64, dtype=dtype
  )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_layer_norm_matches_float64(key, dtype):
  x, weight, bias = _inputs(key, dtype=dtype)
  actual = normalization.layer_norm(x, weight, bias)
  x64, weight64, bias64 = _float64(x, weight, bias)
  centred = x64 - x64.mean(axis=-1, keepdims=True)
  variance = np.mean(centred**2, axis=-1, keepdims=True)
  desired = centred / np.sqrt(variance + 1e-6) * weight64 + bias64
  assert actual.dtype == x.dtype
  tolerances.assert_close(actual, desired, dtype=dtype)


def test_norms_epsilon_decides_for_tiny_inputs():
  # Variance 1e-6 = epsilon: 1 / sqrt(2); PyTorch's 1e-5 would give 0.30.
  x = jnp.array([[1e-3, -1e-3]])
  one, zero = jnp.ones(2), jnp.zeros(2)
  expected = np.array([[1.0, -1.0]]) / np.sqrt(2)
  tolerances.assert_close(normalization.rms_norm(x, one), expected)
  tolerances.assert_close(normalization.layer_norm(x, one, zero), expected)
  larger = normalization.layer_norm(x, one, zero, epsilon=1e-5)
  tolerances.assert_close(larger, np.array([[1.0, -1.0]]) / np.sqrt(11))


def test_norms_in_bfloat16_round_once(key):
  x, weight, bias = _inputs(key, dtype='bfloat16')
  x_f32 = x.astype(jnp.float32)
  np.testing.assert_array_equal(
    normalization.rms_norm(x, weight),
    normalization.rms_norm(x_f32, weight).astype(jnp.bfloat16),
  )
  np.testing.assert_array_equal(
    normalization.layer_norm(x, weight, bias),
    normalization.layer_norm(x_f32, weight, bias).astype(jnp.bfloat16),
  )


def test_norms_dtype_overrides_the_type_of_the_result(key):
  x, weight, bias = _inputs(key)
  kwargs = {'dtype': jnp.bfloat16}
  assert normalization.rms_norm(x, weight, **kwargs).dtype == jnp.bfloat16
  assert (
    normalization.layer_norm(x, weight, bias, **kwargs).dtype == jnp.bfloat16
  )


def test_rms_norm_zero_row_has_finite_gradient():
  gradient = jax.grad(
    lambda x: jnp.sum(normalization.rms_norm(x, jnp.ones(4)))
  )(jnp.zeros((2, 4)))
  assert np.isfinite(gradient).all()
