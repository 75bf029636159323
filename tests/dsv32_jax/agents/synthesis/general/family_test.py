"""The gate: what every task that is kept must stand."""

import dataclasses
import json
import random

import pytest

from dsv32_jax.agents.synthesis import tasks as tasks_lib
from dsv32_jax.agents.synthesis.general import (
  baselines,
  constraints,
  data,
  solution,
)
from dsv32_jax.agents.synthesis.general.domains import DOMAINS
from dsv32_jax.agents.synthesis.general.family import GeneralFamily
from dsv32_jax.agents.synthesis.general.solver import Solver
from dsv32_jax.agents.synthesis.general.verifier import Verifier
from dsv32_jax.agents.types import PolicyError, Reply, ToolError
from dsv32_jax.chat import Message, render

FAMILY = GeneralFamily()


def read_rows(domain, database):
  connection = data.connect(database)
  rows = {}
  for name in [x.name for x in (*domain.tables, *domain.relations)]:
    cursor = connection.execute(f'SELECT * FROM "{name}"')
    columns = [one[0] for one in cursor.description]
    rows[name] = [dict(zip(columns, row, strict=True)) for row in cursor]
  connection.close()
  return rows


def reward(task, database, text):
  """Of an episode that submits a text through the tool."""
  environment = FAMILY.environment(task, database)
  try:
    submit = environment.tools[-1]
    assert submit.spec.name == 'submit_result'
    assert not environment.is_over
    submit({'answer_text': text})
    assert environment.is_over
    return environment.score(()).reward
  finally:
    environment.close()


def check(task, database):
  domain = DOMAINS[task.domain]
  rows = read_rows(domain, database)
  given = task.spec['given']
  rng = random.Random(f'test/{task.id}')

  # The reference passes, by tools alone.
  environment = FAMILY.environment(task, database)
  by_name = {tool.spec.name: tool for tool in environment.tools}
  trace = solution.run(task.solution, by_name)
  assert {name for name, _ in trace} <= set(by_name)
  assert trace[-1] == ('submit_result', {'answer_text': task.answer})
  assert environment.score(()).reward == 1, environment.score(()).reasons
  environment.close()

  connection = data.connect(database)
  verifier = Verifier(domain, connection)
  found = [constraints.from_json(one) for one in task.spec['constraints']]

  def fails(answer):
    return verifier.score(json.dumps(answer), given, found).reward == 0

  for answerer in (baselines.random_answer, baselines.greedy_answer):
    for _ in range(20):
      assert fails(answerer(domain, rows, given, rng))
  assert fails(baselines.toolless_answer(domain, task.prompt, given, rng))
  changed = list(baselines.mutants(domain, rows, json.loads(task.answer)))
  for mutant in rng.sample(changed, 20):
    assert fails(mutant)
  connection.close()


def sample(folder, *, environments, tasks_each, seed=0):
  for index in range(environments):
    database = folder / f'{index}.db'
    made = FAMILY.make(
      seed=seed, index=index, tasks=tasks_each, database=database
    )
    again = FAMILY.make(
      seed=seed, index=index, tasks=tasks_each, database=folder / 'again.db'
    )
    assert database.read_bytes() == (folder / 'again.db').read_bytes()
    (folder / 'again.db').unlink()
    lines = [tasks_lib.to_line(task) for task in made.tasks]
    assert lines == [tasks_lib.to_line(task) for task in again.tasks]
    for line, task in zip(lines, made.tasks, strict=True):
      read = tasks_lib.from_json(json.loads(line))
      FAMILY.check(read, database)
      check(task, database)
    yield from made.tasks


@pytest.mark.slow
def test_tasks_of_every_domain_stand_the_checks(tmp_path):
  found = list(sample(tmp_path, environments=12, tasks_each=2))
  assert len(found) >= 22
  assert {task.domain for task in found} == set(DOMAINS)
  assert len({task.id for task in found}) == len(found)
  assert {task.made_by for task in found} == {'procedural'}


@pytest.mark.exhaustive
def test_two_hundred_tasks_stand_the_checks(tmp_path):
  found = list(sample(tmp_path, environments=84, tasks_each=3, seed=5))
  assert len(found) >= 240


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """The first task of the trip domain, and its database."""
  database = tmp_path_factory.mktemp('trip') / 'trip.db'
  family = GeneralFamily(domains=('trip_planning',))
  found = family.make(seed=2, index=0, tasks=1, database=database)
  return found.tasks[0], database


def test_trip_tools_are_those_of_the_paper(made):
  task, database = made
  environment = FAMILY.environment(task, database)
  names = {tool.spec.name for tool in environment.tools}
  assert names >= {
    'get_all_attractions_by_city',
    'get_all_cities',
    'get_all_hotels_by_city',
    'get_all_restaurants_by_city',
    'get_city_by_attraction',
    'get_city_by_hotel',
    'get_city_by_restaurant',
    'get_infos_by_attraction',
    'get_infos_by_city',
    'get_infos_by_hotel',
    'get_infos_by_restaurant',
    'get_inter_city_transport',
    'get_weather_by_city_date',
    'submit_result',
  }
  environment.close()


