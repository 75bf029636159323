"""Starts the processes of a job on this machine, and ends them together.

For tests, for examples and for one machine with several GPUs; on a cluster its
scheduler does this.
"""

import dataclasses
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_POLL_S = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
  """One process.

  Attributes:
    argv: program and arguments.
    environment: variables beside those of this process.
  """

  argv: tuple[str, ...]
  environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


class LocalProcesses:
  """Running processes whose lines are passed on with their number.

  Example:
    >>> command = Command(argv=('echo', 'hello'))
    >>> with LocalProcesses([command] * 2) as processes:
    ...   processes.wait(grace_s=1)
    [0] hello
    [1] hello
    0
  """

  def __init__(
    self,
    commands: Sequence[Command],
    *,
    report: Callable[[str], None] | None = None,
  ):
    """Starts them.

    Args:
      commands: in the order of the processes.
      report: receives each line; None prints it.
    """
    self._report = report or (lambda line: print(line, flush=True))
    self._lock = threading.Lock()
    self._processes: list[subprocess.Popen] = []
    self._readers: list[threading.Thread] = []
    try:
      for command in commands:
        self._start(command)
    except BaseException:
      self._kill()
      raise

  def __enter__(self) -> 'LocalProcesses':
    return self

  def __exit__(self, *_: Any) -> None:
    self._kill()

  @property
  def ids(self) -> tuple[int, ...]:
    """Process ids, in order."""
    return tuple(process.pid for process in self._processes)

  def wait(self, *, grace_s: float) -> int:
    """Returns when all have ended.

    SIGTERM and SIGINT are passed on, so that the job can save and stop.

    Args:
      grace_s: when one has failed, how long the others may take to notice and
        end by themselves; then they are killed.

    Returns:
      0, or the exit status of the first that failed (128 + n for signal n).
    """
    status, deadline = 0, None
    failed: set[int] = set()
    running = True
    with _PassedOn(self.signal):
      while running:
        time.sleep(_POLL_S)
        codes = [process.poll() for process in self._processes]
        running = None in codes
        for number, code in enumerate(codes):
          if not code or number in failed:
            continue
          failed.add(number)
          self._say(f'process {number} {_describe(code)}')
          if status == 0:
            status = code if code > 0 else 128 - code
            deadline = time.monotonic() + grace_s
        if running and deadline is not None and time.monotonic() > deadline:
          self._say(f'the others still run {grace_s:g} s later and are killed')
          self._kill()
    for reader in self._readers:
      reader.join()
    return status

  def signal(self, number: int) -> None:
    """Sends a signal to those that run."""
    for process in self._processes:
      if process.poll() is None:
        process.send_signal(number)

  def _start(self, command: Command) -> None:
    number = len(self._processes)
    process = subprocess.Popen(
      command.argv,
      env={**os.environ, **command.environment},
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      errors='replace',
      # The terminal's Ctrl-C comes to this process alone, which passes it on.
      start_new_session=True,
    )
    self._processes.append(process)
    reader = threading.Thread(
      target=self._read, args=(number, process), daemon=True
    )
    self._readers.append(reader)
    reader.start()

  def _read(self, number: int, process: subprocess.Popen) -> None:
    assert process.stdout is not None
    with process.stdout:
      for line in process.stdout:
        self._say(line.rstrip('\n'), f'[{number}] ')

  def _say(self, line: str, prefix: str = '[launch] ') -> None:
    with self._lock:
      self._report(prefix + line)

  def _kill(self) -> None:
    """Ends what still runs, whole sessions: a process may have children."""
    for process in self._processes:
      if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    for process in self._processes:
      process.wait()


class _PassedOn:
  """Passes SIGTERM and SIGINT on while it is active; the second kills."""

  def __init__(self, send: Callable[[int], None]):
    self._send = send
    self._previous: dict[int, Any] = {}
    self._count = 0

  def __enter__(self) -> None:
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._previous[number] = signal.signal(number, self._note)

  def __exit__(self, *_: Any) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _note(self, number: int, _: Any) -> None:
    self._count += 1
    self._send(number if self._count == 1 else signal.SIGKILL)


def _describe(code: int) -> str:
  if code > 0:
    return f'ended with status {code}'
  return f'was ended by {signal.Signals(-code).name}'
