"""Accuracies of models on the same problems, and their differences.

Problems are the sample: each counts with the mean of its answers, and a
difference is taken within each problem, so that how hard a problem is does not
widen the interval.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

Z_95 = 1.959963984540054


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
  """A mean over problems with its 95 % interval.

  Attributes:
    value: the mean.
    low: of the interval.
    high: of the interval.
    n: problems.
  """

  value: float
  low: float
  high: float
  n: int


def accuracy(scores_N: Sequence[float] | np.ndarray) -> Estimate:
  """The mean score and its Wilson interval.

  Wilson's does not shrink to nothing where every problem is solved, or none.

  Args:
    scores_N: of each problem, 0 to 1.

  Raises:
    ValueError: without problems, or for scores outside of 0 to 1.

  >>> accuracy([1.0] * 8 + [0.0] * 2)
  Estimate(value=0.8, low=0.490162..., high=0.943317..., n=10)
  """
  scores = _checked(scores_N)
  n, p = len(scores), float(np.mean(scores))
  z2 = Z_95**2
  middle = (p + z2 / (2 * n)) / (1 + z2 / n)
  half = Z_95 * np.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
  # It holds the mean; rounding may leave 0 or 1 just outside.
  low, high = min(middle - half, p), max(middle + half, p)
  return Estimate(value=p, low=float(low), high=float(high), n=n)


def difference(
  scores_N: Sequence[float] | np.ndarray,
  others_N: Sequence[float] | np.ndarray,
) -> Estimate:
  """The mean of the first less the second, problem by problem.

  The interval is the normal one, with the standard deviation of the
  differences.

  Args:
    scores_N: of one model, 0 to 1.
    others_N: of another model on the same problems, in the same order.

  Raises:
    ValueError: as `accuracy`, or for different numbers of problems.

  >>> difference([1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0]).value
  0.25
  """
  scores, others = _checked(scores_N), _checked(others_N)
  if len(scores) != len(others):
    raise ValueError(
      f'scores: got {len(scores)} and {len(others)} problems, expected the same'
    )
  if len(scores) < 2:
    raise ValueError('scores: got 1 problem, expected at least 2')
  apart = scores - others
  value = float(np.mean(apart))
  half = Z_95 * float(np.std(apart, ddof=1)) / np.sqrt(len(apart))
  return Estimate(
    value=value, low=float(value - half), high=float(value + half), n=len(apart)
  )


def _checked(scores_N: Sequence[float] | np.ndarray) -> np.ndarray:
  scores = np.asarray(scores_N, np.float64)
  if scores.ndim != 1 or not len(scores):
    raise ValueError(
      f'scores: got shape {scores.shape}, expected one for each problem'
    )
  if not np.all((scores >= 0) & (scores <= 1)):
    raise ValueError('scores: got one outside of 0 to 1')
  return scores
