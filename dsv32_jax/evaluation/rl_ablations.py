"""Figures and tables of the ablations of RL's stabilisers.

Reads rows as `rl.ablations.Lab.run` gives them; knows nothing of how they came.
"""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use('Agg')
import matplotlib.pyplot as plt

from dsv32_jax.evaluation.plots import Figures

Row = Mapping[str, Any]

# What a figure shows of a regime: series, label, whether its axis is
# logarithmic. Seeds start far apart in some: those are shown since the start.
PANELS = (
  ('reward/mean', 'reward since the start', False),
  ('kl/all', 'KL estimate to the start', False),
  ('grpo/log_ratio_abs_mean', 'mean |log ratio|', True),
  ('grpo/ratio_max', 'largest ratio', True),
  ('grad_norm/main', 'gradient norm', True),
  ('entropy', 'entropy since the start, nats a token', False),
)
SINCE_START = ('reward/mean', 'entropy')
COLOURS = {
  'all_on': '#1f6fb4',
  'no_unbiased_kl': '#e08214',
  'no_off_policy_sequence_mask': '#8e5bb5',
  'no_keep_routing': '#2f9e6b',
  'no_keep_sampling_mask': '#b8860b',
  'no_keep_selection': '#d4699e',
  'all_off': '#c0392b',
}
_STYLE = {
  'figure.dpi': 100,
  'font.size': 8,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'grid.alpha': 0.25,
  'legend.frameon': False,
}
# Steps that are averaged in curves, and at the end for tables.
_SMOOTH = 6
_LAST = 16
# Two-sided 95 % points of Student's t by degrees of freedom.
_T = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def write(directory: pathlib.Path, rows: Sequence[Row]) -> None:
  """Writes `tables.md`, `summary.json` and a figure of each regime.

  Args:
    directory: gets `figures/` too.
    rows: of any cells; nothing is written of none.
  """
  if not rows:
    return
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  found = summary(rows)
  (directory / 'summary.json').write_text(
    json.dumps(found, indent=1), encoding='utf-8'
  )
  figures = Figures(directory / 'figures')
  with plt.rc_context(_STYLE):
    for regime in _in_order(rows, 'regime'):
      _draw(regime, [r for r in rows if r['regime'] == regime], figures)
    _draw_effects(found, figures)
  text = [f'## {regime}\n\n{table(found, regime)}' for regime in found]
  (directory / 'tables.md').write_text('\n'.join(text), encoding='utf-8')


def summary(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, Any]]]:
  """By regime and variant: what runs came to, and how they differ from all on.

  `reward`, `kl`, `grad_norm` and so on are means over seeds with half the width
  of a 95 % interval (Student's t; None of one seed). `against_all_on` compares
  runs with the same seed, so what seeds have in common drops out.
  """
  found: dict[str, dict[str, dict[str, Any]]] = {}
  for regime in _in_order(rows, 'regime'):
    mine = [row for row in rows if row['regime'] == regime]
    by_variant = {
      name: {
        row['seed']: _measures(row) for row in mine if row['variant'] == name
      }
      for name in _in_order(mine, 'variant')
    }
    found[regime] = {}
    for name, runs in by_variant.items():
      base = by_variant.get('all_on', {})
      pairs = [(runs[s], base[s]) for s in runs if s in base]
      found[regime][name] = {
        'seeds': len(runs),
        'diverged': sum(run['accuracy'] is None for run in runs.values()),
        **{
          key: interval([run[key] for run in runs.values()])
          for key in next(iter(runs.values()))
        },
        'against_all_on': {
          key: interval([_minus(one[key], other[key]) for one, other in pairs])
          for key in ('accuracy', 'reward')
        },
      }
  return found


