"""Tests of closeness by fraction."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import testing
from tests.support import tolerances


def test_assert_close_counts_the_fraction_of_elements():
  desired = np.ones(100)
  actual = desired.copy()
  actual[7] += 6e-6  # scaled error 3e-6: |desired| + rms is 2
  limits = {0.99: 1e-6, 1.0: 4e-6}
  summary = testing.assert_close(actual, desired, tolerance=limits)
  assert summary.worst_index == (7,)
  np.testing.assert_allclose(summary.max_error, 3e-6, rtol=1e-6)
  actual[8] += 6e-6  # a second one in a hundred
  with pytest.raises(AssertionError, match=r'98\.0000% of elements'):
    testing.assert_close(actual, desired, tolerance=limits)
  actual[8] = 1.0
  actual[7] += 6e-6  # one, but too far
  with pytest.raises(AssertionError, match=r'max 1\.2e-05'):
    testing.assert_close(actual, desired, tolerance=limits)


def test_assert_close_scales_with_the_array():
  with pytest.raises(AssertionError):
    testing.assert_close(np.full(10, 1.1e-9), np.full(10, 1e-9), tolerance=1e-3)
  testing.assert_close(np.full(10, 1e9 + 1), np.full(10, 1e9), tolerance=1e-6)


@pytest.mark.parametrize('value', [np.nan, np.inf, 0.0])
def test_assert_close_nonfinite_must_be_equal(value):
  desired = np.asarray([1.0, -np.inf, np.nan])
  testing.assert_close(desired, desired, tolerance=0.0)
  for i in (1, 2):
    actual = desired.copy()
    actual[i] = value if (i, str(value)) != (2, 'nan') else 1.0
    with pytest.raises(AssertionError, match='non-finite mismatches 1'):
      testing.assert_close(actual, desired, tolerance=1e9)


def test_assert_close_all_zero_desired_allows_no_error():
  testing.assert_close(np.zeros(3), np.zeros(3), tolerance=0.0)
  with pytest.raises(AssertionError):
    testing.assert_close(np.full(3, 1e-30), np.zeros(3), tolerance=1.0)


def test_assert_close_names_the_leaf_of_a_tree():
  desired = {'a': np.ones(3), 'b': (np.ones(3), np.ones(2))}
  actual = {'a': np.ones(3), 'b': (np.ones(3), 2 * np.ones(2))}
  with pytest.raises(AssertionError, match=r"grads\['b'\]\[1\]"):
    testing.assert_close(actual, desired, tolerance=1e-3, label='grads')
  with pytest.raises(ValueError, match='structures differ'):
    testing.assert_close({'a': np.ones(3)}, desired, tolerance=1e-3)
  with pytest.raises(ValueError, match='shapes differ'):
    testing.assert_close(np.ones((1, 3)), np.ones(3), tolerance=1e-3)


def test_tolerances_table_separates_dtypes_and_gradients():
  assert tolerances.tolerance(jnp.float32) == {0.99: 1e-6, 1.0: 4e-6}
  assert tolerances.tolerance(jnp.bfloat16)[0.99] == 1e-2
  assert tolerances.tolerance(jnp.bfloat16, gradient=True)[0.99] == 1e-1
  with pytest.raises(KeyError):
    tolerances.tolerance(jnp.int8)
