import signal
import sys
import threading
import time

import pytest

from dsv32_jax.sharding.hosts.local_processes import Command, LocalProcesses


def start(*programs: str, **environment: str):
  lines: list[str] = []
  processes = LocalProcesses(
    [
      Command(argv=(sys.executable, '-c', text), environment=environment)
      for text in programs
    ],
    report=lines.append,
  )
  return processes, lines


def test_wait_passes_lines_on_with_the_number():
  show = 'import os; print(os.environ["WORD"])'
  processes, lines = start(show, show, WORD='hello')
  with processes:
    assert processes.wait(grace_s=5.0) == 0
  assert sorted(lines) == ['[0] hello', '[1] hello']


@pytest.mark.parametrize(
  ('program', 'status', 'line'),
  [
    ('raise SystemExit(3)', 3, '[launch] process 1 ended with status 3'),
    (
      'import os; os.kill(os.getpid(), 9)',
      137,
      '[launch] process 1 was ended by SIGKILL',
    ),
  ],
)
def test_wait_one_fails_and_the_others_end_by_themselves(program, status, line):
  processes, lines = start('import time; time.sleep(0.5)', program)
  with processes:
    assert processes.wait(grace_s=30.0) == status
  assert lines == [line]


def test_wait_one_fails_and_the_others_are_killed_after_the_grace():
  processes, lines = start('import time; time.sleep(60)', 'raise SystemExit(3)')
  began = time.monotonic()
  with processes:
    assert processes.wait(grace_s=0.2) == 3
  assert time.monotonic() - began < 20
  assert lines == [
    '[launch] process 1 ended with status 3',
    '[launch] the others still run 0.2 s later and are killed',
    '[launch] process 0 was ended by SIGKILL',
  ]


def test_wait_sigterm_is_passed_on():
  program = (
    'import signal, sys, time\n'
    'signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n'
    'print("ready", flush=True)\n'
    'time.sleep(60)'
  )
  processes, lines = start(program, program)

  def interrupt() -> None:
    while len(lines) < 2:
      time.sleep(0.01)
    signal.raise_signal(signal.SIGTERM)

  with processes:
    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    assert processes.wait(grace_s=30.0) == 143
    thread.join()
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_exit_ends_what_still_runs():
  processes, _ = start('import time; time.sleep(60)')
  began = time.monotonic()
  with processes:
    pass
  assert time.monotonic() - began < 20
