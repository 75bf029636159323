"""Processes that a test may kill at any moment, forked from one that imported.

The serving process imports everything once. For each work directory that it
reads from stdin it forks a process that trains there and prints its id; the
next line waits for its end and gets its exit status. Until then the id stays
its own, so a late kill hits no other process.
"""

import os
import pathlib
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]


class Server:
  """Starts a process that calls `serve`, and talks to it."""

  def __init__(self, command: Sequence[str], environment: Mapping[str, str]):
    """Args: the command, run in the repository, and its environment."""
    self._command = command
    self._environment = environment
    self._process: Any = None

  def __enter__(self) -> 'Server':
    self._process = subprocess.Popen(
      self._command,
      cwd=ROOT,
      env=self._environment,
      text=True,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
    )
    return self

  def __exit__(self, *_: Any) -> None:
    self._process.stdin.close()
    self._process.wait()
    self._process.stdout.close()

  def start(self, workdir: pathlib.Path) -> int:
    """Starts training in `workdir`; returns the id of the process."""
    return self._ask(str(workdir))

  def wait(self) -> int:
    """Exit status of the process; minus the signal that killed it."""
    return self._ask('wait')

  def _ask(self, line: str) -> int:
    self._process.stdin.write(f'{line}\n')
    self._process.stdin.flush()
    return int(self._process.stdout.readline())


def serve(train: Callable[[pathlib.Path], None]) -> None:
  """Forks a process that trains for every directory named on stdin.

  No backend may be initialised before a fork.
  """
  # What training prints is not for whoever reads ids.
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)

  def say(value: int) -> None:
    print(value, file=answers, flush=True)

  while line := sys.stdin.readline():
    process = os.fork()
    if not process:
      status = 1
      try:
        train(pathlib.Path(line.strip()))
        status = 0
      except BaseException:
        traceback.print_exc()
      finally:
        os._exit(status)
    say(process)
    sys.stdin.readline()
    say(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
