"""report.md and report.html of an RL run, from the files it left.

Reads the work directory alone (`dsv32_jax/rl/trainer.py` says what is in it),
so a report can be made of a run that is still going on.
"""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsv32_jax.evaluation import pages, rl_plots
from dsv32_jax.evaluation.pages import Section

_Z = 1.959964
_PAPER_FRACTION = 0.1
_SHOWN_TEXT = 60


def write(workdir: pathlib.Path) -> pathlib.Path:
  """Writes the report of a run.

  Args:
    workdir: of the run; gets report.md, report.html and report/ with the
      figures, the data of each, and results.json.

  Returns:
    Path of report.md.

  Raises:
    ValueError: a directory without steps to report on.
  """
  workdir = workdir.absolute()
  found = collect(workdir)
  directory = workdir / 'report'
  figures = rl_plots.draw_all(found, directory)
  (directory / 'results.json').write_text(
    json.dumps(found, indent=1), encoding='utf-8'
  )
  origin = json.loads((workdir / 'config.json').read_text(encoding='utf-8'))
  path = workdir / 'report.md'
  pages.write(
    path,
    title='Reinforcement learning',
    head=[*_provenance(origin), *_summary(found)],
    sections=_sections(found),
    figures=figures,
  )
  print(f'report: {path} and {path.with_suffix(".html")}', flush=True)
  return path


def collect(workdir: pathlib.Path) -> dict[str, Any]:
  """All numbers of a run: `steps` (its lines), `evaluations`, `gains`.

  Raises:
    ValueError: a directory without steps.
  """
  steps = read_lines(workdir / 'metrics.jsonl')
  if not steps:
    raise ValueError(
      f'workdir: found no steps in {workdir}/metrics.jsonl, expected a run'
    )
  evaluations = [
    json.loads(path.read_text(encoding='utf-8'))
    for path in sorted((workdir / 'evaluation').glob('step_*.json'))
  ]
  examples = {
    (line['batch'], line['prompt']): line
    for line in read_lines(workdir / 'examples.jsonl')
  }
  gains = []
  if len(evaluations) > 1:
    gains = accuracy_gains(evaluations[0]['ways'], evaluations[-1]['ways'])
  return {
    'steps': steps,
    'evaluations': evaluations,
    'gains': gains,
    'examples': list(examples.values()),
  }


def read_lines(path: pathlib.Path) -> list[dict]:
  """The whole lines of a JSONL file; [] if there is none."""
  if not path.exists():
    return []
  lines = []
  for text in path.read_text(encoding='utf-8').splitlines():
    try:
      line = json.loads(text)
    except ValueError:
      continue  # Cut short by a crash.
    if isinstance(line, dict) and 'step' in line:
      lines.append(line)
  return lines


def accuracy_gains(before: Mapping, after: Mapping) -> list[dict]:
  """Held-out accuracy before and after RL, on the same problems.

  Args:
    before: of an evaluation, by way of sampling and domain.
    after: of a later one.

  Returns:
    For each way and domain both accuracies with their 95 % intervals, the
    difference with its own, from the paired problems, and the ratio.
  """
  gains = []
  for way, domains in after.items():
    for domain, new in domains.items():
      old = before[way][domain]
      if old['problems'] != new['problems']:
        raise ValueError(
          f'evaluation: {domain} was asked other problems at the end, expected '
          'the same'
        )
      differences = np.array(new['passed']) / new['samples']
      differences = differences - np.array(old['passed']) / old['samples']
      n = len(differences)
      error = float(differences.std(ddof=1)) / math.sqrt(n) if n > 1 else 1.0
      gains.append(
        {
          'way': way,
          'domain': domain,
          'n': n,
          'before': [old['pass@1'], old['low'], old['high']],
          'after': [new['pass@1'], new['low'], new['high']],
          'gain': float(differences.mean()),
          'gain_error': _Z * error,
          # Of nothing there is no ratio, and JSON has no infinity.
          'ratio': new['pass@1'] / old['pass@1'] if old['pass@1'] else None,
          'length': [old['length'], new['length']],
          'truncated': [old['truncated'], new['truncated']],
        }
      )
  return gains


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
  """The run in a few lines."""
  last = found['steps'][-1]
  lines = [
    f'{last["step"]} optimizer steps on {int(last["batch"]) + 1} rollout '
    f'batches in {last["time/total_s"]:.0f} s.'
  ]
  for gain in found['gains']:
    times = _times(gain['ratio'], '.1f')
    lines.append(
      f'Held-out {gain["domain"]}, {gain["way"]}: pass@1 '
      f'{gain["before"][0]:.1%} before, {gain["after"][0]:.1%} after '
      f'({100 * gain["gain"]:+.1f} points, {times} times), n '
      f'{gain["n"]}.'
    )
  if 'compute/rl_over_pretraining' in last:
    lines.append(
      f'RL took {last["compute/rl_over_pretraining"]:.1%} of the FLOPs before '
      f'it; the paper says more than {_PAPER_FRACTION:.0%}.'
    )
  return lines


