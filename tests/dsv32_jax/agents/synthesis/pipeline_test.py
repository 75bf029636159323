import dataclasses
import json

import pytest

from dsv32_jax.agents.synthesis import pipeline, tasks
from dsv32_jax.agents.synthesis.general.family import GeneralFamily

FAMILIES = {'general': GeneralFamily()}


def config(environments=8, count=12, **changes):
  plan = pipeline.FamilyPlan(
    environments=environments, tasks=count, held_out=('fleet_routing',)
  )
  made = pipeline.PipelineConfig(workers=1, families={'general': plan})
  return dataclasses.replace(made, **changes)


def contents(workdir):
  names = ['tasks.jsonl', 'held_out.jsonl']
  names += sorted(
    f'databases/{x.name}' for x in (workdir / 'databases').iterdir()
  )
  return {name: (workdir / name).read_bytes() for name in names}


def test_run_writes_tasks_databases_and_report(tmp_path):
  lines = []
  made = pipeline.run(config(), FAMILIES, tmp_path, lines.append)
  found = list(tasks.read(tmp_path / 'tasks.jsonl'))
  held_out = list(tasks.read(tmp_path / 'held_out.jsonl'))
  assert {task.domain for task in held_out} == {'fleet_routing'}
  assert 'fleet_routing' not in {task.domain for task in found}
  part = made.parts['general']
  assert part.kept == len(found) + len(held_out) == made.made_now
  assert part.kept >= 10
  assert len(list((tmp_path / 'databases').glob('*.db'))) == 8
  assert not list(tmp_path.rglob('*.partial'))
  for task in found + held_out:
    database = tmp_path / 'databases' / f'{task.environment}.db'
    FAMILIES['general'].check(task, database)
  report = json.loads((tmp_path / 'report.json').read_text())
  assert report['families']['general']['kept'] == part.kept
  assert lines[-1].startswith('8/8 environments')
  # Again: nothing is left to do, and the same bytes are there.
  before = contents(tmp_path)
  assert pipeline.run(config(), FAMILIES, tmp_path).made_now == 0
  assert contents(tmp_path) == before


@pytest.mark.slow
def test_run_in_processes_comes_to_the_same_bytes(tmp_path):
  small = config(environments=4, count=6)
  pipeline.run(small, FAMILIES, tmp_path / 'one')
  two = config(environments=4, count=6, workers=2)
  pipeline.run(two, FAMILIES, tmp_path / 'two')
  assert contents(tmp_path / 'one') == contents(tmp_path / 'two')


def test_workdir_of_other_tasks_is_refused(tmp_path):
  small = config(environments=1, count=1)
  pipeline.run(small, FAMILIES, tmp_path)
  with pytest.raises(ValueError, match='seed: got 1, expected 0'):
    pipeline.run(config(environments=1, count=1, seed=1), FAMILIES, tmp_path)


def test_environment_that_fails_is_named(tmp_path):
  class Broken(GeneralFamily):
    def make(self, **arguments):
      raise KeyError('inside')

  with pytest.raises(RuntimeError, match=r'general-00000 with seed 0: KeyErr'):
    pipeline.run(config(), {'general': Broken()}, tmp_path)


def test_near_duplicates_go_and_are_counted(tmp_path):
  class Twice(GeneralFamily):
    def make(self, *, index, **arguments):
      return super().make(index=index // 2, **arguments)

  small = config(environments=4, count=4)
  made = pipeline.run(small, {'general': Twice()}, tmp_path)
  part = made.parts['general']
  assert part.near_duplicates == part.kept > 0


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (
      lambda: pipeline.FamilyPlan(environments=0, tasks=1),
      'environments: got 0',
    ),
    (lambda: pipeline.FamilyPlan(environments=3, tasks=2), 'tasks: got 2'),
    (lambda: pipeline.PipelineConfig(), 'families: got none'),
    (lambda: config(workers=0), 'workers: got 0'),
  ],
)
def test_impossible_plan_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_family_that_nobody_makes_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"families: got \['general'\]"):
    pipeline.run(config(), {}, tmp_path)


def test_quotas_add_up_to_the_plan():
  plan = pipeline.FamilyPlan(environments=1827, tasks=4417)
  quotas = [plan.quota(index) for index in range(1827)]
  assert sum(quotas) == 4417
  assert set(quotas) == {2, 3}
