"""report.md and a self-contained report.html of a continued-training run."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from dsv32_jax.evaluation import pages, plots
from dsv32_jax.evaluation.pages import Table


def write(workdir: pathlib.Path, found: Mapping[str, Any]) -> pathlib.Path:
  """Writes the report of a run.

  Args:
    workdir: of the run; gets report.md, report.html and report/ with the
      figures, the data of each, and results.json.
    found: from `results.collect`.

  Returns:
    Path of report.md.
  """
  workdir = workdir.absolute()
  directory = workdir / 'report'
  figures = plots.draw_all(found, directory)
  (directory / 'results.json').write_text(
    json.dumps(found, indent=1), encoding='utf-8'
  )
  origin = json.loads((workdir / 'config.json').read_text(encoding='utf-8'))
  head = [*_provenance(origin), *_summary(found)]
  path = workdir / 'report.md'
  pages.write(
    path,
    title=_TITLE,
    head=head,
    sections=[
      pages.Section(title=title, sentence=sentence, table=table)
      for title, sentence, table in _sections(found)
    ],
    figures=figures,
  )
  print(f'report: {path} and {path.with_suffix(".html")}', flush=True)
  return path


def _provenance(origin: Mapping[str, Any]) -> list[str]:
  git = origin.get('git') or {}
  commit = git.get('commit', 'not in a git checkout')
  changed = ' with uncommitted changes' if git.get('changed') else ''
  versions = ', '.join(
    f'{name} {version}' for name, version in origin['versions'].items()
  )
  return [
    f'Command: {" ".join(origin["command"])}',
    f'Commit: {commit}{changed}; seed {origin["config"]["seed"]}; {versions}',
  ]


def _summary(found: Mapping[str, Any]) -> list[str]:
  """The run in a few lines: loss, recall, selection, cost."""
  lines = []
  loss = found.get('loss', {}).get('by_length', {})
  for length, row in loss.items():
    if 'sparse' in row and 'dense' in row:
      lines.append(
        f'Held-out loss at {length} tokens: '
        f'sparse {row["sparse"]["loss"]:.4f}, '
        f'dense control {row["dense"]["loss"]:.4f} '
        f'({row["sparse"]["relative_to_dense"]:+.2%}), attending to '
        f'{row["sparse"]["pairs_per_token"]:.0f} instead of '
        f'{row["dense"]["pairs_per_token"]:.0f} keys a query.'
      )
  if 'recall' in found:
    recall = found['recall']
    parts = [
      f'{name} {min(values.values()):.3f} to {max(values.values()):.3f}'
      for name, values in recall['sparse_model'].items()
    ]
    lines.append(
      f'Recall accuracy beyond k = {recall["k"]}, worst and best distance: '
      f'{", ".join(parts)}; chance {recall["chance"]:.3f}.'
    )
  for stage, rows in found.get('quality', {}).items():
    parts = [
      f'{kind} rows {part["of_oracle_mean"]:.3f} of the oracle (worst layer '
      f'{part["of_oracle_worst"]:.3f}), {part["above_window"]:+.3f} above the '
      'window'
      for kind, part in rows.items()
    ]
    lines.append(
      f'Dense attention mass kept after {stage}: {"; ".join(parts)}.'
    )
  return lines


def _sections(found: Mapping[str, Any]) -> list[tuple[str, str, Table]]:
  """(title, sentence, table) of each part that has numbers."""
  sections = [('Stages', 'What ran, in order.', _stage_table(found['stages']))]
  if 'loss' in found:
    sections.append(
      (
        'Held-out loss',
        'Text that no stage trained on; each model attends as it was trained. '
        'In brackets: difference from the dense control, which trained the '
        'same extra steps from the same checkpoint on the same batches.',
        _loss_table(found['loss']),
      )
    )
  if 'recall' in found:
    recall = found['recall']
    sections.append(
      (
        'Recall task',
        f'Accuracy by distance in tokens; k is {recall["k"]}, chance '
        f'{recall["chance"]:.3f}. The first rows are one model, the '
        'sparse-trained, attending in five ways; the others are the controls, '
        'attending as they were trained.',
        _recall_table(recall),
      )
    )
  for stage, rows in found.get('quality', {}).items():
    sections.append(
      (
        f'Selection after {stage}',
        'Dense attention mass that a selection of k tokens keeps, over queries '
        'with more than k valid keys. The oracle is the top-k of the same '
        'attention.',
        _quality_table(rows),
      )
    )
    sections.append(
      (
        f'Indexer after {stage}, on text rows',
        "KL to dense attention; share of the oracle's tokens; rows whose k-th "
        'score is tied with a token left out, or exactly 0; rows that keep the '
        'first token and the query itself; share kept of the k/8 most recent '
        'tokens.',
        _indexer_table(rows['text']['by_layer']),
      )
    )
  sections.append(
    (
      'Cost',
      'Counted for causal attention over one document, all layers, forward; '
      'projections are the same in both modes and left out.',
      _cost_table(found['cost']),
    )
  )
  return sections


def _stage_table(stages: Sequence[Mapping[str, Any]]) -> Table:
  rows = [
    [
      row['name'],
      row['kind'],
      row['selector'] if row['kind'] == 'sparse_training' else '',
      str(row['steps']),
      f'{row["batch"][0]} x {row["batch"][1]}',
      str(row['k']),
      f'{row["tokens"]:,}',
      _number(row['lm_loss']),
      _number(row['indexer_kl']),
      _number(row['step_s'] and 1e3 * row['step_s'], '.0f'),
    ]
    for row in stages
  ]
  return (
    'stage,kind,selector,steps,batch,k,tokens,LM loss,indexer KL,ms a step'
  ).split(','), rows


def _loss_table(loss: Mapping[str, Any]) -> Table:
  by_length = loss['by_length']
  ways = list(next(iter(by_length.values())))
  rows = []
  for length, row in by_length.items():
    cells = [length]
    for how in ways:
      part = row[how]
      text = f'{part["loss"]:.4f}'
      if how != 'dense' and 'relative_to_dense' in part:
        text += f' ({part["relative_to_dense"]:+.2%})'
      cells.append(text)
    pairs = row['sparse']['pairs_per_token'] if 'sparse' in row else None
    rows.append([*cells, _number(pairs, '.1f')])
  return ['tokens', *ways, 'keys a query (sparse)'], rows


def _recall_table(recall: Mapping[str, Any]) -> Table:
  distances = list(recall['answers_per_distance'])
  rows = [
    [f'sparse model, {name}', *(f'{values[d]:.3f}' for d in distances)]
    for name, values in recall['sparse_model'].items()
  ]
  rows += [
    [f'{how}-trained control', *(f'{values[d]:.3f}' for d in distances)]
    for how, values in recall['trained_with'].items()
  ]
  counts = recall['answers_per_distance']
  rows.append(['answers', *(str(counts[d]) for d in distances)])
  return ['attention', *distances], rows


def _quality_table(quality: Mapping[str, Any]) -> Table:
  rows = []
  for kind, part in quality.items():
    for layer, ratio in enumerate(part['of_oracle_by_layer']):
      rows.append(
        [
          kind,
          str(layer),
          *(
            f'{part["by_layer"][f"mass/{name}"][layer]:.3f}'
            for name in ('indexer', 'oracle', 'window', 'random')
          ),
          f'{ratio:.3f}',
        ]
      )
    mass = part['mass_mean']
    rows.append(
      [
        kind,
        'mean',
        *(f'{mass[n]:.3f}' for n in ('indexer', 'oracle', 'window', 'random')),
        f'{part["of_oracle_mean"]:.3f} (worst {part["of_oracle_worst"]:.3f})',
      ]
    )
  return (
    'rows,layer,indexer,oracle,window,random,indexer / oracle'.split(','),
    rows,
  )


def _indexer_table(by_layer: Mapping[str, Sequence[float]]) -> Table:
  names = (
    'kl',
    'overlap',
    'tie',
    'zero_boundary',
    'zero_scores',
    'first_kept',
    'self_kept',
    'recent_kept',
  )
  layers = range(len(by_layer['kl']))
  rows = [
    [str(layer), *(f'{by_layer[name][layer]:.4f}' for name in names)]
    for layer in layers
  ]
  return ['layer', *(name.replace('_', ' ') for name in names)], rows


def _cost_table(cost: Mapping[str, Any]) -> Table:
  rows = [
    [
      f'{row["seq_len"]:,}',
      f'{row["dense_pairs"]:,}',
      f'{row["sparse_pairs"]:,}',
      f'{row["dense_pairs"] / row["sparse_pairs"]:.1f}x',
      f'{row["dense_flops"]:.3g}',
      f'{row["sparse_flops"]:.3g}',
      f'{row["dense_flops"] / row["sparse_flops"]:.2f}x',
    ]
    for row in cost['by_length']
  ]
  return (
    'tokens,dense pairs a layer,sparse pairs a layer,fewer pairs,dense FLOPs,'
    'sparse FLOPs (with indexer),fewer FLOPs'
  ).split(','), rows


def _number(value: float | None, form: str = '.4f') -> str:
  return '' if value is None else f'{value:{form}}'


_TITLE = 'Continued training: dense to sparse'
