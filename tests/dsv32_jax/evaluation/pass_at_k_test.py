"""pass@k against the sets that it speaks of."""

import itertools

import numpy as np
import pytest

from dsv32_jax.evaluation import paired
from dsv32_jax.evaluation.pass_at_k import estimate, pass_at_k


@pytest.mark.parametrize('n', range(1, 9))
def test_estimate_is_the_share_of_sets_with_a_right_sample(n):
  for c, k in itertools.product(range(n + 1), range(1, n + 1)):
    sets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    share = sum(any(one) for one in sets) / len(sets)
    assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12), (c, k)


def test_estimate_is_unbiased_where_the_obvious_one_is_not():
  p, n, k = 0.2, 6, 3
  truth = 1 - (1 - p) ** k
  unbiased = naive = 0.0
  for samples in itertools.product((True, False), repeat=n):
    c = sum(samples)
    weight = p**c * (1 - p) ** (n - c)
    unbiased += weight * pass_at_k(n, c, k)
    naive += weight * (1 - (1 - c / n) ** k)
  assert unbiased == pytest.approx(truth, abs=1e-12)
  assert abs(naive - truth) > 0.01


def test_many_samples_do_not_overflow():
  assert pass_at_k(100_000, 10, 100) == pytest.approx(0.00995, abs=1e-4)


@pytest.mark.parametrize(
  ('n', 'c', 'k'), [(3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)]
)
def test_impossible_counts_are_refused(n, c, k):
  with pytest.raises(ValueError, match='expected'):
    pass_at_k(n, c, k)


def test_mean_over_problems_has_wilsons_interval():
  passes = [[True, False], [False, False], [True, True]]
  assert estimate(passes, 1) == paired.accuracy([0.5, 0.0, 1.0])
  assert estimate(passes, 2) == paired.accuracy([1.0, 0.0, 1.0])


def test_interval_holds_the_truth_as_often_as_it_says():
  draws = np.random.default_rng(0)
  rates = draws.uniform(size=(400, 50))
  held = 0
  for one in rates:
    passes = (draws.uniform(size=(50, 4)) < one[:, None]).tolist()
    found = estimate(passes, 1)
    held += found.low <= 0.5 <= found.high
  assert held / len(rates) >= 0.95