def _sections(found: Mapping[str, Any]) -> list[Section]:
  steps = found['steps']
  sections = []
  if found['gains']:
    sections.append(
      Section(
        title='Held-out accuracy',
        sentence='pass@1 on problems whose prompts occur nowhere in training, '
        'before and after RL, with 95 % intervals; the gain is over the same '
        'problems. "sampled" draws as the evaluation config says, "greedy" '
        'takes the most likely token.',
        table=_gain_table(found['gains']),
      )
    )
  sections += [
    Section(
      title='Compute',
      sentence='Model FLOPs: what the architecture needs for the tokens there '
      'were, without padding and without what remat makes again. Evaluation is '
      'not part of RL.',
      table=_compute_table(steps),
    ),
    Section(
      title='Time',
      sentence='Seconds of all steps by what was done in them.',
      table=_time_table(steps),
    ),
    Section(
      title='Rollouts',
      sentence='Means over the first and the last tenth of the rollout '
      'batches.',
      table=_trend_table(steps, _ROLLOUT_PREFIXES),
    ),
    Section(
      title='Every metric',
      sentence='Over all steps that have it. `sampler/...` is the trainer '
      'against the sampler with the same weights, `grpo/...` the policy that '
      'learns against the sampler, `mismatch/...` the share of (token, layer) '
      'pairs whose experts or keys would be others without replay.',
      table=_metric_table(steps),
    ),
  ]
  if found['examples']:
    sections.append(
      Section(
        title='Examples',
        sentence='Responses of the first and the last rollout batches.',
        table=_example_table(found['examples']),
      )
    )
  return sections


def _gain_table(gains: Sequence[Mapping]) -> pages.Table:
  def with_interval(values: Sequence[float]) -> str:
    return f'{values[0]:.1%} ({values[1]:.1%} to {values[2]:.1%})'

  rows = [
    [
      gain['domain'],
      gain['way'],
      str(gain['n']),
      with_interval(gain['before']),
      with_interval(gain['after']),
      f'{100 * gain["gain"]:+.1f} ± {100 * gain["gain_error"]:.1f}',
      _times(gain['ratio'], '.2f'),
      f'{gain["length"][0]:.1f} to {gain["length"][1]:.1f}',
      f'{gain["truncated"][0]:.1%} to {gain["truncated"][1]:.1%}',
    ]
    for gain in gains
  ]
  return (
    'domain,way,n,before,after,points gained,times,tokens,truncated'
  ).split(','), rows


