"""A program that stays: told one source after another, as at a prompt.

It runs inside the sandbox, in the supervisor.
"""

import fcntl
import os
import signal
import struct
import time
from typing import Any

from dsv32_jax.agents.sandbox import child
from dsv32_jax.agents.sandbox.leftovers import (
  DirtyError,
  end_all,
  signal_all,
  wipe,
)
from dsv32_jax.agents.sandbox.watch import Watch

# Of the pipe; what it is told has to fit, for nobody may be there to read.
_PIPE_BYTES = 1 << 20
# Of the process in its whole life; the watch limits each of its programs.
_CPU_S = 1 << 20


class Session:
  """One process with what it has started.

  Between two programs nobody watches it, so all of it stands still then.

  Attributes:
    is_alive: it can be told more.
  """

  def __init__(
    self,
    frame: dict[str, Any],
    settings: dict[str, Any],
    frames_in: int,
    frames_out: int,
  ):
    """Starts the process.

    Args:
      frame: the first program, for its limits; not yet run.
      settings: of the supervisor.
      frames_in: of the supervisor.
      frames_out: of the supervisor.
    """
    self._top = settings['top']
    self._disk = self._top if settings['is_isolated'] else None
    self._frames_in = frames_in
    commands, done, stdout, stderr = (os.pipe() for _ in range(4))
    work = fill(self._top, {})
    limits = frame['limits'] | {'cpu_s': _CPU_S}
    self._pid = os.fork()
    if self._pid == 0:
      for fd in (frames_in, frames_out, commands[1], done[0]):
        os.close(fd)
      for pipe in (stdout, stderr):
        os.close(pipe[0])
      stdin = os.open(os.devnull, os.O_RDONLY)
      child.become(
        frame | {'limits': limits},
        work,
        stdin,
        stdout[1],
        stderr[1],
        (commands[0], done[1]),
      )
    for fd in (commands[0], done[1], stdout[1], stderr[1]):
      os.close(fd)
    self._commands, self._done = commands[1], done[0]
    self._outputs = [stdout[0], stderr[0]]
    os.set_blocking(self._commands, False)
    os.set_blocking(self._done, False)
    fcntl.fcntl(self._commands, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    self.is_alive = True

  def run(self, frame: dict[str, Any]) -> dict[str, Any]:
    """Runs a source in it.

    Raises:
      DirtyError: it does not take one.
    """
    fill(self._top, frame['files'])
    try:
      # A program may have spoken out of turn.
      while os.read(self._done, 1 << 10):
        pass
    except BlockingIOError:
      pass
    started = time.monotonic()
    watch = Watch(
      self._pid,
      self._outputs,
      frame['limits'],
      started,
      self._frames_in,
      self._disk,
      self._done,
    )
    signal_all(signal.SIGCONT)
    self._tell(frame['source'])
    watch.wait()
    wall_s = time.monotonic() - started
    signal_all(signal.SIGSTOP)
    self.is_alive = watch.said is not None
    if not self.is_alive:
      end_all()
    watch.drain(closes=False)
    status, code = watch.verdict()
    if status == 'output':  # Written just before it had done.
      self.is_alive = False
    if not self.is_alive:
      self.end()
    return {
      'status': status,
      'code': code,
      'stdout': watch.text(0),
      'stderr': watch.text(1),
      'wall_s': round(wall_s, 4),
      'is_alive': self.is_alive,
    }

  def end(self) -> None:
    """Ends everything in it, and removes its files."""
    self.is_alive = False
    end_all()
    for fd in (self._commands, self._done, *self._outputs):
      if fd >= 0:
        os.close(fd)
    self._commands = self._done = -1
    self._outputs = []
    wipe(self._top)

  def _tell(self, source: str) -> None:
    body = source.encode()
    data = struct.pack('<I', len(body)) + body
    try:
      if os.write(self._commands, data) != len(data):
        raise DirtyError('the session does not read what it is told')
    except BlockingIOError:
      raise DirtyError('the session does not read what it is told') from None
    except BrokenPipeError:
      pass  # It has ended; so the watch will find.


def fill(top: str, files: dict[str, str]) -> str:
  """Makes the directory that programs run in, with files; returns its path."""
  work = os.path.join(top, 'work')
  os.makedirs(work, exist_ok=True)
  for name, text in files.items():
    path = os.path.join(work, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'w', encoding='utf-8') as file:
      file.write(text)
  return work
