"""Cost of a token against its position, from measured times of one layer.

A curve is a list of (position, dollars per million tokens). Between its points
it is straight: attention costs an amount a key, whatever the position.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PHASES = ('prefill', 'decode')
Curve = list[list[float]]

_K = 1024.0
PAPER: dict[str, dict[str, Curve]] = {
  'prefill': {
    'dense': [[0.0, 0.055], [128 * _K, 0.665]],
    'sparse': [[0.0, 0.06], [7 * _K, 0.10], [128 * _K, 0.185]],
  },
  'decode': {
    'dense': [[0.0, 0.07], [128 * _K, 2.15]],
    'sparse': [[0.0, 0.10], [2.5 * _K, 0.15], [128 * _K, 0.25]],
  },
}
"""The figure of arXiv:2512.02556 (H800 at 2 dollars an hour), read off by eye,
about +-5%: DeepSeek-V3.1-Terminus is the dense one, V3.2 the sparse one."""


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """Measurements of `experiments/cost_curve.py`.

  Raises:
    ValueError: there are none, or one isn't finite.
  """
  records = []
  if path.exists():
    lines = path.read_text(encoding='utf-8').splitlines()
    records = [json.loads(line) for line in lines]
  if not records:
    raise ValueError(f'{path}: expected measurements, found none')
  for record in records:
    if not record['finite']:
      raise ValueError(f'{path}: outputs were not finite in {record}')
  return records


def curves(
  records: Sequence[Mapping[str, Any]], *, layers: int, price: float
) -> dict[str, dict[str, Curve]]:
  """Dollars per million tokens by phase and mode; the last measurement counts.

  Args:
    records: from `read`.
    layers: of the model, all alike.
    price: dollars of a GPU-hour.
  """
  found: dict[str, dict[str, dict[float, float]]] = {}
  for record in records:
    seconds = 1e-6 * (record['attention_us'] + record['experts_us'])
    by_mode = found.setdefault(record['phase'], {})
    by_mode.setdefault(record['mode'], {})[record['position']] = (
      1e6 * seconds * layers * price / 3600
    )
  return {
    phase: {
      mode: [[float(x), y] for x, y in sorted(points.items())]
      for mode, points in by_mode.items()
    }
    for phase, by_mode in found.items()
  }


def break_even(dense: Curve, sparse: Curve) -> float | None:
  """The position from which on sparse is cheaper; None if it never is.

  The last crossing counts. The first position, if sparse is cheaper throughout.
  """
  low = max(dense[0][0], sparse[0][0])
  high = min(dense[-1][0], sparse[-1][0])
  points = sorted({x for x, _ in (*dense, *sparse) if low <= x <= high})
  gap = [_at(dense, x) - _at(sparse, x) for x in points]
  if gap[-1] <= 0:
    return None
  for i in range(len(points) - 1, 0, -1):
    if gap[i - 1] <= 0:
      share = gap[i - 1] / (gap[i - 1] - gap[i])
      return points[i - 1] + share * (points[i] - points[i - 1])
  return points[0]


def summarise(
  measured: Mapping[str, Mapping[str, Curve]],
) -> dict[str, dict[str, Any]]:
  """Break-even and ratio at the last position, ours and the paper's."""
  summary = {}
  for phase, by_mode in measured.items():
    if set(by_mode) != {'dense', 'sparse'}:
      continue
    dense, sparse = by_mode['dense'], by_mode['sparse']
    theirs = PAPER[phase]
    last = min(dense[-1][0], sparse[-1][0])
    summary[phase] = {
      'last_position': last,
      'ratio': _at(dense, last) / _at(sparse, last),
      'break_even': break_even(dense, sparse),
      'paper_ratio': _at(theirs['dense'], last) / _at(theirs['sparse'], last),
      'paper_break_even': break_even(theirs['dense'], theirs['sparse']),
      'dense': _at(dense, last),
      'sparse': _at(sparse, last),
      'paper_dense': _at(theirs['dense'], last),
      'paper_sparse': _at(theirs['sparse'], last),
    }
  return summary


def lines(summary: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """What is printed of `summarise`."""

  def position(x: float | None) -> str:
    return 'nowhere' if x is None else f'{x:,.0f} tokens'

  return [
    f'{phase}: at {x["last_position"]:,.0f} tokens dense {x["dense"]:.3f}, '
    f'sparse {x["sparse"]:.3f} $ per million tokens, ratio {x["ratio"]:.2f} '
    f'(paper: {x["paper_dense"]:.3f}, {x["paper_sparse"]:.3f}, '
    f'{x["paper_ratio"]:.2f}); sparse is cheaper from '
    f'{position(x["break_even"])} (paper: {position(x["paper_break_even"])})'
    for phase, x in summary.items()
  ]


def draw(
  measured: Mapping[str, Mapping[str, Curve]],
  path: pathlib.Path,
  device: str,
) -> None:
  """The plot: a panel a phase, measured beside the paper's curves."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  from dsv32_jax.evaluation.plots import COLOURS

  names = {'dense': 'dense', 'sparse': 'sparse (DSA)'}
  figure, axes = plt.subplots(
    1, len(measured), figsize=(5 * len(measured), 3.6), squeeze=False
  )
  for axis, (phase, by_mode) in zip(axes[0], measured.items(), strict=True):
    for mode, name in names.items():
      for curve, style, label in (
        (by_mode.get(mode), 'o-', f'{name}, {device}'),
        (PAPER[phase][mode], '--', f'{name}, paper (H800)'),
      ):
        if curve:
          position, dollars = np.array(curve).T
          axis.plot(
            position / _K,
            dollars,
            style,
            color=COLOURS[mode],
            label=label,
            ms=4,
          )
    axis.set_title(f'{phase}: cost of a token at a position')
    axis.set_xlabel('position, thousand tokens')
    axis.set_ylabel('$ per million tokens')
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8)
  figure.tight_layout()
  figure.savefig(path, dpi=130)
  plt.close(figure)


def _at(curve: Curve, position: float) -> float:
  x, y = zip(*curve, strict=True)
  return float(np.interp(position, x, y))
