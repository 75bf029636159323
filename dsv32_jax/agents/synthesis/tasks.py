"""Records of synthesised tasks: versioned JSONL."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

VERSION = 1
"""Of the form of a record. A reader refuses another one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskRecord:
  """A task that passed every check.

  Attributes:
    id: unique: family, environment and number in it.
    family: who makes, checks and opens it ('general').
    domain: kind of environment within the family; splits hold out by it.
    environment: name of its environment, and of its database file.
    seed: of the whole data set.
    index: of the environment in its family.
    made_by: 'procedural', or 'model:NAME' of whoever wrote the task.
    prompt: what the agent reads.
    spec: what the family's verifier needs.
    solution: source of the reference solution; '' if the family has none.
    answer: the reference's.
    difficulty: named numbers.
    names: entities that the prompt names, masked to compare prompts.
  """

  id: str
  family: str
  domain: str
  environment: str
  seed: int
  index: int
  made_by: str
  prompt: str
  spec: Mapping[str, Any]
  solution: str = ''
  answer: str = ''
  difficulty: Mapping[str, int | float] = dataclasses.field(
    default_factory=dict
  )
  names: tuple[str, ...] = ()

  def to_json(self) -> dict[str, Any]:
    """The record with the version of its form."""
    return {'version': VERSION, **dataclasses.asdict(self)}


def from_json(value: Mapping[str, Any]) -> TaskRecord:
  """A record from `TaskRecord.to_json`'s form.

  Raises:
    ValueError: of another version, or with other fields.
  """
  if value.get('version') != VERSION:
    raise ValueError(
      f'version: got {value.get("version")!r}, expected {VERSION}'
    )
  fields: dict[str, Any] = {
    name: one for name, one in value.items() if name != 'version'
  }
  expected = {field.name for field in dataclasses.fields(TaskRecord)}
  if set(fields) != expected:
    raise ValueError(
      f'task: got fields {sorted(fields)}, expected {sorted(expected)}'
    )
  fields['names'] = tuple(fields['names'])
  return TaskRecord(**fields)


def to_line(record: TaskRecord) -> str:
  """One line of JSON; the same record gives the same line."""
  return json.dumps(record.to_json(), ensure_ascii=False, sort_keys=True)


def write(path: pathlib.Path, records: Iterable[TaskRecord]) -> None:
  """Writes records, a line each; the file appears whole or not at all."""
  partial = path.with_name(path.name + '.partial')
  with partial.open('w', encoding='utf-8') as file:
    for record in records:
      file.write(to_line(record) + '\n')
  partial.replace(path)


def read(path: pathlib.Path) -> Iterator[TaskRecord]:
  """Reads records.

  Raises:
    ValueError: naming the line that is none.
  """
  with path.open(encoding='utf-8') as file:
    for number, line in enumerate(file, start=1):
      try:
        yield from_json(json.loads(line))
      except ValueError as error:
        raise ValueError(f'{path}:{number}: {error}') from None
