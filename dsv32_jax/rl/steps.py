"""Named steps that need each other: run once, in order or side by side.

A step that is done leaves a file, written last, and is not run again. A step
that was cut short is run again and continues by its own means. Steps that do
not need each other may run in processes of their own, each of which runs the
same program with the name of one step.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from dsv32_jax.checkpoints import integrity

Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """One step.

  Attributes:
    name: without '/'.
    needs: names of the steps that must be done before.
    run: does it, continuing what an earlier attempt left; returns what is to be
      remembered of it, as JSON values.
  """

  name: str
  needs: tuple[str, ...] = ()
  run: Callable[[], Mapping[str, Any]]


class Steps:
  """Steps in a work directory.

  <workdir>/steps/<name>.json says that a step is done, and what came of it;
  <workdir>/logs/<name>.log is what it printed in a process of its own.
  """

  def __init__(
    self,
    steps: Sequence[Step],
    workdir: pathlib.Path,
    *,
    report: Report = print,
  ):
    """Takes steps in an order in which they can run.

    Args:
      steps: each after those that it needs.
      workdir: made if it is not there.
      report: receives lines for the user.

    Raises:
      ValueError: if a step comes before one that it needs.
    """
    self._steps: dict[str, Step] = {}
    for step in steps:
      for name in step.needs:
        if name not in self._steps:
          raise ValueError(
            f'steps: {step.name!r} needs {name!r}, expected that before it'
          )
      self._steps[step.name] = step
    self._workdir = workdir
    self._report = report

  @property
  def names(self) -> tuple[str, ...]:
    return tuple(self._steps)

  def is_done(self, name: str) -> bool:
    return self._path('steps', name, 'json').exists()

  def result(self, name: str) -> dict[str, Any]:
    """What a step that is done remembered, and how long it took."""
    return json.loads(self._path('steps', name, 'json').read_text('utf-8'))

  def run(
    self,
    *,
    only: str | None = None,
    workers: int = 1,
    command: Sequence[str] = (),
  ) -> None:
    """Runs the steps that are not done.

    Args:
      only: run this one alone.
      workers: so many at a time; more than 1 needs `command`.
      command: the program and its arguments; with `--step=NAME` behind them it
        runs one step.

    Raises:
      ValueError: for an unknown step or one whose needs are not done.
      StepFailed: if a step failed in its own process; the others that were
        running are ended.
    """
    if only is not None:
      self._check(only)
      self._run_one(self._steps[only])
    elif workers == 1:
      for step in self._steps.values():
        self._run_one(step)
    else:
      _Parallel(self, self._workdir, workers, command, self._report).run()

  def ready(self, running: Sequence[str]) -> list[str]:
    """Steps that could start now, in order."""
    return [
      step.name
      for step in self._steps.values()
      if step.name not in running
      and not self.is_done(step.name)
      and all(self.is_done(name) for name in step.needs)
    ]

  def _check(self, name: str) -> None:
    if name not in self._steps:
      raise ValueError(
        f'step: got {name!r}, expected one of {list(self._steps)}'
      )
    missing = [n for n in self._steps[name].needs if not self.is_done(n)]
    if missing:
      raise ValueError(
        f'step: {name!r} needs {missing[0]!r}, which is not done in '
        f'{self._workdir}; run that first'
      )

  def _run_one(self, step: Step) -> None:
    if self.is_done(step.name):
      self._report(f'{step.name}: done already, skipped')
      return
    with self._held(step.name):
      # Whoever held it may have finished it.
      if self.is_done(step.name):
        self._report(f'{step.name}: done meanwhile, skipped')
        return
      started = time.time()
      found = dict(step.run())
      found['seconds_of_last_session'] = round(time.time() - started, 1)
      path = self._path('steps', step.name, 'json')
      integrity.write_atomically(path, json.dumps(found, indent=1))
      self._report(f'{step.name}: done in {time.time() - started:.0f} s')

  @contextlib.contextmanager
  def _held(self, name: str) -> Iterator[None]:
    """Keeps other processes from the same step; waits for one that has it.

    The lock goes with the process, however it ends.
    """
    with open(self._path('steps', name, 'lock'), 'w', encoding='utf-8') as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        self._report(f'{name}: another process is at it, waiting for that')
        fcntl.flock(file, fcntl.LOCK_EX)
      yield

  def _path(self, kind: str, name: str, suffix: str) -> pathlib.Path:
    path = self._workdir / kind / f'{name}.{suffix}'
    path.parent.mkdir(parents=True, exist_ok=True)
    return path

  def open_log(self, name: str) -> TextIO:
    """The file that a step in a process of its own prints to."""
    return open(self._path('logs', name, 'log'), 'a', encoding='utf-8')

  def last_line(self, name: str) -> str:
    """The last thing that such a step printed, less its own name."""
    path = self._path('logs', name, 'log')
    try:
      lines = path.read_bytes()[-4000:].decode(errors='replace').split('\n')
    except OSError:
      return ''
    # A progress display rewrites its line.
    said = [part for line in lines for part in line.split('\r') if part.strip()]
    last = said[-1].strip() if said else ''
    return last.removeprefix(f'{name}: ')[:150]


class StepFailed(ChildProcessError):
  """A step ended with an error in its own process."""


class _Parallel:
  """Runs steps in processes, a share of the cores each."""

  def __init__(
    self,
    steps: Steps,
    workdir: pathlib.Path,
    workers: int,
    command: Sequence[str],
    report: Report,
  ):
    self._steps = steps
    self._workdir = workdir
    self._command = list(command)
    self._report = report
    self._running: dict[str, subprocess.Popen] = {}
    self._places: dict[str, int] = {}
    self._shares = _core_shares(workers)

  def run(self) -> None:
    said = time.time()
    # What ends this process by default would leave the others running.
    before = signal.signal(signal.SIGTERM, _stop)
    try:
      while True:
        self._reap()
        for name in self._steps.ready(list(self._running)):
          if len(self._running) < len(self._shares):
            self._start(name)
        if not self._running:
          return
        if time.time() - said >= _SAY_EVERY_S:
          said = time.time()
          for name in self._running:
            if line := self._steps.last_line(name):
              self._report(f'{name}: {line}')
        time.sleep(0.2)
    finally:
      self._end_all()
      signal.signal(signal.SIGTERM, before)

  def _start(self, name: str) -> None:
    place = min(set(range(len(self._shares))) - set(self._places.values()))
    share = self._shares[place]
    with self._steps.open_log(name) as log:
      process = subprocess.Popen(
        [*self._command, f'--step={name}'],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
      )
    if share:
      os.sched_setaffinity(process.pid, share)
    self._running[name], self._places[name] = process, place
    self._report(f'{name}: started (logs/{name}.log)')

  def _reap(self) -> None:
    for name, process in list(self._running.items()):
      status = process.poll()
      if status is None:
        continue
      del self._running[name], self._places[name]
      if status != 0 or not self._steps.is_done(name):
        raise StepFailed(
          f'step {name} ended with status {status}: '
          f'{self._steps.last_line(name)} '
          f'(all of it: {self._workdir / "logs" / name}.log)'
        )
      seconds = self._steps.result(name)['seconds_of_last_session']
      self._report(f'{name}: done in {seconds:.0f} s')

  def _end_all(self) -> None:
    """Lets what still runs save its state and end."""
    for process in self._running.values():
      process.send_signal(signal.SIGTERM)
    for name, process in self._running.items():
      self._report(f'{name}: stopping')
      try:
        process.wait(_STOP_WITHIN_S)
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


_SAY_EVERY_S = 20.0
_STOP_WITHIN_S = 20.0


def _stop(number: int, frame: object) -> None:
  del frame
  raise SystemExit(128 + number)


def _core_shares(workers: int) -> list[set[int]]:
  """The cores of each worker; empty sets where they cannot be given.

  XLA's threads of several processes on the same cores wait for each other most
  of the time.
  """
  if not hasattr(os, 'sched_getaffinity'):
    return [set() for _ in range(workers)]
  cores = sorted(os.sched_getaffinity(0))
  if len(cores) < workers:
    return [set() for _ in range(workers)]
  size = len(cores) // workers
  return [set(cores[i * size : (i + 1) * size]) for i in range(workers)]


def command_of_this_program() -> list[str]:
  """How this program was started, without flags that choose steps."""
  kept = [
    argument
    for argument in sys.argv
    if not argument.lstrip('-').startswith(('step=', 'workers='))
  ]
  return [sys.executable, *kept]
