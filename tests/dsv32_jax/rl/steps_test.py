import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from dsv32_jax.rl.steps import Step, StepFailed, Steps

ROOT = pathlib.Path(__file__).resolve().parents[3]

# A program of four steps: two that need the first, and one that needs those.
# A step appends its name to a file; one of them fails, or hangs, if told to.
PROGRAM = """
import pathlib, sys, time
from dsv32_jax.rl.steps import Step, Steps, command_of_this_program
workdir = pathlib.Path(sys.argv[1])
flags = dict(a[2:].split('=') for a in sys.argv[2:])
def body(name):
  def run():
    with open(workdir / 'ran.txt', 'a') as file:
      file.write(name + '\\n')
    if flags.get('fail') == name:
      sys.exit('out of luck')
    while (workdir / f'hang-{name}').exists():
      time.sleep(0.02)
    return {'said': name}
  return run
steps = Steps([
  Step(name='first', run=body('first')),
  Step(name='left', needs=('first',), run=body('left')),
  Step(name='right', needs=('first',), run=body('right')),
  Step(name='last', needs=('left', 'right'), run=body('last')),
], workdir)
steps.run(only=flags.get('step'), workers=int(flags.get('workers', 1)),
          command=command_of_this_program())
"""


def start(directory: pathlib.Path, *arguments: str) -> subprocess.Popen:
  program = directory / 'program.py'
  program.write_text(PROGRAM, encoding='utf-8')
  workdir = directory / 'work'
  workdir.mkdir(exist_ok=True)
  return subprocess.Popen(
    (sys.executable, str(program), str(workdir), *arguments),
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def ran(directory: pathlib.Path) -> list[str]:
  return (directory / 'work' / 'ran.txt').read_text().split()


def wait_for(condition, seconds: float = 30.0) -> None:
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, 'it did not happen'
    time.sleep(0.02)


def chain(workdir: pathlib.Path, log: list[str], *, fail: str = '') -> Steps:
  def body(name):
    def run():
      log.append(name)
      if name == fail:
        raise ValueError('out of luck')
      return {'said': name}

    return run

  return Steps(
    [
      Step(name='first', run=body('first')),
      Step(name='second', needs=('first',), run=body('second')),
    ],
    workdir,
    report=lambda line: None,
  )


def test_steps_run_once_in_order_and_remember_their_results(tmp_path):
  log = []
  chain(tmp_path, log).run()
  again = chain(tmp_path, log)
  again.run()
  assert log == ['first', 'second']
  assert again.is_done('second')
  assert again.result('first')['said'] == 'first'


def test_steps_failed_one_is_not_done_and_runs_again(tmp_path):
  log = []
  with pytest.raises(ValueError, match='out of luck'):
    chain(tmp_path, log, fail='second').run()
  assert not chain(tmp_path, log).is_done('second')
  chain(tmp_path, log).run()
  assert log == ['first', 'second', 'second']


def test_steps_one_before_its_needs_is_refused(tmp_path):
  steps = chain(tmp_path, [])
  with pytest.raises(ValueError, match="'second' needs 'first', which is not"):
    steps.run(only='second')
  with pytest.raises(ValueError, match="step: got 'third', expected one of"):
    steps.run(only='third')


def test_steps_in_an_impossible_order_are_refused(tmp_path):
  step = Step(name='a', needs=('b',), run=dict)
  with pytest.raises(ValueError, match="'a' needs 'b', expected that before"):
    Steps([step], tmp_path)


@pytest.mark.slow
def test_steps_side_by_side_run_each_once_after_what_it_needs(tmp_path):
  process = start(tmp_path, '--workers=2')
  output, _ = process.communicate(timeout=60)
  assert process.returncode == 0, output
  order = ran(tmp_path)
  assert order[0] == 'first'
  assert sorted(order[1:3]) == ['left', 'right']
  assert order[3:] == ['last']
  assert 'left: started' in output
  found = json.loads((tmp_path / 'work' / 'steps' / 'last.json').read_text())
  assert found['said'] == 'last'


@pytest.mark.slow
def test_steps_side_by_side_failure_names_step_and_log(tmp_path):
  process = start(tmp_path, '--workers=2', '--fail=right')
  output, _ = process.communicate(timeout=60)
  assert process.returncode == 1
  assert StepFailed.__name__ in output
  assert 'step right ended with status 1: out of luck' in output
  assert not (tmp_path / 'work' / 'steps' / 'last.json').exists()


@pytest.mark.slow
def test_steps_side_by_side_terminated_ends_its_processes(tmp_path):
  (tmp_path / 'work').mkdir()
  for name in ('left', 'right'):
    (tmp_path / 'work' / f'hang-{name}').touch()
  process = start(tmp_path, '--workers=2')
  wait_for(lambda: (tmp_path / 'work' / 'ran.txt').exists())
  wait_for(lambda: len(ran(tmp_path)) == 3)
  process.send_signal(signal.SIGTERM)
  output, _ = process.communicate(timeout=60)
  assert process.returncode == 128 + signal.SIGTERM, output
  # Nobody holds the steps any more: they run when they are not told to hang.
  for name in ('left', 'right'):
    (tmp_path / 'work' / f'hang-{name}').unlink()
  again = start(tmp_path)
  output, _ = again.communicate(timeout=60)
  assert again.returncode == 0, output
  assert 'another process' not in output
  assert ran(tmp_path)[-1] == 'last'


@pytest.mark.slow
def test_steps_left_running_by_a_killed_parent_are_waited_for(tmp_path):
  (tmp_path / 'work').mkdir()
  (tmp_path / 'work' / 'hang-first').touch()
  process = start(tmp_path, '--workers=2')
  wait_for(lambda: (tmp_path / 'work' / 'ran.txt').exists())
  process.kill()
  process.communicate(timeout=60)
  again = start(tmp_path)
  assert again.stdout is not None
  assert 'another process is at it' in again.stdout.readline()
  (tmp_path / 'work' / 'hang-first').unlink()
  output, _ = again.communicate(timeout=60)
  assert again.returncode == 0, output
  assert 'first: done meanwhile, skipped' in output
  assert ran(tmp_path).count('first') == 1
