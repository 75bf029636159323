"""Search tasks as a family of the pipeline: an environment is a world."""

import collections
import dataclasses
import pathlib

from dsv32_jax.agents.synthesis.family import Made
from dsv32_jax.agents.synthesis.search import plans
from dsv32_jax.agents.synthesis.search.environment import SearchEnvironment
from dsv32_jax.agents.synthesis.search.reference import reference
from dsv32_jax.agents.synthesis.search.tasks import (
  Library,
  SearchTask,
  Settings,
  make_task,
)
from dsv32_jax.agents.synthesis.tasks import TaskRecord
from dsv32_jax.chat import Message


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchFamily:
  """Questions over invented worlds, made by a procedure and no model.

  A domain is the type of the answer.

  Attributes:
    settings: of the tasks; `tasks_a_world` is the pipeline's to say.
  """

  settings: Settings = dataclasses.field(default_factory=Settings)

  name = 'search'

  def make(
    self, *, seed: int, index: int, tasks: int, database: pathlib.Path
  ) -> Made:
    """Makes world `index`; see `Family.make`."""
    library = Library(seed, index, self.settings, database)
    found: list[TaskRecord] = []
    rejected: collections.Counter[str] = collections.Counter()
    try:
      # A number that gives no task is passed over, but not for ever.
      for number in range(tasks + tasks // 4 + 5):
        if len(found) == tasks:
          break
        attempted = make_task(library, number, self.settings)
        rejected += attempted.rejects
        if attempted.task is None:
          rejected['number_given_up'] += 1
        else:
          found.append(to_record(attempted.task))
    finally:
      library.close()
    return Made(tasks=tuple(found), rejected=dict(sorted(rejected.items())))

  def environment(
    self, task: TaskRecord, database: pathlib.Path
  ) -> SearchEnvironment:
    """Opens a task for one episode."""
    return SearchEnvironment(from_record(task), database)

  def check(self, task: TaskRecord, database: pathlib.Path) -> None:
    """Runs the reference solution again, and a mutated answer.

    Raises:
      ValueError: saying which check failed.
    """
    environment = self.environment(task, database)
    try:
      score = environment.score(reference(from_record(task), environment))
      if score.reward != 1:
        raise ValueError(f'{task.id}: the reference fails: {score.reasons}')
      mutated = Message(role='assistant', content=f'Answer: {task.answer}q')
      if environment.score((mutated,)).reward:
        raise ValueError(f'{task.id}: a mutated answer passes')
    finally:
      environment.close()


def to_record(task: SearchTask) -> TaskRecord:
  """A search task in the pipeline's form."""
  return TaskRecord(
    id=task.id,
    family='search',
    domain=task.answer_type,
    environment=f'search-{task.world:05d}',
    seed=task.seed,
    index=task.world,
    made_by='procedural',
    prompt=task.question,
    spec={'number': task.number, 'plan': plans.to_json(task.plan)},
    answer=task.answer,
    difficulty={
      'depth': task.depth,
      'breadth': task.breadth,
      'tool_calls': task.num_calls,
    },
    names=task.names,
  )


def from_record(record: TaskRecord) -> SearchTask:
  """The search task that `to_record` was given.

  Raises:
    ValueError: for a task of another family.
  """
  if record.family != 'search':
    raise ValueError(f"family: got {record.family!r}, expected 'search'")
  return SearchTask(
    id=record.id,
    seed=record.seed,
    world=record.index,
    number=record.spec['number'],
    question=record.prompt,
    answer=record.answer,
    answer_type=record.domain,
    names=record.names,
    depth=int(record.difficulty['depth']),
    breadth=int(record.difficulty['breadth']),
    num_calls=int(record.difficulty['tool_calls']),
    plan=plans.from_json(record.spec['plan']),
  )
