import numpy as np
import pytest

from dsv32_jax.rl.advantages import group_advantages


def test_group_advantages_are_differences_to_the_mean():
  rewards_NG = np.array([[1.0, 0.0, 0.0, 0.0], [0.2, 0.4, 0.6, 0.8]])
  np.testing.assert_allclose(
    group_advantages(rewards_NG),
    [[0.75, -0.25, -0.25, -0.25], [-0.3, -0.1, 0.1, 0.3]],
    atol=1e-12,
  )


def test_group_advantages_scale_with_the_rewards():
  """Which those divided by the deviation do not."""
  rewards = np.array([0.0, 0.5, 1.0])
  np.testing.assert_allclose(
    group_advantages(10 * rewards), 10 * group_advantages(rewards)
  )
  np.testing.assert_allclose(
    group_advantages(10 * rewards, divide_by_std=True),
    group_advantages(rewards, divide_by_std=True),
    rtol=1e-3,
  )


@pytest.mark.parametrize('divide_by_std', [False, True])
def test_group_advantages_of_equal_rewards_are_zero(divide_by_std):
  rewards = np.full((2, 7), 0.1)
  found = group_advantages(rewards, divide_by_std=divide_by_std)
  assert np.all(found == 0)


def test_group_advantages_by_deviation_are_those_of_the_sample():
  rewards = np.array([1.0, 2.0, 4.0])
  expected = (rewards - rewards.mean()) / (np.std(rewards, ddof=1) + 1e-4)
  np.testing.assert_allclose(
    group_advantages(rewards, divide_by_std=True), expected
  )


def test_group_advantages_of_nothing_are_refused():
  with pytest.raises(ValueError, match=r'shape \(2, 0\)'):
    group_advantages(np.zeros((2, 0)))