def interval(values: Sequence[float | None]) -> dict[str, float | None]:
  """Mean of the values that are there, and half of its 95 % interval."""
  there = [value for value in values if value is not None]
  if not there:
    return {'mean': None, 'half': None}
  mean = sum(there) / len(there)
  if len(there) == 1:
    return {'mean': mean, 'half': None}
  spread = sum((value - mean) ** 2 for value in there) / (len(there) - 1)
  point = _T[min(len(there) - 1, len(_T) - 1)]
  return {'mean': mean, 'half': point * math.sqrt(spread / len(there))}


def table(found: Mapping[str, Any], regime: str) -> str:
  """The runs of a regime as a Markdown table."""
  head = (
    'variant|seeds|held-out accuracy|minus all on|reward at the end|KL|mean '
    'abs. log ratio|largest ratio|masked|grad norm, max|entropy'
  ).split('|')
  lines = [head, ['---'] * len(head)]
  for name, part in found[regime].items():
    seeds = str(part['seeds'])
    if part['diverged']:
      seeds += f' ({part["diverged"]} diverged)'
    difference = part['against_all_on']['accuracy']
    lines.append(
      [
        name,
        seeds,
        _percent(part['accuracy']),
        '' if name == 'all_on' else _percent(difference, sign='+'),
        _number(part['reward']),
        _number(part['kl']),
        _number(part['log_ratio']),
        _number(part['ratio_max']),
        _percent(part['masked']),
        _number(part['grad_norm_max']),
        _number(part['entropy']),
      ]
    )
  return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def _measures(row: Row) -> dict[str, float | None]:
  """What a run came to, in single numbers."""
  series = row['series']

  def last(name: str) -> float | None:
    return _mean(series[name][-_LAST:])

  def largest(name: str) -> float | None:
    values = [value for value in series[name] if value is not None]
    return max(values, default=None)

  return {
    'accuracy': None if row['after'] is None else row['after']['pass@1'],
    'start': row['before']['pass@1'],
    'reward': last('reward/mean'),
    'kl': last('kl/all'),
    'log_ratio': _mean(series['grpo/log_ratio_abs_mean']),
    'ratio_max': largest('grpo/ratio_max'),
    'masked': _mean(series['grpo/masked_fraction']),
    'clipped': _mean(series['grpo/clip_fraction']),
    'grad_norm': last('grad_norm/main'),
    'grad_norm_max': largest('grad_norm/main'),
    'entropy': last('entropy'),
    'routing_mismatch': _mean(series['mismatch/routing']),
    'selection_mismatch': _mean(series['mismatch/selection']),
    'sampler_log_ratio': _mean(series['sampler/log_ratio_abs_mean']),
  }


def _minus(one: float | None, other: float | None) -> float | None:
  return None if one is None or other is None else one - other


def _mean(values: Sequence[float | None]) -> float | None:
  there = [value for value in values if value is not None]
  return sum(there) / len(there) if there else None


def _in_order(rows: Sequence[Row], key: str) -> list[str]:
  """Names as they are usually listed, then others."""
  known = [*COLOURS] if key == 'variant' else ['on_policy']
  names = {row[key]: None for row in rows}
  first = [name for name in known if name in names]
  return first + [name for name in names if name not in first]


def _draw(regime: str, rows: Sequence[Row], figures: Figures) -> None:
  """Curves of a regime: means over seeds, with the range of the seeds."""
  count = math.ceil(len(PANELS) / 2)
  figure, axes = plt.subplots(2, count, figsize=(4 * count, 5.4))
  values: dict[str, Any] = {}
  for axis, (name, label, is_log) in zip(axes.flat, PANELS, strict=True):
    for variant in _in_order(rows, 'variant'):
      mine = [r['series'][name] for r in rows if r['variant'] == variant]
      if name in SINCE_START:
        mine = [since_start(run) for run in mine]
      steps, low, mean, high = band(mine)
      if not steps:
        continue
      values.setdefault(variant, {})[name] = {
        'step': steps, 'low': low, 'mean': mean, 'high': high
      }  # fmt: skip
      colour = COLOURS.get(variant, '#555555')
      axis.plot(steps, mean, label=variant, color=colour, linewidth=1)
      axis.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
    axis.set(title=label, xlabel='step')
    if is_log and any(line.get_ydata().max() > 0 for line in axis.lines):
      axis.set_yscale('log')
  handles, labels = axes.flat[0].get_legend_handles_labels()
  figure.suptitle(regime)
  figure.tight_layout(rect=(0, 0.05, 1, 1))
  figure.legend(handles, labels, loc='lower center', ncols=7, fontsize=7)
  seeds = len({row['seed'] for row in rows})
  figures.save(
    figure,
    regime,
    f'{regime}: means of {seeds} seeds, bands from the lowest to the highest '
    f'seed; averages over {_SMOOTH} steps.',
    values,
  )


