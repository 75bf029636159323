"""What a synthesis run came to: yield, rejects, difficulty."""

import collections
import dataclasses
import json
import pathlib
from typing import Any

from dsv32_jax.agents.synthesis.tasks import TaskRecord


@dataclasses.dataclass(kw_only=True)
class Part:
  """Counts of one family.

  Attributes:
    environments: made.
    asked: tasks that were wanted.
    kept: tasks after all filters.
    near_duplicates: tasks that were too much like an earlier one.
    rejected: drafts, by reason.
    makers: tasks by who made them.
    domains: tasks by domain.
    difficulty: of each named number, tasks by its value.
    cpu_s: processor time of making.
  """

  environments: int = 0
  asked: int = 0
  kept: int = 0
  near_duplicates: int = 0
  rejected: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  makers: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  domains: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  difficulty: dict[str, collections.Counter] = dataclasses.field(
    default_factory=dict
  )
  cpu_s: float = 0.0

  def add(self, task: TaskRecord) -> None:
    """Counts a task that is kept."""
    self.kept += 1
    self.makers[task.made_by] += 1
    self.domains[task.domain] += 1
    for name, value in task.difficulty.items():
      counts = self.difficulty.setdefault(name, collections.Counter())
      counts[round(value)] += 1

  def to_json(self) -> dict[str, Any]:
    value = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
    }
    made = self.kept + self.near_duplicates
    drafts = made + self.rejected.total()
    return value | {
      'yield': made / drafts if drafts else 0.0,
      'near_duplicate_share': self.near_duplicates / made if made else 0.0,
      'tasks_per_cpu_s': made / self.cpu_s if self.cpu_s else 0.0,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """All families.

  Attributes:
    parts: by family.
    wall_s: of this run, without what an earlier one had made.
    made_now: tasks that this run made.
  """

  parts: dict[str, Part]
  wall_s: float
  made_now: int

  def to_json(self) -> dict[str, Any]:
    return {
      'families': {name: part.to_json() for name, part in self.parts.items()},
      'wall_s': self.wall_s,
      'made_now': self.made_now,
    }

  def table(self) -> str:
    """The report as Markdown."""
    lines = [
      '| family | environments | tasks | asked | yield | near-duplicates |'
      ' tasks a CPU second | made by |',
      '|---|---|---|---|---|---|---|---|',
    ]
    for name, part in self.parts.items():
      value = part.to_json()
      lines.append(
        f'| {name} | {part.environments} | {part.kept} | {part.asked} | '
        f'{value["yield"]:.1%} | {value["near_duplicate_share"]:.2%} | '
        f'{value["tasks_per_cpu_s"]:.1f} | {_counts(part.makers)} |'
      )
    for name, part in self.parts.items():
      lines += [
        '',
        f'{name}, drafts rejected: {_counts(part.rejected) or "none"}.',
        f'{name}, tasks by domain: {_counts(part.domains)}.',
        '',
        f'| {name}: difficulty | tasks by value |',
        '|---|---|',
      ]
      for key in ('rows', 'constraints', 'rounds', 'log10_space'):
        counts = part.difficulty.get(key)
        if counts:
          shown = ', '.join(f'{x}: {counts[x]}' for x in sorted(counts))
          lines.append(f'| {key} | {shown} |')
    lines += [
      '',
      f'{self.made_now} tasks were made in {self.wall_s:.1f} s by this run.',
    ]
    return '\n'.join(lines) + '\n'

  def write(self, workdir: pathlib.Path) -> None:
    """Writes report.json and report.md."""
    text = json.dumps(self.to_json(), indent=2)
    (workdir / 'report.json').write_text(text, encoding='utf-8')
    (workdir / 'report.md').write_text(self.table(), encoding='utf-8')


def _counts(counts: collections.Counter) -> str:
  return ', '.join(f'{name} {count}' for name, count in counts.most_common())
