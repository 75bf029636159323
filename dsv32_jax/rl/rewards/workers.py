"""Processes that score, each of which may hang, die or run out of memory.

A call that does costs its own answer: its process is killed and replaced. The
answers come in the order of the calls, so nothing depends on which process took
which call.
"""

import collections
import dataclasses
import json
import os
import pathlib
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

# Importing the scoring libraries takes seconds, more on a busy machine.
_START_S = 120.0
_MOST_BYTES = 4 << 30
_MAIN = pathlib.Path(__file__).with_name('worker_main.py')


@dataclasses.dataclass(frozen=True)
class Call:
  """A function of one of the pool's modules, with JSON values."""

  module: str
  function: str
  arguments: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Reply:
  """What a call returned, or why it did not, in one line."""

  value: Any = None
  error: str | None = None


class WorkerPool:
  """Processes that are started when they are first needed.

  Not to be shared between threads.
  """

  def __init__(
    self,
    modules: dict[str, pathlib.Path],
    *,
    workers: int = 1,
    timeout_s: float = 10.0,
    prefix: Sequence[str] = (),
  ):
    """Starts nothing yet.

    Args:
      modules: files that the processes load, by name; they may import
        installed packages, but nothing of this project.
      workers: how many processes, at least 1.
      timeout_s: a call that takes longer is ended.
      prefix: a command that runs another one, such as a sandbox's.
    """
    if workers < 1:
      raise ValueError(f'workers: got {workers}, expected at least 1')
    if not timeout_s > 0:
      raise ValueError(f'timeout_s: got {timeout_s}, expected above 0')
    self._modules = modules
    self._size = workers
    self._timeout_s = timeout_s
    self._prefix = list(prefix)
    self._workers: list[_Worker] = []
    self.num_started = 0

  def run(self, calls: Sequence[Call]) -> list[Reply]:
    """The replies to calls, in their order.

    Raises:
      RuntimeError: if a process cannot be started.
      ModuleNotFoundError: if a package that a scorer needs is not installed.
    """
    replies: list[Reply] = [Reply()] * len(calls)
    waiting = collections.deque(range(len(calls)))
    while len(self._workers) < min(self._size, len(calls)):
      self._workers.append(self._start())
    with selectors.DefaultSelector() as selector:
      busy: dict[_Worker, int] = {}
      for worker in self._workers:
        selector.register(worker.output, selectors.EVENT_READ, worker)
      try:
        while waiting or busy:
          for worker in list(self._workers):
            if waiting and worker.is_ready and worker not in busy:
              index = waiting.popleft()
              busy[worker] = index
              worker.send(calls[index], self._timeout_s)
          deadlines = [w.deadline for w in self._workers if self._owes(w, busy)]
          pause = max(min(deadlines) - time.monotonic(), 0)
          for key, _ in selector.select(pause):
            self._read(key.data, busy, replies, selector)
          self._end_late(busy, replies, selector)
      finally:
        # After an exception a reply may be on its way: that process is of no
        # further use.
        for worker in list(busy):
          worker.kill()
          self._workers.remove(worker)
    return replies

  def close(self) -> None:
    """Ends the processes; a later `run` starts new ones."""
    for worker in self._workers:
      worker.kill()
    self._workers.clear()

  def __enter__(self) -> 'WorkerPool':
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _owes(self, worker: '_Worker', busy: dict['_Worker', int]) -> bool:
    return worker in busy or not worker.is_ready

  def _read(
    self,
    worker: '_Worker',
    busy: dict['_Worker', int],
    replies: list[Reply],
    selector: selectors.BaseSelector,
  ) -> None:
    try:
      lines = worker.read_lines()
    except EOFError:
      if not worker.is_ready:
        raise RuntimeError(
          f'a scoring process ended while it started: {worker.complaint()}'
        ) from None
      self._replace(worker, busy, replies, selector, 'the scorer died')
      return
    for line in lines:
      if not worker.is_ready:
        worker.is_ready = True
        continue
      if worker in busy:
        value, error, missing = json.loads(line)
        if missing:
          raise ModuleNotFoundError(
            f"{missing}: not installed, expected the extra 'rl' "
            "(pip install -e '.[rl]')",
            name=missing,
          )
        replies[busy.pop(worker)] = Reply(value, error)

  def _end_late(
    self,
    busy: dict['_Worker', int],
    replies: list[Reply],
    selector: selectors.BaseSelector,
  ) -> None:
    now = time.monotonic()
    for worker in list(self._workers):
      if not self._owes(worker, busy) or now < worker.deadline:
        continue
      if not worker.is_ready:
        raise RuntimeError(
          f'a scoring process did not start within {_START_S:.0f} s'
        )
      reason = f'the scorer took longer than {self._timeout_s:g} s'
      self._replace(worker, busy, replies, selector, reason)

  def _replace(
    self,
    worker: '_Worker',
    busy: dict['_Worker', int],
    replies: list[Reply],
    selector: selectors.BaseSelector,
    reason: str,
  ) -> None:
    if worker in busy:
      replies[busy.pop(worker)] = Reply(None, reason)
    selector.unregister(worker.output)
    worker.kill()
    new = self._start()
    self._workers[self._workers.index(worker)] = new
    selector.register(new.output, selectors.EVENT_READ, new)

  def _start(self) -> '_Worker':
    self.num_started += 1
    return _Worker(
      [
        *self._prefix,
        sys.executable,
        '-I',
        str(_MAIN),
        str(_MOST_BYTES),
        *(f'{name}={path}' for name, path in self._modules.items()),
      ]
    )


class _Worker:
  """One process, and what it owes."""

  def __init__(self, command: list[str]):
    # A file takes any amount, a pipe that nobody reads would block the process.
    self._stderr = tempfile.TemporaryFile()
    self._process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._stderr,
      env={'PATH': os.defpath, 'LC_ALL': 'C.UTF-8'},
      start_new_session=True,
    )
    assert self._process.stdout is not None
    self.output = self._process.stdout
    self.is_ready = False
    self.deadline = time.monotonic() + _START_S
    self._partial = b''

  def send(self, call: Call, timeout_s: float) -> None:
    assert self._process.stdin is not None
    line = json.dumps([call.module, call.function, list(call.arguments)])
    self.deadline = time.monotonic() + timeout_s
    try:
      self._process.stdin.write(line.encode() + b'\n')
      self._process.stdin.flush()
    except BrokenPipeError:
      pass  # It has died; reading will tell.

  def read_lines(self) -> list[str]:
    """Whole lines that have come.

    Raises:
      EOFError: if the process has ended.
    """
    data = os.read(self.output.fileno(), 1 << 16)
    if not data:
      raise EOFError
    *lines, self._partial = (self._partial + data).split(b'\n')
    return [line.decode() for line in lines]

  def complaint(self) -> str:
    """The last line that it wrote to stderr."""
    self._process.wait()
    self._stderr.seek(0)
    lines = self._stderr.read().decode(errors='replace').splitlines()
    return lines[-1] if lines else f'exit code {self._process.returncode}'

  def kill(self) -> None:
    try:
      os.killpg(self._process.pid, signal.SIGKILL)
    except ProcessLookupError:
      pass
    self._process.wait()
    for pipe in (self._process.stdin, self._process.stdout, self._stderr):
      assert pipe is not None
      try:
        pipe.close()
      except BrokenPipeError:
        pass
