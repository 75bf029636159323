"""Whether draws follow a distribution that is known exactly."""

import numpy as np
from scipy import stats

# Cells that are expected more rarely are counted together.
_RARE = 10


def assert_follow(
  drawn_N: np.ndarray, probs_V: np.ndarray, *, tests: int
) -> None:
  """Chi-squared: p above 1e-3 after Bonferroni over `tests` such tests.

  What has no probability must not have been drawn at all.
  """
  probs_V = np.asarray(probs_V, np.float64)
  count_V = np.bincount(drawn_N, minlength=len(probs_V))
  assert len(count_V) == len(probs_V), 'drawn outside of the distribution'
  assert count_V[probs_V == 0].sum() == 0, 'drawn although impossible'
  expected_V = probs_V / probs_V.sum() * len(drawn_N)
  rare = expected_V < _RARE
  observed = np.append(count_V[~rare], count_V[rare].sum())
  expected = np.append(expected_V[~rare], expected_V[rare].sum())
  possible = expected > 0
  if possible.sum() > 1:
    p_value = stats.chisquare(observed[possible], expected[possible]).pvalue
    print(f'chi-squared over {possible.sum()} cells: p = {p_value:.4f}')
    assert p_value > 1e-3 / tests
