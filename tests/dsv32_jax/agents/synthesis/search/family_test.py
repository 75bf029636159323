import dataclasses
import pickle

import pytest

from dsv32_jax.agents.synthesis import tasks as records
from dsv32_jax.agents.synthesis.search import SearchFamily, Settings
from dsv32_jax.agents.synthesis.search.family import from_record, to_record

FAMILY = SearchFamily(
  settings=Settings(num_entities=300, depths=(2, 3), breadths=(1, 2))
)


@pytest.fixture(scope='module')
def database(tmp_path_factory):
  return tmp_path_factory.mktemp('family') / 'search.db'


@pytest.fixture(scope='module')
def made(database):
  return FAMILY.make(seed=5, index=7, tasks=6, database=database)


def test_family_makes_the_tasks_that_are_asked_for(made):
  assert len(made.tasks) == 6
  assert {task.environment for task in made.tasks} == {'search-00007'}
  assert all(task.made_by == 'procedural' for task in made.tasks)
  assert made.rejected == dict(sorted(made.rejected.items()))


def test_same_arguments_make_the_same_records(made, tmp_path, database):
  again = pickle.loads(pickle.dumps(FAMILY)).make(
    seed=5, index=7, tasks=6, database=tmp_path / 'again.db'
  )
  assert [*map(records.to_line, again.tasks)] == [
    *map(records.to_line, made.tasks)
  ]
  assert (tmp_path / 'again.db').read_bytes() == database.read_bytes()


def test_records_check_and_come_back(made, database):
  for task in made.tasks:
    FAMILY.check(task, database)
    assert to_record(from_record(task)) == task


def test_record_with_another_answer_fails_its_check(made, database):
  wrong = dataclasses.replace(made.tasks[0], answer='Nobody Inparticular')
  with pytest.raises(ValueError, match='the reference fails'):
    FAMILY.check(wrong, database)


def test_record_of_another_family_is_refused(made):
  other = dataclasses.replace(made.tasks[0], family='general')
  with pytest.raises(ValueError, match="family: got 'general'"):
    from_record(other)
