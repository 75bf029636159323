"""The figures of an RL report, each from the numbers that are saved beside it.

Blue is measured in training, green on held-out problems, orange the sampler
against the trainer; a dashed line is a reference, not a measurement.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from dsv32_jax.evaluation.plots import Figures

_BLUE, _GREEN, _ORANGE, _RED = '#1f6fb4', '#2f9e6b', '#e08214', '#c0392b'
_STYLE = {
  'figure.dpi': 110,
  'font.size': 9,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'grid.alpha': 0.25,
  'legend.frameon': False,
}
_FRACTION = 'compute/rl_over_pretraining'
_PAPER_FRACTION = 0.1


def draw_all(found: Mapping[str, Any], directory: pathlib.Path) -> Figures:
  """Draws every figure that a run has numbers for.

  Args:
    found: from `rl_report.collect`.
    directory: for PNG and JSON files.
  """
  figures = Figures(directory)
  with plt.rc_context(_STYLE):
    _reward(found, figures)
    _health(found['steps'], figures)
    _rollouts(found['steps'], figures)
  return figures


def _reward(found: Mapping[str, Any], figures: Figures) -> None:
  """Reward and held-out accuracy against the compute of RL."""
  steps = found['steps']
  where = _FRACTION if _FRACTION in steps[-1] else 'compute/rl_flops'
  figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
  values: dict[str, Any] = {'axis': where, 'reward': {}, 'held_out': {}}
  domains = sorted(
    {
      name
      for line in steps
      for name in line
      if name.startswith('reward/') and name != 'reward/mean'
    }
  )
  for number, name in enumerate(domains):
    xs, ys = _points(steps, where, name)
    values['reward'][name] = {'x': xs, 'y': ys}
    colour = f'C{number}'
    left.plot(xs, ys, color=colour, alpha=0.3, linewidth=0.8)
    left.plot(
      *_smooth(xs, ys), color=colour, label=name.removeprefix('reward/')
    )
  left.set(ylabel='mean reward of a rollout batch', title='training prompts')
  _held_out(found, where, right, values)
  for axis in (left, right):
    axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
    if where == _FRACTION:
      axis.set_xlabel('RL FLOPs / FLOPs before RL')
      axis.axvline(
        _PAPER_FRACTION, color='black', linestyle='--', linewidth=0.8
      )
      axis.text(
        _PAPER_FRACTION,
        1.01,
        ' 10 %',
        fontsize=7,
        transform=axis.get_xaxis_transform(),
      )
    else:
      axis.set_xlabel('RL FLOPs')
    if axis.lines:
      axis.legend(fontsize=7, loc='best')
  figures.save(
    figure,
    'reward',
    'Reward, and pass@1 on held-out problems, against the compute of RL. '
    'Dashed: 10 %, which the paper says its post-training exceeded. Bars are '
    '95 % intervals.',
    values,
  )


def _held_out(
  found: Mapping[str, Any], where: str, axis: Any, values: dict
) -> None:
  """pass@1 at the ends, with intervals, and on the way."""
  steps = found['steps']
  place = {line['step']: line[where] for line in steps} | {0: 0.0}
  evaluations = [e for e in found['evaluations'] if e['step'] in place]
  ways = sorted({way for e in evaluations for way in e['ways']}, reverse=True)
  for way in ways:
    names = sorted({name for e in evaluations for name in e['ways'][way]})
    for number, name in enumerate(names):
      ends = [(place[e['step']], e['ways'][way][name]) for e in evaluations]
      xs, ys = [x for x, _ in ends], [one['pass@1'] for _, one in ends]
      errors = [
        [one['pass@1'] - one['low'] for _, one in ends],
        [one['high'] - one['pass@1'] for _, one in ends],
      ]
      style = 'o' if way == 'sampled' else 's'
      axis.errorbar(
        xs,
        ys,
        yerr=errors,
        fmt=style,
        color=f'C{number}',
        markerfacecolor='none' if way == 'greedy' else None,
        markersize=5,
        label=f'{name}, {way}',
      )
      values['held_out'][f'{name}/{way}'] = {'x': xs, 'y': ys, 'error': errors}
      if way == 'sampled':
        xs, ys = _points(steps, where, f'eval/{name}')
        axis.plot(xs, ys, '-', color=f'C{number}', linewidth=1, alpha=0.7)
        values['held_out'][f'{name}/on_the_way'] = {'x': xs, 'y': ys}
  axis.set(ylabel='pass@1', title='held-out problems')


_PANELS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
  ('ratio of policy to sampler', ('grpo/ratio_mean', 'grpo/ratio_max'), True),
  (
    '|log ratio|, mean a token',
    ('grpo/log_ratio_abs_mean', 'sampler/log_ratio_abs_mean'),
    False,
  ),
  (
    'share of tokens clipped, responses masked',
    ('grpo/clip_fraction', 'grpo/masked_fraction'),
    False,
  ),
  ('KL to the reference, nats a token', ('kl/',), False),
  ('entropy, nats a token', ('entropy',), False),
  ('gradient norm', ('grad_norm/main', 'grad_norm/indexer'), True),
  (
    'other choice without replay',
    ('mismatch/routing', 'mismatch/selection'),
    False,
  ),
  ('indexer KL', ('loss/indexer_kl',), False),
)


def _health(steps: Sequence[Mapping], figures: Figures) -> None:
  """What a step reports, over the steps."""
  figure, values = _panels(_PANELS, steps)
  figures.save(
    figure,
    'health',
    'Health of the optimisation: means over the steps of a rollout batch, the '
    'largest of maxima. `sampler` is the trainer against the sampler with the '
    'same weights.',
    values,
  )


_ROLLOUT_PANELS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
  ('tokens a response', ('rollout/length', 'rollout/length_max'), False),
  (
    'share truncated; groups of equal reward',
    ('rollout/truncated', 'rollout/equal_groups'),
    False,
  ),
  ('reward components', ('reward_component/',), False),
  ('samples a second', ('rollout/samples_per_s',), False),
)


def _rollouts(steps: Sequence[Mapping], figures: Figures) -> None:
  """What a rollout batch reports."""
  figure, values = _panels(_ROLLOUT_PANELS, steps)
  figures.save(figure, 'rollouts', 'Rollout batches.', values)


def _panels(
  panels: Sequence[tuple[str, tuple[str, ...], bool]],
  steps: Sequence[Mapping],
) -> tuple[Any, dict]:
  """A small plot for each group of metrics; 'name/' takes all below it."""
  rows = -(-len(panels) // 4)
  figure, axes = plt.subplots(
    rows, 4, figsize=(14, 2.6 * rows), squeeze=False, layout='constrained'
  )
  values: dict[str, Any] = {}
  every = sorted({name for line in steps for name in line})
  for axis, (title, wanted, is_log) in zip(axes.flat, panels, strict=False):
    folders = tuple(name for name in wanted if name.endswith('/'))
    names = [
      name
      for name in every
      if name in wanted or (folders and name.startswith(folders))
    ]
    for number, name in enumerate(names):
      xs, ys = _points(steps, 'step', name)
      values[name] = {'x': xs, 'y': ys}
      xs, ys = _of_batches(steps, name)
      colours = (_BLUE, _ORANGE, _GREEN, _RED)
      axis.plot(
        xs,
        ys,
        linewidth=0.9,
        color=colours[number % 4],
        linestyle='-' if number < 4 else ':',
        label=name,
      )
    axis.set_title(title, fontsize=9)
    axis.set_xlabel('optimizer step', fontsize=8)
    if is_log and any(y > 0 for name in names for y in values[name]['y']):
      axis.set_yscale('log')
    if names:
      axis.legend(fontsize=6)
  for axis in list(axes.flat)[len(panels) :]:
    axis.axis('off')
  return figure, values


def _points(
  steps: Sequence[Mapping], x: str, y: str
) -> tuple[list[float], list[float]]:
  """The lines that have both; numbers that JSON lacks are left out."""
  pairs = [(line[x], line[y]) for line in steps if x in line and y in line]
  pairs = [p for p in pairs if not any(isinstance(v, str) for v in p)]
  return [float(p[0]) for p in pairs], [float(p[1]) for p in pairs]


def _of_batches(
  steps: Sequence[Mapping], name: str
) -> tuple[list[float], list[float]]:
  """One point a rollout batch: the mean of its steps, of maxima the largest.

  The first step of a batch is on-policy and the others are not, so a line
  through all steps would be a saw.
  """
  batches: dict[Any, list[Mapping]] = {}
  for line in steps:
    batches.setdefault(line.get('batch', line['step']), []).append(line)
  reduce = max if name.endswith('_max') else np.mean
  points = [_points(lines, 'step', name) for lines in batches.values()]
  return (
    [xs[-1] for xs, _ in points if xs],
    [float(reduce(ys)) for _, ys in points if ys],
  )


def _smooth(
  xs: Sequence[float], ys: Sequence[float]
) -> tuple[list[float], list[float]]:
  """Means over neighbours, a twentieth of the run wide."""
  width = max(len(ys) // 20, 1)
  kernel = np.ones(width) / width
  means = np.convolve(np.asarray(ys, float), kernel, mode='valid')
  start = (width - 1) // 2
  return list(xs[start : start + len(means)]), means.tolist()
