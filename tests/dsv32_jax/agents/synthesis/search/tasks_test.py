import collections
import functools
import pathlib
import random
import subprocess
import sys

import pytest

from dsv32_jax.agents.synthesis.search import (
  Attempted,
  Library,
  SearchEnvironment,
  SearchTask,
  Settings,
  library_name,
  make_task,
  make_tasks,
  reference,
)
from dsv32_jax.agents.synthesis.search import plans as plans_lib
from dsv32_jax.agents.synthesis.search.world import World, make_world
from dsv32_jax.chat import Message, render

ROOT = pathlib.Path(__file__).parents[5]
SETTINGS = Settings(num_entities=600, tasks_a_world=12)
SEED = 3


def reply(text: str) -> Message:
  return Message(role='assistant', content=text)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('libraries')


def sample(num_tasks: int, folder, settings=SETTINGS) -> list[Attempted]:
  made = make_tasks(
    range(num_tasks), seed=SEED, settings=settings, folder=folder
  )
  return [one for _, one in made]


@pytest.fixture(scope='module')
def made(folder):
  return sample(20, folder)


@pytest.fixture(scope='module')
def tasks(made):
  return [one.task for one in made if one.task is not None]


def test_most_indices_give_a_task_and_rejects_are_counted(made, tasks):
  assert len(tasks) >= 15
  assert len({task.id for task in tasks}) == len(tasks)
  rejects = sum((one.rejects for one in made), collections.Counter())
  assert rejects['no_description'] > 0
  for one in made:
    if one.task is None:
      assert sum(one.rejects.values()) == SETTINGS.max_attempts


@functools.cache
def world_of(number: int) -> World:
  return make_world(f'{SEED}/{number}', num_entities=SETTINGS.num_entities)


def check_scores(task: SearchTask, folder) -> None:
  """The reference answer passes; what is drawn or mutated does not."""
  rng = random.Random(task.id)
  world = world_of(task.world)
  environment = SearchEnvironment(task, folder / library_name(task.world))
  try:
    start = tuple(environment.start())
    names = world.names_of(task.answer_type)
    wrong = [name for name in names if name != task.answer]
    for name in rng.choices(wrong, k=20):
      score = environment.score((*start, reply(f'Answer: {name}')))
      assert score.reward == 0.0, (task.id, name)
    place = rng.randrange(len(task.answer))
    cut = task.answer[:place] + 'q' + task.answer[place:]
    for mutated in (cut, f'{task.answer} the Elder', task.answer[1:]):
      assert environment.score((reply(f'Answer: {mutated}'),)).reward == 0.0
    for text in (f'Answer: {task.answer}', f'**Answer:** {task.answer}.'):
      assert environment.score((*start, reply(text))).reward == 1.0
    solution = reference(task, environment)
    render(solution)
    assert environment.score(solution).reward == 1.0
    calls = [call for m in solution for call in m.tool_calls]
    assert len(calls) == task.num_calls
    found = plans_lib.answers(world, task.plan)
    assert [world.name(one) for one in found] == [task.answer]
  finally:
    environment.close()


def test_reference_passes_and_other_answers_fail(tasks, folder):
  for task in tasks[:5]:
    check_scores(task, folder)


@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_reference_passes_and_other_answers_fail_for_200_tasks(tmp_path):
  tasks = [one.task for one in sample(210, tmp_path) if one.task][:200]
  assert len(tasks) > 180
  for task in tasks:
    check_scores(task, tmp_path)


_PRINT = """
import pathlib, sys
from dsv32_jax.agents.synthesis.search import Settings, make_tasks
settings = Settings(num_entities=600, tasks_a_world=12)
order = [int(index) for index in sys.argv[2:]]
for _, made in make_tasks(
  order, seed=3, settings=settings, folder=pathlib.Path(sys.argv[1])
):
  print(made.task and made.task.to_json(), sorted(made.rejects.items()))
"""


def test_regenerating_in_another_process_and_order_is_byte_identical(
  made, folder, tmp_path
):
  order = [13, 3, 12, 0]
  out = subprocess.run(
    [sys.executable, '-c', _PRINT, str(tmp_path), *map(str, order)],
    cwd=ROOT,
    env={'PYTHONHASHSEED': '77', 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    check=True,
  )
  want = [
    f'{made[i].task and made[i].task.to_json()} '
    f'{sorted(made[i].rejects.items())}'
    for i in order
  ]
  assert out.stdout.splitlines() == want
  for path in tmp_path.iterdir():
    assert path.read_bytes() == (folder / path.name).read_bytes()


def test_task_is_read_back_from_its_line(tasks):
  for task in tasks:
    line = task.to_json()
    assert '\n' not in line
    assert SearchTask.from_json(line) == task


def test_line_of_another_version_is_refused(tasks):
  line = tasks[0].to_json().replace('"version": 1', '"version": 9')
  with pytest.raises(ValueError, match='version: got 9, expected 1'):
    SearchTask.from_json(line)


def test_question_does_not_name_its_answer_but_all_anchors(tasks):
  for task in tasks:
    assert task.answer.casefold() not in task.question.casefold()
    for name in task.names:
      assert name in task.question
    assert (task.depth, task.breadth) == (
      len(task.plan.hops),
      len(task.plan.constraints),
    )


def test_every_constraint_of_the_start_is_needed(tasks, folder):
  library = Library(SEED, 0, SETTINGS, folder / 'again.db')
  checked = 0
  for task in tasks:
    constraints = task.plan.constraints
    if task.world or len(constraints) < 2:
      continue
    for place in range(len(constraints)):
      fewer = plans_lib.Plan(
        start=task.plan.start,
        constraints=constraints[:place] + constraints[place + 1 :],
        hops=(),
      )
      assert len(plans_lib.answers(library.world, fewer)) > 1
      checked += 1
  library.close()
  assert checked > 5


def test_index_that_no_proposal_fits_gives_no_task(folder):
  settings = Settings(
    num_entities=600, tasks_a_world=12, breadths=(9,), max_attempts=5
  )
  library = Library(SEED, 0, settings, folder / 'again.db')
  one = make_task(library, 0, settings)
  library.close()
  assert one.task is None
  assert sum(one.rejects.values()) == 5


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('tasks_a_world', 0),
    ('max_attempts', 0),
    ('depths', ()),
    ('depths', (9,)),
    ('breadths', (0,)),
  ],
)
def test_settings_that_make_no_sense_are_refused(field, value):
  with pytest.raises(ValueError, match=field):
    Settings(**{field: value})
