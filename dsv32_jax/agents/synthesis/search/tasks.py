"""Search tasks: proposed, proven, and kept if they are hard enough."""

import collections
import dataclasses
import json
import pathlib
import random
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from dsv32_jax.agents.synthesis.search import (
  corpus,
  documents,
  plans,
  questions,
  wording,
)
from dsv32_jax.agents.synthesis.search.answerers import ANSWERERS, Attempt
from dsv32_jax.agents.synthesis.search.index import Index
from dsv32_jax.agents.synthesis.search.plans import Plan
from dsv32_jax.agents.synthesis.search.questions import Rejected
from dsv32_jax.agents.synthesis.search.reading import Reader
from dsv32_jax.agents.synthesis.search.scoring import is_right
from dsv32_jax.agents.synthesis.search.solver import solve
from dsv32_jax.agents.synthesis.search.tools import make_tools
from dsv32_jax.agents.synthesis.search.world import World, make_world


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """Of a set of tasks.

  Attributes:
    num_entities: of each world.
    tasks_a_world: that share a world and its library.
    depths: hops, one drawn a task.
    breadths: constraints of the start, one drawn a task.
    max_attempts: proposals a task, before it is given up.

  Raises:
    ValueError: for a number that makes no sense.
  """

  num_entities: int = 2400
  tasks_a_world: int = 500
  depths: tuple[int, ...] = (2, 3, 3, 4, 5)
  breadths: tuple[int, ...] = (1, 2, 2, 3, 4)
  max_attempts: int = 200

  def __post_init__(self):
    for field in ('tasks_a_world', 'max_attempts'):
      if getattr(self, field) < 1:
        raise ValueError(
          f'{field}: got {getattr(self, field)}, expected at least 1'
        )
    if not self.depths or not 1 <= min(self.depths) <= max(self.depths) <= 8:
      raise ValueError(f'depths: got {self.depths}, expected 1 to 8 each')
    if not self.breadths or min(self.breadths) < 1:
      raise ValueError(
        f'breadths: got {self.breadths}, expected 1 or more each'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchTask:
  """A question about a world, and its one answer.

  Attributes:
    id: no other task has it.
    seed: of the set.
    world: number of the world in the set.
    number: of the task in the world.
    question: as it is asked.
    answer: the name.
    answer_type: key of `schema.TYPES`.
    names: the entities that the question names.
    depth: hops.
    breadth: constraints of the start.
    num_calls: that the reference solver made: the length of a way there.
    plan: what the question asks, for the solver and for studies.
  """

  VERSION: ClassVar[int] = 1

  id: str
  seed: int
  world: int
  number: int
  question: str
  answer: str
  answer_type: str
  names: tuple[str, ...]
  depth: int
  breadth: int
  num_calls: int
  plan: Plan

  def to_json(self) -> str:
    """One line."""
    record: dict[str, Any] = {
      'version': self.VERSION,
      'family': 'search',
      'made_by': 'procedural',
      **{
        field.name: getattr(self, field.name)
        for field in dataclasses.fields(self)
      },
      'plan': plans.to_json(self.plan),
    }
    return json.dumps(record, ensure_ascii=False)

  @classmethod
  def from_json(cls, text: str) -> 'SearchTask':
    """The task that `to_json` wrote.

    Raises:
      ValueError: if it is of another version, or no search task.
    """
    record = json.loads(text)
    for field, want in (('version', cls.VERSION), ('family', 'search')):
      if record.get(field) != want:
        raise ValueError(
          f'{field}: got {record.get(field)!r}, expected {want!r}'
        )
    values = {
      field.name: record[field.name] for field in dataclasses.fields(cls)
    }
    values['names'] = tuple(record['names'])
    values['plan'] = plans.from_json(record['plan'])
    return cls(**values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempted:
  """What came of a number.

  Attributes:
    task: None if every proposal was rejected.
    rejects: proposals that were not kept, by reason.
  """

  task: SearchTask | None
  rejects: collections.Counter[str]


class Library:
  """A world with its documents in a file: what tasks are made from."""

  def __init__(
    self, seed: int, number: int, settings: Settings, path: pathlib.Path
  ):
    """Draws the world and writes its library.

    Args:
      seed: of the set.
      number: of the world in the set.
      settings: of the set.
      path: of the file; one that is there is replaced.
    """
    self.seed, self.number = seed, number
    self.world: World = make_world(
      f'{seed}/{number}', num_entities=settings.num_entities
    )
    self.index = Index(self.world)
    corpus.write(path, documents.render(self.world))
    self._corpus = corpus.Corpus(path)
    self.reader = Reader(make_tools(self._corpus))

  def close(self) -> None:
    """Closes the file."""
    self._corpus.close()


def make_task(library: Library, number: int, settings: Settings) -> Attempted:
  """A task of a world; the same from the same arguments.

  Depth and breadth are drawn once, so that what is hard to find is not rarer.

  Args:
    library: of the world.
    number: of the task in the world.
    settings: of the set.
  """
  rng = random.Random(f'search {library.world.seed} {number}')
  depth, breadth = rng.choice(settings.depths), rng.choice(settings.breadths)
  rejects: collections.Counter[str] = collections.Counter()
  for _ in range(settings.max_attempts):
    try:
      plan, entity = questions.propose(
        library.index, rng, depth=depth, breadth=breadth
      )
      answer = library.world.name(entity)
      question = wording.question(plan, rng)
      num_calls = _check(library, plan, entity, question, rng)
    except Rejected as reason:
      rejects[str(reason)] += 1
      continue
    task = SearchTask(
      id=f'search-{library.number:05d}-{number}',
      seed=library.seed,
      world=library.number,
      number=number,
      question=question,
      answer=answer,
      answer_type=plan.answer_type,
      names=plan.names(),
      depth=depth,
      breadth=breadth,
      num_calls=num_calls,
      plan=plan,
    )
    return Attempted(task=task, rejects=rejects)
  return Attempted(task=None, rejects=rejects)


def make_tasks(
  indices: Iterable[int],
  *,
  seed: int,
  settings: Settings,
  folder: pathlib.Path,
) -> Iterator[tuple[int, Attempted]]:
  """The tasks of indices, in their order.

  Every `tasks_a_world` indices share a world; it is drawn whenever the next
  index has another one.

  Args:
    indices: best rising.
    seed: of the set.
    settings: of the set.
    folder: for the libraries, which `library_name` names.
  """
  library = None
  try:
    for index in indices:
      world, number = divmod(index, settings.tasks_a_world)
      if library is None or library.number != world:
        if library is not None:
          library.close()
        path = folder / library_name(world)
        library = Library(seed, world, settings, path)
      yield index, make_task(library, number, settings)
  finally:
    if library is not None:
      library.close()


def library_name(world: int) -> str:
  """The file of a world in the folder of a set."""
  return f'search-{world:05d}.db'


def _check(
  library: Library,
  plan: Plan,
  entity: int,
  question: str,
  rng: random.Random,
) -> int:
  """Proves a proposal; returns how many calls the solver made.

  Raises:
    Rejected: why it is not kept.
  """
  world, reader = library.world, library.reader
  if plans.answers(world, plan) != (entity,):
    raise Rejected('not_unique')
  answer = world.name(entity)
  if answer.casefold() in question.casefold():
    raise Rejected('names_its_answer')
  solution = solve(plan, reader)
  if not solution.answers:
    raise Rejected('not_found_with_tools')
  if solution.answers != (answer,):
    raise Rejected('another_answer_with_tools')
  attempt = Attempt(
    question=question, plan=plan, reader=reader, world=world, rng=rng
  )
  for name, answerer in ANSWERERS.items():
    if is_right(answerer(attempt), answer):
      raise Rejected(f'answered_by_{name}')
  return len(solution.calls)
