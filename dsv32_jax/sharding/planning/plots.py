"""A picture of plans: memory of a device, and where a step's time goes."""

from collections.abc import Sequence

import matplotlib
import numpy as np

from dsv32_jax.sharding.planning import hardware, render
from dsv32_jax.sharding.planning.plan import Plan

matplotlib.use('Agg')
import matplotlib.pyplot as plt

_MEMORY = {
  'parameters': '#1f6fb4',
  'optimizer': '#6baed6',
  'gradients': '#9ecae1',
  'saved': '#2f9e6b',
  'work': '#a1d99b',
}
_TIME = {
  'attention and indexer': '#1f6fb4',
  'experts and feed-forward': '#2f9e6b',
  'rest': '#999999',
  'collectives waited for': '#c0392b',
  'collectives hidden': '#e8b4ad',
}


def draw(plans: Sequence[Plan], path: str) -> None:
  """Writes a PNG: one bar a plan, memory on the left and time on the right."""
  rows = [render.record(plan) for plan in plans]
  labels = [
    f'{row["gpus"]}: {row["mesh"]}\n{row["micro_batches"]} x {row["stage"]}'
    for row in rows
  ]
  height = 1.2 + 0.55 * len(rows)
  figure, (left, right) = plt.subplots(
    1, 2, figsize=(11, height), sharey=True, layout='constrained'
  )
  places = np.arange(len(rows))
  _stack(
    left,
    places,
    {name: [row['memory_gb'][name] for row in rows] for name in _MEMORY},
    _MEMORY,
  )
  limit = hardware.MEMORY_BYTES / 1e9
  left.axvline(limit, color='black', linestyle='--', linewidth=1)
  left.set_xlabel(f'GB a device (dashed: {limit:.0f})')
  _stack(right, places, _seconds(rows), _TIME)
  right.set_xlabel('seconds a step (hidden collectives run beside the work)')
  left.set_yticks(places, labels, fontsize=7)
  left.invert_yaxis()
  for axis in (left, right):
    axis.spines[['top', 'right']].set_visible(False)
    axis.legend(frameon=False, fontsize=7, ncols=3, loc='upper center',
                bbox_to_anchor=(0.5, 1.0 + 0.75 / height))  # fmt: skip
  figure.savefig(path, dpi=110, bbox_inches='tight')
  plt.close(figure)


def _stack(axis, places, parts, colours) -> None:
  start = np.zeros(len(places))
  for name, values in parts.items():
    axis.barh(places, values, left=start, color=colours[name], label=name,
              height=0.6)  # fmt: skip
    start += np.asarray(values)


def _seconds(rows: Sequence[dict]) -> dict[str, list[float]]:
  """Seconds of each part; the hidden collectives come last, beside the rest."""
  parts: dict[str, list[float]] = {name: [] for name in _TIME}
  for row in rows:
    groups = dict.fromkeys(_TIME, 0.0)
    for part, seconds in row['work'].items():
      groups[_group(part)] += seconds
    groups['collectives waited for'] = row['exposed_s']
    groups['collectives hidden'] = row['hidden_s']
    for name, seconds in groups.items():
      parts[name].append(seconds)
  return parts


def _group(part: str) -> str:
  if any(word in part for word in ('attention', 'index', 'selection', 'heads')):
    return 'attention and indexer'
  if any(word in part for word in ('experts', 'feed-forward')):
    return 'experts and feed-forward'
  return 'rest'
