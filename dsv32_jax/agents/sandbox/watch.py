"""Looks after a program while it runs: its output, its time, what it uses.

It runs inside the sandbox.
"""

import os
import selectors
import signal
import time
from typing import Any

from dsv32_jax.agents.sandbox import child
from dsv32_jax.agents.sandbox.leftovers import DirtyError, descendants

# How often memory, processor time and processes are counted.
_LOOK_S = 0.02
# What a child shares with its parent counts for both.
_RESIDENT_BYTES = 64 << 20
_PAGE = os.sysconf('SC_PAGE_SIZE')
_TICKS = os.sysconf('SC_CLK_TCK')


class Watch:
  """Looks after one running program."""

  def __init__(
    self,
    pid: int,
    outputs: list[int],
    limits: dict[str, Any],
    started: float,
    frames_in: int,
    disk: str | None,
    done: int | None = None,
  ):
    """Begins to look.

    Args:
      pid: of the program.
      outputs: descriptors to read its outputs from.
      limits: see `types.Limits`.
      started: when it was, by the monotonic clock.
      frames_in: where whoever asked is heard.
      disk: a directory on the file system to look after, if it is its own.
      done: where a session says that it has run what it was told; what its
        processes had used before does then not count.
    """
    self._pid = pid
    self._done = done
    self._used = {} if done is None else descendants()
    # What a session says of how it went.
    self.said: bytes | None = None
    self._limits = limits
    self._disk = disk
    self._deadline = started + limits['wall_s']
    self._selector = selectors.DefaultSelector()
    self._chunks: dict[int, list[bytes]] = {fd: [] for fd in outputs}
    self._outputs = outputs
    self._left = limits['output_bytes']
    for fd in outputs:
      os.set_blocking(fd, False)
      self._selector.register(fd, selectors.EVENT_READ)
    # Nothing comes while a program runs, but the end of who asked for it.
    self._frames_in = frames_in
    self._selector.register(frames_in, selectors.EVENT_READ)
    if done is not None:
      self._selector.register(done, selectors.EVENT_READ)
    self._why: str | None = None
    self._wait_status: int | None = None
    self._cpu_s = 0.0
    self._pidfd: int | None = None
    try:
      self._pidfd = os.pidfd_open(pid)
      self._selector.register(self._pidfd, selectors.EVENT_READ)
    except OSError:
      pass  # Looking often has to do.

  def wait(self) -> None:
    """Returns when the program has ended or has to be ended."""
    next_look = time.monotonic() + _LOOK_S
    while self._why is None:
      now = time.monotonic()
      if now >= self._deadline:
        self._why = 'timeout'
        return
      pause = min(next_look, self._deadline) - now
      for key, _ in self._selector.select(max(pause, 0)):
        if key.fd == self._frames_in:
          raise DirtyError('whoever asked is gone')
        if key.fd == self._done:
          self.said = os.read(key.fd, 1) or None
          self._selector.unregister(key.fd)
        elif key.fd != self._pidfd:
          self._read(key.fd)
      if self.said is not None:
        return
      if self._has_ended():
        return
      if time.monotonic() >= next_look:
        self._look()
        next_look = time.monotonic() + _LOOK_S

  def _has_ended(self) -> bool:
    """Whether the program has; takes leave of what it has orphaned."""
    while True:
      try:
        pid, status, usage = os.wait4(-1, os.WNOHANG)
      except ChildProcessError:
        return self._wait_status is not None
      if not pid:
        return self._wait_status is not None
      if pid == self._pid:
        self._wait_status = status
        self._cpu_s = usage.ru_utime + usage.ru_stime

  def drain(self, *, closes: bool = True) -> None:
    """Takes what was written before the end.

    Args:
      closes: the outputs too; False where more programs write to them.
    """
    for fd in self._outputs:
      while fd in self._selector.get_map() and self._read(fd):
        pass
      if closes:
        os.close(fd)
    if self._pidfd is not None:
      os.close(self._pidfd)
    self._selector.close()

  def verdict(self) -> tuple[str, int | None]:
    """The status, and the exit code or signal that goes with it."""
    if self._why is not None:
      return self._why, None
    if self.said is not None:
      code = int(self.said != b'0')
      return ('exit' if code else 'ok'), code
    assert self._wait_status is not None
    code = os.waitstatus_to_exitcode(self._wait_status)
    # What ignores the signal of the soft limit is killed at the hard one.
    if code == -signal.SIGXCPU or (
      code == -signal.SIGKILL and self._cpu_s >= self._limits['cpu_s']
    ):
      return 'cpu', None
    if code == -signal.SIGXFSZ:
      return 'file_size', None
    if code < 0:
      return 'signal', -code
    if code == child.NO_MEMORY_EXIT:
      return 'memory', None
    if code == child.NOT_STARTED_EXIT:
      return 'error', None
    return ('exit' if code else 'ok'), code

  def text(self, index: int) -> str:
    data = b''.join(self._chunks[self._outputs[index]])
    return data.decode('utf-8', errors='replace')

  def _read(self, fd: int) -> bool:
    """Takes a piece; whether there may be more."""
    try:
      data = os.read(fd, 1 << 16)
    except BlockingIOError:
      return False
    if not data:
      self._selector.unregister(fd)
      return False
    kept = data[: self._left]
    self._chunks[fd].append(kept)
    self._left -= len(kept)
    if len(kept) < len(data):
      self._why = self._why or 'output'
      return False
    return True

  def _look(self) -> None:
    """Counts what everything that the program has started uses together."""
    tasks = descendants()
    if self._disk is not None:
      space = os.statvfs(self._disk)
      if space.f_files - space.f_ffree > self._limits['files']:
        self._why = 'files'
    if len(tasks) > self._limits['processes']:
      self._why = 'processes'
    none = (0, 0)
    ticks = sum(
      ticks - self._used.get(pid, none)[0] for pid, (ticks, _) in tasks.items()
    )
    if ticks / _TICKS > self._limits['cpu_s']:
      self._why = 'cpu'
    pages = sum(pages for _, pages in tasks.values())
    if pages * _PAGE > self._limits['memory_bytes'] + _RESIDENT_BYTES:
      self._why = 'memory'
