import sys

import pytest

from dsv32_jax.evaluation import turns

ECHO = """
import json, sys
print('noise')
print(json.dumps({'ready': True}), flush=True)
for line in sys.stdin:
  if line.strip() == 'fail':
    sys.exit('it failed so')
  print(json.dumps({'got': line.strip()}), flush=True)
"""


@pytest.fixture
def worker(tmp_path):
  worker = turns.Worker('echo', [sys.executable, '-c', ECHO], tmp_path / 'log')
  yield worker
  worker.kill()


def test_worker_answers_its_start_and_every_line(worker):
  assert worker.answer() == {'ready': True}
  assert worker.ask(3) == {'got': '3'}
  assert worker.ask('x') == {'got': 'x'}
  worker.close()


def test_worker_that_ended_is_reported_with_its_log(worker):
  worker.answer()
  with pytest.raises(RuntimeError, match='echo ended:\nit failed so'):
    worker.ask('fail')
