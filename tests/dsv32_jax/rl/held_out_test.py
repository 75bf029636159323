import numpy as np
import pytest

from dsv32_jax.rl.held_out import interval


@pytest.mark.parametrize(
  ('passes', 'n', 'low', 'high'),
  [
    (10, 100, 0.05522914, 0.17436566),
    (0, 50, 0.0, 0.07134759),
    (50, 50, 0.92865241, 1.0),
  ],
)
def test_interval_of_single_responses_is_wilsons(passes, n, low, high):
  rates = np.arange(n) < passes
  assert interval(rates.astype(float)) == pytest.approx((low, high), abs=1e-6)


def test_interval_of_several_responses_covers_the_mean_as_it_says():
  rng = np.random.default_rng(0)
  covered = 0
  for _ in range(400):
    chances = rng.beta(0.5, 1.5, 200)
    rates = rng.binomial(4, chances) / 4
    low, high = interval(rates)
    covered += low <= 0.25 <= high
  assert 0.92 < covered / 400 < 0.98