def test_environment_begins_with_what_the_chat_format_renders(made):
  task, database = made
  environment = FAMILY.environment(task, database)
  text = render(environment.start(), mode='thinking')
  assert task.prompt in text
  assert '"get_inter_city_transport"' in text
  assert environment.score(()).reasons == ('nothing was submitted',)
  environment.close()


@pytest.mark.parametrize(
  ('text', 'reason'),
  [
    ('no json', 'answer: not JSON'),
    ('[' * 100_000, 'answer: not JSON'),
    ('{}', 'answer: expected a list'),
    ('[1]', 'answer: expected a list'),
    ('[1, 2, 3, 4]', 'row 1: expected the fields'),
  ],
)
def test_answer_outside_of_the_space_scores_0_and_says_why(made, text, reason):
  task, database = made
  environment = FAMILY.environment(task, database)
  if text.startswith('[1, 2'):
    text = json.dumps(list(range(len(task.spec['given']))))
  environment.tools[-1]({'answer_text': text})
  score = environment.score(())
  assert score.reward == 0
  assert score.reasons[0].startswith(reason)
  environment.close()


def test_only_the_first_submission_counts(made):
  task, database = made
  environment = FAMILY.environment(task, database)
  environment.tools[-1]({'answer_text': '[]'})
  environment.tools[-1]({'answer_text': task.answer})
  assert environment.score(()).reward == 0
  environment.close()


def test_tool_errors_name_what_was_wrong(made):
  task, database = made
  environment = FAMILY.environment(task, database)
  tools = {tool.spec.name: tool for tool in environment.tools}
  for name, arguments, message in (
    ('get_all_hotels_by_city', {'city': 'Atlantis'}, "no city 'Atlantis'"),
    ('get_all_hotels_by_city', {}, r'expected \[\'city\'\]'),
    ('get_city_by_hotel', {'hotel': "' OR 1=1 --"}, 'no hotel'),
    (
      'get_infos_by_city',
      {'info_keywords': ['name"; --'], 'city': 'x'},
      'info_keywords: got',
    ),
    (
      'get_inter_city_transport',
      {'city_a': 'x', 'city_b': 'y'},
      "nothing known of 'x' and 'y'",
    ),
  ):
    with pytest.raises(ToolError, match=message):
      tools[name](arguments)
  environment.close()


def test_database_cannot_be_written_through_its_connection(made):
  _, database = made
  connection = data.connect(database)
  before = database.read_bytes()
  with pytest.raises(Exception, match='readonly'):
    connection.execute('DELETE FROM city')
  connection.close()
  assert database.read_bytes() == before


def test_check_refuses_a_task_whose_solution_does_not_fit(made):
  task, database = made
  broken = dataclasses.replace(task, solution="submit_result(answer_text='[]')")
  with pytest.raises(ValueError, match='the reference fails'):
    FAMILY.check(broken, database)


def test_unknown_domain_is_refused():
  with pytest.raises(ValueError, match=r"domains: got \['zoo'\]"):
    GeneralFamily(domains=('zoo',))


class Proposer:
  """A policy that writes one condition, first wrong and then mended."""

  def __init__(self):
    self.asked = []

  def reply(self, query):
    text = query.messages[0].content
    self.asked.append(text)
    if 'harder' in text:
      raise PolicyError('one was enough')
    column = 'price' if 'do not work' in text else 'colour'
    draft = [
      {
        'family': 'bound',
        'row': 0,
        'field': 'hotel',
        'column': column,
        'op': '<=',
        'value': 700,
      }
    ]
    return Reply(message=Message(role='assistant', content=json.dumps(draft)))


def test_model_takes_the_author_s_seat_and_the_record_says_so(tmp_path):
  policy = Proposer()
  family = GeneralFamily(
    domains=('trip_planning',), policy=policy, policy_name='tiny'
  )
  database = tmp_path / 'x.db'
  made = family.make(seed=1, index=0, tasks=1, database=database)
  (task,) = made.tasks
  assert task.made_by == 'model:tiny+procedural'
  assert any(
    one.get('value') == 700 and one['column'] == 'price'
    for one in task.spec['constraints']
    if one['family'] == 'bound'
  )
  assert any(
    "KeyError: 'hotel has no column colour'" in x for x in policy.asked
  )
  FAMILY.check(task, database)


def test_solver_finds_an_answer_that_the_verifier_takes(made):
  task, database = made
  connection = data.connect(database)
  found = [constraints.from_json(x) for x in task.spec['constraints']]
  solved = Solver(DOMAINS[task.domain], connection).solve(
    task.spec['given'], found
  )
  assert solved.is_proof
  assert reward(task, database, json.dumps(solved.answer)) == 1
  connection.close()
