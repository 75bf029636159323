import os
import pathlib
import re
import time

import pytest

from dsv32_jax.rl.rewards.workers import Call, WorkerPool

MODULE = """
import os, sys, time
COUNT = 0

def double(x):
  return 2 * x

def count():
  global COUNT
  COUNT += 1
  return COUNT

def speak(x):
  print('noise on the way', flush=True)
  os.write(1, b'more noise\\n')
  sys.stdin.read(1)
  return x

def fail(text):
  raise KeyError(text)

def hang():
  time.sleep(60)

def spin():
  while True: pass

def die():
  os._exit(3)

def grow():
  return len(bytearray(1 << 34))

def strange():
  return object()

def need():
  import nonsense_that_is_not_there

def pid():
  return os.getpid()

def loaded():
  return [name for name in sys.modules if name.split('.')[0] in
          ('jax', 'flax', 'dsv32_jax', 'numpy')]
"""


@pytest.fixture(scope='module')
def modules(tmp_path_factory):
  path = tmp_path_factory.mktemp('modules') / 'own.py'
  path.write_text(MODULE)
  return {'own': path}


@pytest.fixture(scope='module')
def pool(modules):
  with WorkerPool(modules, workers=2, timeout_s=1.0) as made:
    yield made


def call(name, *arguments):
  return Call('own', name, arguments)


def test_replies_come_in_the_order_of_the_calls(pool):
  replies = pool.run([call('double', x) for x in range(50)])
  assert [reply.value for reply in replies] == [2 * x for x in range(50)]
  assert pool.run([]) == []


@pytest.mark.parametrize(
  ('bad', 'error'),
  [
    ('hang', 'took longer than 1 s'),
    ('spin', 'took longer than 1 s'),
    ('die', 'the scorer died'),
    ('grow', 'out of memory'),
    ('strange', 'TypeError: .*not JSON serializable'),
  ],
)
def test_call_that_goes_wrong_costs_itself_only(pool, bad, error):
  calls = [call('double', x) for x in range(5)]
  replies = pool.run([*calls[:2], call(bad), *calls[2:]])
  assert re.search(error, replies[2].error)
  del replies[2]
  assert [reply.value for reply in replies] == [0, 2, 4, 6, 8]


def test_exception_is_told_in_one_line(pool):
  (reply,) = pool.run([call('fail', 'a\nb')])
  assert reply.value is None
  assert reply.error == "KeyError: 'a\\nb'"


def test_what_a_scorer_prints_is_not_taken_for_a_reply(pool):
  replies = pool.run([call('speak', x) for x in range(4)])
  assert [reply.value for reply in replies] == [0, 1, 2, 3]


def test_process_is_replaced_only_when_it_has_to_be(modules):
  with WorkerPool(modules, timeout_s=0.3) as made:
    first = made.run([call('pid')])[0].value
    assert made.run([call('pid')])[0].value == first
    made.run([call('hang')])
    assert made.run([call('pid')])[0].value != first
    assert made.num_started == 2
    with pytest.raises(ProcessLookupError):
      os.kill(first, 0)


def test_process_knows_neither_jax_nor_this_project(pool):
  (reply,) = pool.run([call('loaded')])
  assert reply.value == []


def test_closed_pool_leaves_no_process(modules):
  made = WorkerPool(modules)
  pid = made.run([call('pid')])[0].value
  made.close()
  with pytest.raises(ProcessLookupError):
    os.kill(pid, 0)


def test_module_that_cannot_be_loaded_says_so(tmp_path):
  path = tmp_path / 'broken.py'
  path.write_text('import nonsense_that_is_not_there')
  with (
    WorkerPool({'own': path}) as made,
    pytest.raises(RuntimeError, match='nonsense_that_is_not_there'),
  ):
    made.run([call('pid')])


def test_package_that_is_not_installed_ends_the_run_and_costs_no_reward(
  modules,
):
  with WorkerPool(modules) as made:
    with pytest.raises(
      ModuleNotFoundError, match=r"nonsense_that_is_not_there: .* extra 'rl'"
    ):
      made.run([call('double', 1), call('need')])
    assert made.run([call('double', 2)])[0].value == 4


def test_waiting_for_a_hanging_call_ends_at_its_limit(modules):
  with WorkerPool(modules, timeout_s=0.2) as made:
    made.run([call('pid')])
    started = time.monotonic()
    made.run([call('hang')])
    assert time.monotonic() - started < 5


@pytest.mark.parametrize('options', [{'workers': 0}, {'timeout_s': 0.0}])
def test_bad_options_are_refused(options):
  with pytest.raises(ValueError, match=next(iter(options))):
    WorkerPool({'own': pathlib.Path('x')}, **options)
