"""Rows that try a selection, the definition in numpy, and where to run."""

import functools

import numpy as np
import pytest

# Triton's and jax-triton's own.
_TRITON_WARNINGS = pytest.mark.filterwarnings('ignore::DeprecationWarning')
KERNELS = (
  pytest.param('mosaic_gpu', marks=pytest.mark.gpu),
  pytest.param('triton', marks=[pytest.mark.gpu, _TRITON_WARNINGS]),
)
"""Implementations for GPUs, as parameters of a test or a fixture."""


def or_skip(function):
  """The function; skips with its reason where it can't run."""

  @functools.wraps(function)
  def run(*args, **kwargs):
    try:
      return function(*args, **kwargs)
    except NotImplementedError as error:
      pytest.skip(str(error))

  return run


def rows(num_keys, k, *, seed):
  """Name to a float32 row of scores."""
  rng = np.random.default_rng(seed)
  normal = rng.normal(size=num_keys)
  position = np.arange(num_keys)
  signed_zeros = np.where(position % 2, 0.0, -0.0)
  signed_zeros[num_keys // 2] = 1
  signed_zeros[:3] = -1
  holes = normal.copy()
  holes[rng.random(num_keys) < 0.4] = np.nan
  holes[rng.random(num_keys) < 0.4] = -np.inf
  holes[-1] = np.inf
  result = {
    'normal': normal,
    'twelve_decades': normal * 10.0 ** rng.uniform(-6, 6, num_keys),
    'duplicates': np.round(normal),
    'zeros': np.zeros(num_keys),
    'signed_zeros': signed_zeros,
    'plateau_below': np.maximum(normal, 0),
    'plateau_at_the_threshold': np.where(
      rng.random(num_keys) < 0.4 * k / num_keys, normal, 0
    ),
    'ascending': position,
    'descending': -position,
    'holes': holes,
    'all_nan': np.full(num_keys, np.nan),
    'no_valid_key': np.full(num_keys, -np.inf),
    'fewer_than_k': np.where(position < k // 2, normal, -np.inf),
    'huge': np.clip(1e38 * normal, -3e38, 3e38),
    'many_infinities': np.where(rng.random(num_keys) < 0.3, np.inf, normal),
  }
  return {name: row.astype(np.float32) for name, row in result.items()}


def subnormal_row(num_keys, *, seed):
  """Not for a CPU, where XLA takes them for zeros."""
  normal = np.random.default_rng(seed).normal(size=num_keys)
  return (1e-41 * normal).astype(np.float32)


def select(scores_RS, k):
  """Ascending indices of the k best of each row, then -1."""
  scores_RS = np.asarray(scores_RS).astype(np.float32)
  scores_RS = np.where(np.isnan(scores_RS), -np.inf, scores_RS) + 0.0
  indices_RK = np.full((len(scores_RS), k), -1, np.int32)
  for indices_K, scores_S in zip(indices_RK, scores_RS, strict=True):
    best = np.argsort(-scores_S, kind='stable')[:k]
    best = np.sort(best[scores_S[best] > -np.inf])
    indices_K[: len(best)] = best
  return indices_RK


def ranges(num_rows, num_keys, *, seed):
  """Random key ranges, some empty, some beyond the keys."""
  rng = np.random.default_rng(seed)
  start_R = rng.integers(-3, num_keys, num_rows)
  end_R = start_R + rng.integers(-2, num_keys, num_rows)
  return start_R.astype(np.int32), end_R.astype(np.int32)


def outside_removed(scores_RS, start_R, end_R):
  position = np.arange(scores_RS.shape[1])
  valid = (position >= start_R[:, None]) & (position < end_R[:, None])
  return np.where(valid, scores_RS, -np.inf)
