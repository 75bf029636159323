"""report.md and report.html of a chain of distillation."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt

from dsv32_jax.checkpoints import integrity
from dsv32_jax.evaluation import pages
from dsv32_jax.evaluation.pages import Section
from dsv32_jax.evaluation.plots import Figures

_TITLE = 'Specialist distillation'
_ROLES = ('base', 'specialist', 'student', 'mixed')
_NAMES = {'mixed': 'after mixed RL'}
_COLOURS = {
  'base': '#999999',
  'specialist': '#e08214',
  'student': '#7fb0d8',
  'mixed': '#1f6fb4',
}


def write(workdir: pathlib.Path, found: Mapping[str, Any]) -> pathlib.Path:
  """Writes the report of a chain.

  Args:
    workdir: gets report.md, report.html and report/ with the figure and
      results.json.
    found: from `distillation.collect`.

  Returns:
    Path of report.md.
  """
  directory = workdir / 'report'
  figures = Figures(directory)
  _accuracies(found['pairs'], figures)
  integrity.write_atomically(
    directory / 'results.json', json.dumps(found, indent=1)
  )
  origin = json.loads((workdir / 'config.json').read_text('utf-8'))
  path = workdir / 'report.md'
  pages.write(
    path,
    title=_TITLE,
    head=_head(origin, found),
    sections=sections(found),
    figures=figures,
  )
  return path


def sections(found: Mapping[str, Any]) -> list[Section]:
  """The tables of the report."""
  parts = [
    Section(
      title='Accuracy',
      sentence=(
        'Percent of held-out problems solved, with 95 % intervals (Wilson). '
        'All models answer the same problems with the same seeds.'
      ),
      table=_accuracy_table(found['pairs']),
    ),
    Section(
      title='Differences',
      sentence=(
        'Points, problem by problem, with 95 % intervals. The chain is held to '
        'a specialist of at least 20 points over the base, a student within 5 '
        'of each specialist, and within 3 after mixed RL.'
      ),
      table=_difference_table(found['pairs']),
    ),
    Section(
      title='Length',
      sentence='Mean tokens of an answer to these problems.',
      table=_length_table(found['pairs']),
    ),
    Section(
      title='Training data of the student',
      sentence=(
        "What became of the specialists' answers to training prompts: kept are "
        'verified ones, the shorter first, a few a prompt, none twice.'
      ),
      table=_sample_table(found['samples']),
    ),
  ]
  if found['unpopulated']:
    rows = [[name, why] for name, why in found['unpopulated'].items()]
    parts.append(
      Section(
        title='Domains without a specialist',
        sentence='They are in the config and have no problems yet.',
        table=(['domain', 'why'], rows),
      )
    )
  return parts


def _accuracy_table(pairs: Mapping[str, Any]) -> pages.Table:
  rows = [
    [name, f'{row["base"]["n"]:,}', *(_percent(row[role]) for role in _ROLES)]
    for name, row in pairs.items()
  ]
  return ['domain and mode', 'problems', *map(_role, _ROLES)], rows


def _difference_table(pairs: Mapping[str, Any]) -> pages.Table:
  names = [
    'domain and mode',
    'specialist - base',
    'student - specialist',
    'after mixed RL - specialist',
    'met',
  ]
  rows = [
    [
      name,
      _points(row['specialist_base']),
      _points(row['student_specialist']),
      _points(row['mixed_specialist']),
      _verdict(row),
    ]
    for name, row in pairs.items()
  ]
  return names, rows


def _length_table(pairs: Mapping[str, Any]) -> pages.Table:
  rows = [
    [name, *(f'{row["mean_tokens"][role]:.1f}' for role in _ROLES)]
    for name, row in pairs.items()
  ]
  return ['domain and mode', *map(_role, _ROLES)], rows


def _sample_table(samples: Mapping[str, Mapping[str, int]]) -> pages.Table:
  rows = [
    [name, *(f'{counts[column]:,}' for column in _SAMPLE_COLUMNS)]
    for name, counts in samples.items()
  ]
  names = [column.replace('_', ' ') for column in _SAMPLE_COLUMNS]
  return ['domain and mode', *names], rows


_SAMPLE_COLUMNS = (
  'prompts',
  'prompts_solved',
  'sampled',
  'unparsed',
  'wrong',
  'repeated',
  'over_cap',
  'kept',
)


def _head(origin: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
  git = origin.get('git') or {}
  changed = ' with uncommitted changes' if git.get('changed') else ''
  versions = ', '.join(f'{k} {v}' for k, v in origin['versions'].items())
  seconds = sum(found['steps'].values())
  return [
    f'Command: {" ".join(origin["command"])}',
    f'Commit: {git.get("commit", "not in a git checkout")}{changed}; seed '
    f'{origin["config"]["seed"]}; {versions}',
    f'Steps took {seconds:,.0f} s, one after the other (of those that were '
    'interrupted the last session counts).',
  ]


def _role(role: str) -> str:
  return _NAMES.get(role, role)


def _percent(estimate: Mapping[str, float]) -> str:
  low, high = 100 * estimate['low'], 100 * estimate['high']
  return f'{100 * estimate["value"]:.1f} ({low:.1f} to {high:.1f})'


def _points(estimate: Mapping[str, float]) -> str:
  low, high = 100 * estimate['low'], 100 * estimate['high']
  return f'{100 * estimate["value"]:+.1f} ({low:+.1f} to {high:+.1f})'


def _verdict(row: Mapping[str, Mapping[str, float]]) -> str:
  missed = [
    name
    for name, is_met in (
      ('specialist', row['specialist_base']['value'] >= 0.20),
      ('student', row['student_specialist']['value'] >= -0.05),
      ('mixed', row['mixed_specialist']['value'] >= -0.03),
    )
    if not is_met
  ]
  return f'missed: {", ".join(missed)}' if missed else 'yes'


def _accuracies(
  pairs: Mapping[str, Mapping[str, Any]], figures: Figures
) -> None:
  """Bars of all models, by domain and mode."""
  figure, axis = plt.subplots(figsize=(1.6 * len(pairs) + 2, 3.2))
  width = 0.8 / len(_ROLES)
  values: dict[str, Sequence] = {'pairs': list(pairs)}
  for number, role in enumerate(_ROLES):
    rows = [row[role] for row in pairs.values()]
    heights = [100 * row['value'] for row in rows]
    below = [100 * (row['value'] - row['low']) for row in rows]
    above = [100 * (row['high'] - row['value']) for row in rows]
    axis.bar(
      [place + (number - 1.5) * width for place in range(len(rows))],
      heights,
      width,
      yerr=[below, above],
      label=_role(role),
      color=_COLOURS[role],
      error_kw={'linewidth': 0.8},
    )
    values[role] = rows
  axis.set_xticks(
    range(len(pairs)), [name.replace('-', '\n') for name in pairs], fontsize=8
  )
  axis.set(ylabel='held-out problems solved, %', ylim=(0, 100))
  axis.spines[['top', 'right']].set_visible(False)
  axis.legend(
    fontsize=8,
    frameon=False,
    ncols=4,
    loc='lower center',
    bbox_to_anchor=(0.5, 1.0),
  )
  figures.save(
    figure,
    'accuracy',
    'Accuracy on held-out problems with 95 % intervals.',
    values,
  )
