"""The figures of a report, each from the numbers that are saved beside it.

One visual language: dense grey, indexer (sparse) blue, oracle green, window
orange, random red; a dashed line is a reference, not a measurement.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use('Agg')
import matplotlib.pyplot as plt

COLOURS = {
  'dense': '#555555',
  'sparse': '#1f6fb4',
  'indexer': '#1f6fb4',
  'oracle': '#2f9e6b',
  'window': '#e08214',
  'random': '#c0392b',
}
_STYLE = {
  'figure.dpi': 110,
  'font.size': 9,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'grid.alpha': 0.25,
  'legend.frameon': False,
}


class Figures:
  """Draws figures into a directory, with their data beside them.

  Attributes:
    names: figures drawn so far, in order: (file stem, caption).
  """

  def __init__(self, directory: pathlib.Path):
    self.directory = directory
    self.names: list[tuple[str, str]] = []
    directory.mkdir(parents=True, exist_ok=True)

  def save(self, figure: Any, name: str, caption: str, values: Any) -> None:
    """Writes NAME.png and NAME.json."""
    figure.savefig(self.directory / f'{name}.png', bbox_inches='tight')
    plt.close(figure)
    path = self.directory / f'{name}.json'
    path.write_text(json.dumps(values, indent=1), encoding='utf-8')
    self.names.append((name, caption))


def draw_all(found: Mapping[str, Any], directory: pathlib.Path) -> Figures:
  """Draws every figure that the results have numbers for.

  Args:
    found: from `results.collect`.
    directory: for PNG and JSON files.
  """
  figures = Figures(directory)
  with plt.rc_context(_STYLE):
    _training(found['training'], figures)
    if 'quality' in found:
      _quality(found['quality'], figures)
    if 'recall' in found:
      _recall(found['recall'], figures)
    if 'loss' in found:
      _loss_by_position(found['loss'], figures)
    _cost(found['cost'], figures)
  return figures


def _training(training: Mapping[str, list[dict]], figures: Figures) -> None:
  """LM loss and indexer KL over the steps of all stages."""
  figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2))
  values: dict[str, Any] = {}
  offset = 0
  for name, lines in training.items():
    steps = [offset + line['step'] for line in lines]
    is_control = name.endswith('_control')
    if not is_control:
      offset = steps[-1]
    else:
      steps = [step - lines[-1]['step'] for step in steps]
    values[name] = {'step': steps}
    for axis, key in ((left, 'loss/lm'), (right, 'loss/indexer_kl')):
      points = [line.get(key) for line in lines]
      if points[-1] is not None:
        values[name][key] = points
        axis.plot(
          steps,
          points,
          label=name,
          linewidth=1,
          linestyle=':' if is_control else '-',
        )
  left.set(title='language-model loss', xlabel='step', ylabel='nats a token')
  right.set(
    title='indexer KL, summed over layers', xlabel='step', ylabel='nats a row'
  )
  right.set_yscale('log')
  for axis in (left, right):
    if axis.lines:
      axis.legend(fontsize=7)
  figures.save(figure, 'training', 'Training: losses over all stages.', values)


def _quality(quality: Mapping[str, Any], figures: Figures) -> None:
  """Dense attention mass kept by four selectors, layer by layer."""
  for stage, rows in quality.items():
    figure, axes = plt.subplots(
      1, len(rows), figsize=(5 * len(rows), 3.2), squeeze=False
    )
    for axis, (kind, part) in zip(axes[0], rows.items(), strict=True):
      layers = np.arange(len(part['of_oracle_by_layer']))
      for place, selector in enumerate(
        ('indexer', 'oracle', 'window', 'random')
      ):
        axis.bar(
          layers + 0.2 * (place - 1.5),
          part['by_layer'][f'mass/{selector}'],
          width=0.2,
          label=selector,
          color=COLOURS[selector],
        )
      axis.set(
        title=f'{kind} rows, T {part["seq_len"]}, k {part["k"]}',
        xlabel='layer',
        ylabel='dense attention mass kept',
        xticks=layers,
        ylim=(0, 1.05),
      )
    # Beside the bars, which leave no room between them.
    axes[0][-1].legend(fontsize=7, loc='upper left', bbox_to_anchor=(1, 1))
    figures.save(
      figure,
      f'mass_{stage}',
      f'After {stage}: share of the dense attention that each selector keeps '
      'with the same k (queries with more than k valid keys).',
      rows,
    )


def _recall(recall: Mapping[str, Any], figures: Figures) -> None:
  """Recall accuracy against distance."""
  figure, axis = plt.subplots(figsize=(6, 3.4))
  for i, (selector, by_distance) in enumerate(recall['sparse_model'].items()):
    distances = [int(distance) for distance in by_distance]
    axis.plot(
      distances,
      list(by_distance.values()),
      'o-',
      # Equal curves lie on each other: the first is the broadest.
      markersize=7 - i,
      linewidth=5 - i,
      label=selector,
      color=COLOURS[selector],
    )
  axis.axhline(recall['chance'], color='black', linestyle='--', linewidth=0.8)
  axis.axvline(recall['k'], color='black', linestyle='--', linewidth=0.8)
  axis.text(recall['k'], 1.04, ' k', fontsize=8)
  axis.set(
    xlabel='distance between key and query, tokens',
    ylabel='accuracy',
    ylim=(0, 1.1),
    title='recall task, sparse-trained model, five ways to attend',
  )
  axis.legend(fontsize=7)
  figures.save(
    figure,
    'recall',
    'Recall task: the same model and k, different selectors. Dashed: chance, '
    'and k.',
    recall,
  )


def _loss_by_position(loss: Mapping[str, Any], figures: Figures) -> None:
  """Held-out loss against position, at the longest length."""
  length = max(loss['by_length'], key=int)
  rows = loss['by_length'][length]
  figure, axis = plt.subplots(figsize=(6, 3.4))
  values = {}
  for how, part in rows.items():
    positions, means = _binned(part['by_position'], bins=16)
    values[how] = {'position': positions, 'loss': means}
    axis.plot(positions, means, label=how, color=COLOURS[how])
  axis.set(
    xlabel='position in the row',
    ylabel='held-out loss, nats a token',
    title=f'text rows of {length} tokens, by way of training',
  )
  axis.legend(fontsize=7)
  figures.save(
    figure,
    'loss_by_position',
    'Held-out loss by position; each model attends as it was trained.',
    values,
  )


def _cost(cost: Mapping[str, Any], figures: Figures) -> None:
  """Pairs and FLOPs of attention against length."""
  rows: Sequence[Mapping[str, Any]] = cost['by_length']
  lengths = [row['seq_len'] for row in rows]
  figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2))
  for axis, kind in ((left, 'pairs'), (right, 'flops')):
    for how in ('dense', 'sparse'):
      axis.loglog(
        lengths,
        [row[f'{how}_{kind}'] for row in rows],
        'o-',
        markersize=3,
        label=how,
        color=COLOURS[how],
      )
    axis.set(xlabel='sequence length')
  left.set(title='attended (query, key) pairs a layer')
  right.set(title='attention FLOPs, indexer included')
  right.loglog(
    lengths,
    [row['indexer_flops'] for row in rows],
    '--',
    color=COLOURS['sparse'],
    linewidth=0.8,
    label='of which indexer',
  )
  left.legend(fontsize=7)
  right.legend(fontsize=7)
  figures.save(
    figure,
    'cost',
    f'Cost of attention, counted, for this model at k {cost["k"]}.',
    cost,
  )


def _binned(
  values: Sequence[float], *, bins: int
) -> tuple[list[float], list[float]]:
  """Means over equal stretches of positions."""
  parts = np.array_split(np.arange(len(values)), min(bins, len(values)))
  series = np.asarray(values, np.float64)
  return (
    [float(part.mean()) for part in parts],
    [float(np.nanmean(series[part])) for part in parts],
  )