def _compute_table(steps: Sequence[Mapping]) -> pages.Table:
  last = steps[-1]
  total = last['compute/rl_flops']
  fraction = last.get('compute/rl_over_pretraining')
  rows = []
  if fraction:
    before = total / fraction
    rows.append(['before RL (pre-training, cold start)', f'{before:.3e}', ''])
  names = {
    'rollout': 'rollouts',
    'scoring': 'reference and scoring',
    'training': 'training',
  }
  for key, name in names.items():
    flops = last[f'compute/{key}_flops']
    rows.append([name, f'{flops:.3e}', f'{flops / max(total, 1):.1%}'])
  rows.append(['RL', f'{total:.3e}', '100.0%'])
  flops = last['compute/evaluation_flops']
  rows.append(['evaluation', f'{flops:.3e}', f'{flops / max(total, 1):.1%}'])
  if fraction:
    rows.append(['RL over before RL', f'{fraction:.1%}', ''])
  return ['part', 'FLOPs', 'of RL'], rows


_TIMES = {
  'rollout': 'rollouts',
  'reward': 'rewards',
  'pack': 'packing minibatches',
  'reference': 'reference scores',
  'update': 'updates',
  'compile': 'compiling updates',
}


def _time_table(steps: Sequence[Mapping]) -> pages.Table:
  total = steps[-1]['time/total_s']
  rows, known = [], 0.0
  for key, name in _TIMES.items():
    seconds = sum(line.get(f'time/{key}_s', 0.0) for line in steps)
    known += seconds
    rows.append([name, f'{seconds:.1f}', f'{seconds / total:.1%}'])
  rest = max(total - known, 0.0)
  rows.append(
    ['evaluations, checkpoints, the rest', f'{rest:.1f}', f'{rest / total:.1%}']
  )
  rows.append(['all', f'{total:.1f}', '100.0%'])
  samples = sum(line.get('rollout/responses', 0.0) for line in steps)
  for key, name in (('rollout', 'sampling'), ('update', 'updating')):
    # Compilation is in the first call, which is left out.
    seconds = sum(line.get(f'time/{key}_s', 0.0) for line in steps)
    rate = samples / seconds if seconds else 0.0
    rows.append([f'samples a second while {name}', f'{rate:.1f}', ''])
  return ['part', 'seconds', 'of all'], rows


_ROLLOUT_PREFIXES = ('reward', 'outcome', 'rollout/', 'equal_groups', 'eval/')


def _trend_table(
  steps: Sequence[Mapping], prefixes: tuple[str, ...]
) -> pages.Table:
  rows = []
  for name in _names(steps):
    if name.startswith(prefixes):
      values = [line[name] for line in steps if name in line]
      part = max(len(values) // 10, 1)
      first, last = np.mean(values[:part]), np.mean(values[-part:])
      rows.append([name, _number(first), _number(last), str(len(values))])
  return ['metric', 'first tenth', 'last tenth', 'batches'], rows


def _metric_table(steps: Sequence[Mapping]) -> pages.Table:
  rows = []
  for name in _names(steps):
    values = [line[name] for line in steps if name in line]
    values = [value for value in values if not isinstance(value, str)]
    if values:
      numbers = (values[0], values[-1], min(values), max(values))
      mean = float(np.mean(values))
      rows.append([name, *(_number(v) for v in (*numbers, mean))])
  return ['metric', 'first', 'last', 'least', 'most', 'mean'], rows


def _example_table(examples: Sequence[Mapping]) -> pages.Table:
  chosen = [*examples[:4], *examples[4:][-4:]]
  rows = [
    [
      str(line['batch']),
      _short(line['prompt']),
      _short(line['text']),
      f'{line["reward"]:.2f}',
    ]
    for line in chosen
  ]
  return ['batch', 'prompt', 'response', 'reward'], rows


def _names(steps: Sequence[Mapping]) -> list[str]:
  return sorted({name for line in steps for name in line} - {'step'})


def _number(value: float) -> str:
  return f'{value:.4g}'


def _short(text: str) -> str:
  text = ' '.join(text.split())
  if len(text) > _SHOWN_TEXT:
    return f'{text[:_SHOWN_TEXT]} ...'
  return text


def _times(ratio: float | None, form: str) -> str:
  return '-' if ratio is None else f'{ratio:{form}}'
