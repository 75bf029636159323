"""The protocols run over many tasks, one JSON line a task, resumable.

Tasks go in groups; a group's lines are written when it is done, and groups that
are done are not run again. What a group gets depends on its place and the seed
alone, so a run that was ended anywhere goes on to the same results.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from dsv32_jax.rl.speciale.contest import compete
from dsv32_jax.rl.speciale.derivations import Task, check, parse_derivation
from dsv32_jax.rl.speciale.labels import LabelConfig, label_proofs
from dsv32_jax.rl.speciale.policy import Policy, seed_of
from dsv32_jax.rl.speciale.prompts import Attempt, DerivationDialogue
from dsv32_jax.rl.speciale.refinement import (
  RefineConfig,
  SearchConfig,
  refine,
  search,
)
from dsv32_jax.rl.speciale.selection import Contest
from dsv32_jax.rl.speciale.sizes import check_positive
from dsv32_jax.rl.speciale.sources import SpecialeSource

Protocol = Literal['refine', 'search', 'contest', 'label']
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
_REFINE, _SEARCH, _LABEL = RefineConfig(), SearchConfig(), LabelConfig()
_CONTEST = Contest(samples=32, submissions=4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProtocolConfig:
  """What is run, on how many tasks.

  Attributes:
    protocol: sequential refinement, search over a pool, contest selection, or
      labels of derivations that a program has put faults into.
    tasks: of the source, from index 0 of the held-out split on.
    at_a_time: tasks whose prompts go to the policy together.
    seed: of all draws.
    refine: sizes of 'refine'.
    search: of 'search'.
    contest: of 'contest'.
    label: of 'label'.
  """

  protocol: Protocol
  tasks: int = 64
  at_a_time: int = 16
  seed: int = 0
  refine: RefineConfig = _REFINE
  search: SearchConfig = _SEARCH
  contest: Contest = _CONTEST
  label: LabelConfig = _LABEL

  def __post_init__(self):
    if self.protocol not in PROTOCOLS:
      raise ValueError(
        f'protocol: got {self.protocol!r}, expected one of {list(PROTOCOLS)}'
      )
    check_positive(self, 'tasks', 'at_a_time')


def run(
  policy: Policy,
  source: SpecialeSource,
  config: ProtocolConfig,
  path: pathlib.Path,
  *,
  report: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
  """Runs a protocol over tasks and writes what came of each.

  Args:
    policy: the model.
    source: 'speciale/proof', or 'speciale/review' to label.
    config: what to run.
    path: of the JSON lines; its first line is the configuration.
    report: gets a line a group of tasks.

  Returns:
    The rows, in order of the tasks.

  Raises:
    ValueError: `path` is of another configuration or source.
  """
  head = {'config': dataclasses.asdict(config), 'source': source.key}
  rows = _resume(path, head, config.at_a_time)
  while len(rows) < config.tasks:
    places = range(len(rows), min(len(rows) + config.at_a_time, config.tasks))
    problems = [source.problem('held_out', place) for place in places]
    found = _RUNNERS[config.protocol](
      policy,
      source.dialogue,
      [Task(**problem.reference['task']) for problem in problems],
      [problem.reference.get('proof', '') for problem in problems],
      config,
      seed_of(config.seed, config.protocol, len(rows)),
    )
    new = [
      {'place': place} | row for place, row in zip(places, found, strict=True)
    ]
    _append(path, new)
    rows += new
    report(f'{config.protocol}: {len(rows)} of {config.tasks} tasks')
  return rows


def _resume(
  path: pathlib.Path, head: dict[str, Any], group: int
) -> list[dict[str, Any]]:
  """The rows of whole groups; the file is left with these alone."""
  head = json.loads(json.dumps(head))
  rows: list[dict[str, Any]] = []
  if path.exists():
    # Of a line that was being written when the run ended there is no end.
    lines = path.read_text(encoding='utf-8').split('\n')[:-1]
    if lines:
      old = json.loads(lines[0])
      if old != head:
        raise ValueError(
          f'{path}: holds a run of {old}, expected {head}, or another path'
        )
      rows = [json.loads(line) for line in lines[1:]]
  is_whole = len(rows) == head['config']['tasks']
  rows = rows if is_whole else rows[: len(rows) // group * group]
  path.parent.mkdir(parents=True, exist_ok=True)
  new = path.with_suffix('.new')
  with new.open('w', encoding='utf-8') as file:
    for line in (head, *rows):
      file.write(json.dumps(line) + '\n')
    file.flush()
    os.fsync(file.fileno())
  new.replace(path)
  return rows


def _append(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
  with path.open('a', encoding='utf-8') as file:
    file.write(''.join(json.dumps(row) + '\n' for row in rows))
    file.flush()
    os.fsync(file.fileno())


def _truth(task: Task, attempt: Attempt | None) -> float:
  """The true score of an attempt; 0 if none could be read."""
  if attempt is None:
    return 0.0
  return check(task, parse_derivation(attempt.proof)).score


def _refine(
  policy: Policy,
  dialogue: DerivationDialogue,
  tasks: Sequence[Task],
  proofs: Sequence[str],
  config: ProtocolConfig,
  seed: int,
) -> list[dict[str, Any]]:
  del proofs
  found = refine(policy, dialogue, tasks, config.refine, seed=seed)
  return [
    {
      'truth': [_truth(task, attempt) for attempt in one.attempts],
      'self': [a.score if a is not None else None for a in one.attempts],
      'tokens': list(one.num_tokens),
      'best_truth': _truth(task, one.best),
      'stopped': one.stopped,
    }
    for task, one in zip(tasks, found, strict=True)
  ]


def _search(
  policy: Policy,
  dialogue: DerivationDialogue,
  tasks: Sequence[Task],
  proofs: Sequence[str],
  config: ProtocolConfig,
  seed: int,
) -> list[dict[str, Any]]:
  del proofs
  rows = []
  for place, task in enumerate(tasks):
    found = search(
      policy, dialogue, task, config.search, seed=seed_of(seed, place)
    )
    truth = [_truth(task, c.attempt) for c in found.pool]
    start = [i for i, c in enumerate(found.pool) if c.round == 0]
    first = max(start, key=lambda i: found.pool[i].mean_score, default=None)
    best = None if found.best is None else found.pool.index(found.best)
    rows.append(
      {
        'rounds': found.rounds,
        'stopped': found.stopped,
        'pool': len(found.pool),
        'right_at_start': any(truth[i] == 1 for i in start),
        'right_in_pool': 1.0 in truth,
        'first_truth': 0.0 if first is None else truth[first],
        'best_truth': 0.0 if best is None else truth[best],
        'best_mean': 0.0 if best is None else found.pool[best].mean_score,
        'tokens': found.num_tokens,
        'unreadable': found.unreadable,
      }
    )
  return rows


def _contest(
  policy: Policy,
  dialogue: DerivationDialogue,
  tasks: Sequence[Task],
  proofs: Sequence[str],
  config: ProtocolConfig,
  seed: int,
) -> list[dict[str, Any]]:
  del proofs
  entries = compete(policy, dialogue, tasks, config.contest, seed=seed)
  count = config.contest.submissions
  return [
    {
      'right': sum(entry.is_right),
      'samples': len(entry.is_right),
      'failed_tests': entry.selection.failed_tests,
      'declared': entry.selection.declared,
      'submitted': len(entry.selection.submitted),
      'longest': entry.is_solved,
      'random': entry.solved_by_order(count, order='random', seed=seed + i),
      'shortest': entry.solved_by_order(count, order='shortest'),
      'unfiltered': entry.solved_by_chance(count),
      'tokens': entry.num_tokens,
    }
    for i, entry in enumerate(entries)
  ]


def _label(
  policy: Policy,
  dialogue: DerivationDialogue,
  tasks: Sequence[Task],
  proofs: Sequence[str],
  config: ProtocolConfig,
  seed: int,
) -> list[dict[str, Any]]:
  pairs = list(zip(tasks, proofs, strict=True))
  found = label_proofs(policy, dialogue, pairs, config.label, seed=seed)
  return [
    {
      'truth': check(task, parse_derivation(proof)).score,
      'label': one.label.score,
      'first': one.opinions[0].score if one.opinions else None,
      'analyses': len(one.opinions),
      'tokens': one.num_tokens,
    }
    for (task, proof), one in zip(pairs, found, strict=True)
  ]


_Runner = Callable[
  [
    Policy,
    DerivationDialogue,
    Sequence[Task],
    Sequence[str],
    ProtocolConfig,
    int,
  ],
  list[dict[str, Any]],
]
_RUNNERS: dict[Protocol, _Runner] = {
  'refine': _refine,
  'search': _search,
  'contest': _contest,
  'label': _label,
}