def since_start(run: Sequence[float | None]) -> list[float | None]:
  """A series less the mean of its first steps; empty if those have none.

  >>> since_start([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 3.0, None])[-2:]
  [2.0, None]
  """
  start = _mean(run[:_SMOOTH])
  if start is None:
    return []
  return [None if value is None else value - start for value in run]


def band(
  runs: Sequence[Sequence[float | None]],
) -> tuple[list[int], list[float], list[float], list[float]]:
  """Steps, lowest, mean and highest of runs, averaged over a few steps.

  A run that has ended early is left out from there on.
  """
  steps, low, mean, high = [], [], [], []
  for start in range(0, max(map(len, runs), default=0), _SMOOTH):
    found = [_mean(run[start : start + _SMOOTH]) for run in runs]
    there = [value for value in found if value is not None]
    if there:
      steps.append(start + _SMOOTH // 2)
      low.append(min(there))
      mean.append(sum(there) / len(there))
      high.append(max(there))
  return steps, low, mean, high


def _draw_effects(found: Mapping[str, Any], figures: Figures) -> None:
  """What switching a stabiliser off costs, in every regime."""
  regimes = list(found)
  figure, axis = plt.subplots(figsize=(9, 3.6))
  variants = [name for name in COLOURS if name != 'all_on']
  width = 0.8 / len(variants)
  values: dict[str, Any] = {}
  for place, variant in enumerate(variants):
    for index, regime in enumerate(regimes):
      part = found[regime].get(variant, {}).get('against_all_on', {})
      accuracy = part.get('accuracy', {'mean': None})
      if accuracy['mean'] is None:
        continue
      values.setdefault(regime, {})[variant] = accuracy
      axis.errorbar(
        index + width * (place - (len(variants) - 1) / 2),
        100 * accuracy['mean'],
        yerr=None if accuracy['half'] is None else 100 * accuracy['half'],
        fmt='o',
        markersize=4,
        linewidth=1,
        color=COLOURS[variant],
        label=variant
        if not any(
          text == variant for text in axis.get_legend_handles_labels()[1]
        )
        else None,
      )
  axis.axhline(0, color='black', linewidth=0.8)
  axis.set(
    ylabel='points against all on',
    title='held-out accuracy with a stabiliser off, paired by seed',
  )
  axis.set_xticks(np.arange(len(regimes)), regimes)
  axis.legend(fontsize=6, ncols=3)
  figures.save(
    figure,
    'effects',
    'Held-out accuracy minus that of the run with all stabilisers on and the '
    'same seed; bars are 95 % intervals of the mean over seeds.',
    values,
  )


def _percent(value: Mapping[str, Any], sign: str = '') -> str:
  if value['mean'] is None:
    return 'none'
  half = '' if value['half'] is None else f' ± {100 * value["half"]:.1f}'
  return f'{100 * value["mean"]:{sign}.1f} %{half}'


def _number(value: Mapping[str, Any]) -> str:
  if value['mean'] is None:
    return 'none'
  half = '' if value['half'] is None else f' ± {value["half"]:.2g}'
  return f'{value["mean"]:.3g}{half}'
