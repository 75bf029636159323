"""What a chain of distillation came to, as numbers (docs/distillation.md).

Reads the files of a work directory (`dsv32_jax.rl.specialists`) and nothing
else, so that a report can be made again at any time.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from dsv32_jax.evaluation import paired

BASE, STUDENT, MIXED = 'base', 'student', 'mixed'


def collect(workdir: pathlib.Path) -> dict[str, Any]:
  """The results of a chain whose evaluations are done.

  Returns:
    `pairs`: for each (domain, mode) the accuracies of base, specialist, student
    and student after mixed RL, and the paired differences `specialist_base`,
    `student_specialist` and `mixed_specialist`, as fractions with intervals,
    the mean length of answers and a hash of the weights of each;
    `samples`: what became of the specialists' answers; `unpopulated`: domains
    without problems, and why; `steps`: seconds of each.

  Raises:
    ValueError: naming an evaluation that is not there, or two models that did
      not answer the same problems.
  """
  config = json.loads((workdir / 'config.json').read_text('utf-8'))['config']
  found: dict[str, Any] = {'pairs': {}, 'samples': {}, 'unpopulated': {}}
  for domain, settings in config['domains'].items():
    if settings['unpopulated']:
      found['unpopulated'][domain] = settings['unpopulated']
      continue
    for mode in settings['modes']:
      name = f'{domain}-{mode}'
      found['pairs'][name] = _pair(workdir, name)
      found['samples'][name] = _step(workdir, f'samples.{name}')['counts']
  found['steps'] = {
    path.stem: json.loads(path.read_text('utf-8'))['seconds_of_last_session']
    for path in sorted((workdir / 'steps').glob('*.json'))
  }
  return found


def _pair(workdir: pathlib.Path, name: str) -> dict[str, Any]:
  models = {
    'base': BASE,
    'specialist': name,
    'student': STUDENT,
    'mixed': MIXED,
  }
  scores = {role: _scores(workdir, models[role], name) for role in models}
  asked = list(scores['base'])
  for role, part in scores.items():
    if list(part) != asked:
      raise ValueError(
        f'evaluation of {name}: base and {role} answered different problems, '
        'expected the same; evaluate again'
      )
  values = {role: list(part.values()) for role, part in scores.items()}
  summaries = {
    role: _step(workdir, f'evaluate.{model}') for role, model in models.items()
  }
  result: dict[str, Any] = {
    role: vars(paired.accuracy(values[role])) for role in models
  }
  for first, second in _DIFFERENCES:
    result[f'{first}_{second}'] = vars(
      paired.difference(values[first], values[second])
    )
  result['mean_tokens'] = {
    role: part['pairs'][name]['mean_tokens'] for role, part in summaries.items()
  }
  result['weights'] = {
    role: part['weights'] for role, part in summaries.items()
  }
  return result


_DIFFERENCES = (
  ('specialist', 'base'),
  ('student', 'specialist'),
  ('mixed', 'specialist'),
)


def _scores(workdir: pathlib.Path, model: str, name: str) -> dict[str, float]:
  """Score by problem, in the order in which they were asked."""
  wanted = _step(workdir, f'evaluate.{model}')['pairs'][name]['problems']
  scores: dict[str, float] = {}
  for path in sorted((workdir / 'evaluation' / model / name).glob('part-*')):
    part = json.loads(path.read_text('utf-8'))
    scores.update(zip(part['problems'], part['scores'], strict=True))
  if len(scores) != wanted:
    raise ValueError(
      f'evaluation/{model}/{name}: holds {len(scores)} problems, expected the '
      f'{wanted} that were asked'
    )
  return scores


def _step(workdir: pathlib.Path, name: str) -> Mapping[str, Any]:
  path = workdir / 'steps' / f'{name}.json'
  if not path.exists():
    raise ValueError(f'{path}: does not exist, expected step {name} to be done')
  return json.loads(path.read_text('utf-8'))
