"""Closeness of arrays: error summaries, and assertions by fraction.

Shared by tests and benchmarks. Works in float64 on the host, whatever the
dtype of the inputs.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class ErrorSummary:
  """How far `actual` is from `desired`, over the finite desired elements.

  Errors are |actual - desired| / (rms(desired) + |desired|): relative for
  large elements, and relative to the typical size of the array for small
  ones, so an array of tiny gradients is not passed by an absolute tolerance.

  Attributes:
    size: number of elements compared.
    rms: root mean square of the finite desired elements.
    max_absolute: largest |actual - desired|.
    mean_absolute: mean |actual - desired|.
    max_error: largest scaled error.
    mean_error: mean scaled error.
    worst_index: position of the largest scaled error.
    mismatched_nonfinite: elements where one side is NaN or infinite and the
      other isn't the same.
  """

  size: int
  rms: float
  max_absolute: float
  mean_absolute: float
  max_error: float
  mean_error: float
  worst_index: tuple[int, ...]
  mismatched_nonfinite: int

  def __str__(self) -> str:
    return (
      f'size {self.size}, rms {self.rms:.3g}, absolute error max '
      f'{self.max_absolute:.3g} mean {self.mean_absolute:.3g}, scaled error '
      f'max {self.max_error:.3g} (at {self.worst_index}) mean '
      f'{self.mean_error:.3g}, non-finite mismatches '
      f'{self.mismatched_nonfinite}'
    )


def summarize_errors(actual: Any, desired: Any) -> ErrorSummary:
  """Summary of the errors of one array; raises ValueError if shapes differ."""
  return _compare(actual, desired)[0]


def assert_close(
  actual: Any,
  desired: Any,
  *,
  tolerance: Mapping[float, float] | float,
  label: str = '',
) -> ErrorSummary:
  """Asserts that two arrays, or trees of arrays, are close by fraction.

  Args:
    actual: array or tree of arrays.
    desired: the same structure and shapes.
    tolerance: largest scaled error allowed (see `ErrorSummary`), or a map from
      fraction of elements to that error: `{0.99: 1e-6, 1.0: 4e-6}` lets one
      element in a hundred be up to 4e-6 off. Infinities and NaN must be equal
      on both sides whatever the tolerance.
    label: put before the message.

  Returns:
    The summary of the worst leaf (by largest scaled error).

  Raises:
    AssertionError: with the summary, when a fraction is not met.
    ValueError: structures or shapes differ.
  """
  fractions = tolerance if isinstance(tolerance, Mapping) else {1.0: tolerance}
  actual_leaves, actual_tree = jax.tree_util.tree_flatten_with_path(actual)
  desired_leaves, desired_tree = jax.tree_util.tree_flatten_with_path(desired)
  if actual_tree != desired_tree:
    raise ValueError(
      f'{label}: structures differ: {actual_tree} and {desired_tree}'
    )
  if not actual_leaves:
    raise ValueError(f'{label}: nothing to compare')
  worst: ErrorSummary | None = None
  for (path, a), (_, d) in zip(actual_leaves, desired_leaves, strict=True):
    summary, errors = _compare(a, d)
    where = f'{label}{jax.tree_util.keystr(path)}'
    if summary.mismatched_nonfinite:
      raise AssertionError(f'{where}: {summary}')
    for fraction, limit in fractions.items():
      share = float(np.mean(errors <= limit)) if errors.size else 1.0
      if share < fraction:
        raise AssertionError(
          f'{where}: {share:.4%} of elements within {limit:.3g}, expected '
          f'{fraction:.2%}; {summary}'
        )
    if worst is None or summary.max_error > worst.max_error:
      worst = summary
  assert worst is not None
  return worst


def _compare(actual: Any, desired: Any) -> tuple[ErrorSummary, np.ndarray]:
  actual = np.asarray(jax.device_get(actual)).astype(np.float64)
  desired = np.asarray(jax.device_get(desired)).astype(np.float64)
  if actual.shape != desired.shape:
    raise ValueError(f'shapes differ: {actual.shape} and {desired.shape}')
  finite = np.isfinite(actual) & np.isfinite(desired)
  same = (actual == desired) | (np.isnan(actual) & np.isnan(desired))
  mismatched = int(np.sum(~finite & ~same))
  reference = np.where(np.isfinite(desired), desired, 0.0)
  count = int(np.sum(np.isfinite(desired)))
  rms = float(np.sqrt(np.sum(reference**2) / max(count, 1)))
  absolute = np.where(
    finite, np.abs(np.where(finite, actual, 0) - reference), 0.0
  )
  scale = rms + np.abs(reference)
  # An all-zero desired array has no scale: only exact zeros are close to it.
  errors = np.where(
    absolute == 0, 0.0, absolute / np.where(scale == 0, 1e-300, scale)
  )
  worst = ()
  if errors.size:
    worst = tuple(
      int(i) for i in np.unravel_index(np.argmax(errors), errors.shape)
    )
  summary = ErrorSummary(
    size=errors.size,
    rms=rms,
    max_absolute=float(absolute.max(initial=0.0)),
    mean_absolute=float(absolute.mean()) if errors.size else 0.0,
    max_error=float(errors.max(initial=0.0)),
    mean_error=float(errors.mean()) if errors.size else 0.0,
    worst_index=worst,
    mismatched_nonfinite=mismatched,
  )
  return summary, errors
