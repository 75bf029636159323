import dataclasses
import json

import pytest

from dsv32_jax.agents.synthesis import tasks

TASK = tasks.TaskRecord(
  id='general-00001-0',
  family='general',
  domain='trip_planning',
  environment='general-00001',
  seed=3,
  index=1,
  made_by='procedural',
  prompt='Plan a trip — ‘soon’.',
  spec={'given': ['a'], 'constraints': []},
  difficulty={'rows': 3},
  names=('Lyon', 'Nice'),
)


def test_records_written_and_read_are_the_same(tmp_path):
  path = tmp_path / 'tasks.jsonl'
  written = [TASK, dataclasses.replace(TASK, id='other')]
  tasks.write(path, written)
  assert list(tasks.read(path)) == written
  assert [x.name for x in tmp_path.iterdir()] == ['tasks.jsonl']


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'version': 99}, 'version: got 99, expected 1'),
    ({'surprise': 1}, 'task: got fields'),
  ],
)
def test_foreign_record_is_refused_by_line(change, message, tmp_path):
  path = tmp_path / 'tasks.jsonl'
  good = tasks.to_line(TASK)
  path.write_text(good + '\n' + json.dumps({**json.loads(good), **change}))
  with pytest.raises(ValueError, match=rf'tasks\.jsonl:2: {message}'):
    list(tasks.read(path))
