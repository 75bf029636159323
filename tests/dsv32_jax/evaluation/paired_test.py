import numpy as np
import pytest
from scipy import stats

from dsv32_jax.evaluation import paired


@pytest.mark.parametrize(
  ('passed', 'n'), [(8, 10), (0, 20), (20, 20), (1000, 2000), (2000, 2000)]
)
def test_accuracy_interval_is_wilsons(passed, n):
  found = paired.accuracy([1.0] * passed + [0.0] * (n - passed))
  wanted = stats.binomtest(passed, n).proportion_ci(method='wilson')
  assert found.value == passed / n
  assert found.n == n
  np.testing.assert_allclose([found.low, found.high], wanted, atol=1e-9)
  assert found.low <= found.value <= found.high


def test_difference_of_pairs_has_the_interval_of_a_mean():
  # Differences 1, 0, 0, -1, 1: mean 0.2, standard deviation 0.8366600.
  scores = np.array([[1, 1, 0, 0, 1], [0, 1, 0, 1, 0]], float)
  found = paired.difference(*scores)
  half = 1.959964 * 0.8366600 / np.sqrt(5)
  np.testing.assert_allclose(
    [found.value, found.low, found.high], [0.2, 0.2 - half, 0.2 + half], 1e-6
  )


def test_difference_interval_is_narrower_than_of_unpaired_models():
  """What pairing is for: problems that both solve say nothing."""
  generator = np.random.default_rng(0)
  hard = generator.random(2000) < 0.5
  better = np.where(generator.random(2000) < 0.03, 1.0, hard)
  found = paired.difference(better, hard.astype(float))
  both = [paired.accuracy(scores) for scores in (better, hard.astype(float))]
  assert found.low > 0
  assert both[0].low < both[1].high


def test_difference_interval_covers_the_truth_as_often_as_it_says():
  generator = np.random.default_rng(1)
  truth, trials = 0.1, 400
  covered = 0
  for _ in range(trials):
    first = (generator.random(300) < 0.6).astype(float)
    second = (generator.random(300) < 0.5).astype(float)
    found = paired.difference(first, second)
    covered += found.low <= truth <= found.high
  assert 0.92 < covered / trials < 0.98


@pytest.mark.parametrize(
  ('first', 'second', 'message'),
  [
    ([], [], 'expected one for each problem'),
    ([1.0, 2.0], [0.0, 0.0], 'outside of 0 to 1'),
    ([1.0, 0.0], [1.0], 'got 2 and 1 problems'),
    ([1.0], [1.0], 'expected at least 2'),
  ],
)
def test_difference_of_scores_that_are_no_pairs_is_refused(
  first, second, message
):
  with pytest.raises(ValueError, match=message):
    paired.difference(first, second)
