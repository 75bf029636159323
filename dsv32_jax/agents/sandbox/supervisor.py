"""The program that runs inside the sandbox and starts the others.

Frames come in on its standard input and go out on its standard output: four
bytes of length, then JSON. Each one in is a program to run; each one out says
what came of it. A program runs in a child process of its own with limits of its
own; when it ends, everything it has left behind is removed before the next one
starts.

Inside a namespace of processes it is process 1, which no signal of a process in
the namespace reaches. Of this project it imports only what is sent along with
it (`isolation`).
"""

import ctypes
import gc
import json
import os
import signal
import struct
import time
from typing import Any

from dsv32_jax.agents.sandbox import child
from dsv32_jax.agents.sandbox.leftovers import DirtyError, end_all, wipe
from dsv32_jax.agents.sandbox.session import Session, fill
from dsv32_jax.agents.sandbox.watch import Watch

_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_CHILD_SUBREAPER = 36
_PR_CAPBSET_DROP = 24


def main(settings: dict[str, Any]) -> None:
  """Serves until its input ends.

  Args:
    settings: 'top', the one directory that can be written to, in which programs
      have a directory to run in; 'uid' to become, or None; 'is_isolated', False
      where there are no namespaces.
  """
  frames_in, frames_out = os.dup(0), os.dup(1)
  null = os.open(os.devnull, os.O_RDWR)
  for fd in (0, 1):
    os.dup2(null, fd)
  libc = ctypes.CDLL(None, use_errno=True)
  if settings['is_isolated']:
    _give_up_rights(libc, settings['uid'])
  libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
  # Others of the same user may then not trace it or open its memory.
  libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
  libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  wipe(settings['top'])
  gc.collect()
  gc.freeze()
  _send(frames_out, {'ready': True, 'pid': os.getpid()})
  session: Session | None = None
  while (frame := _receive(frames_in)) is not None:
    try:
      if session and not (session.is_alive and frame['keeps_state']):
        session.end()
        session = None
      if frame['keeps_state']:
        session = session or Session(frame, settings, frames_in, frames_out)
        result = session.run(frame)
      else:
        result = _run(frame, settings, frames_in, frames_out)
    except (DirtyError, OSError) as error:
      try:
        end_all()
      finally:
        _send(frames_out, {'status': 'error', 'detail': str(error)})
      return
    _send(frames_out, result)
  end_all()


def _run(
  frame: dict[str, Any],
  settings: dict[str, Any],
  frames_in: int,
  frames_out: int,
) -> dict[str, Any]:
  top, is_isolated = settings['top'], settings['is_isolated']
  limits = frame['limits']
  work = fill(top, frame['files'])
  stdin = _file_of(frame['stdin'])
  pipes = [os.pipe(), os.pipe()]
  started = time.monotonic()
  pid = os.fork()
  if pid == 0:
    for fd in (frames_in, frames_out, pipes[0][0], pipes[1][0]):
      os.close(fd)
    child.become(frame, work, stdin, pipes[0][1], pipes[1][1])
  os.close(stdin)
  for _, end in pipes:
    os.close(end)
  disk = top if is_isolated else None
  outputs = [pipes[0][0], pipes[1][0]]
  watch = Watch(pid, outputs, limits, started, frames_in, disk)
  watch.wait()
  wall_s = time.monotonic() - started
  end_all()
  watch.drain()
  if not frame['keeps_files']:
    wipe(top)
  status, code = watch.verdict()
  return {
    'status': status,
    'code': code,
    'stdout': watch.text(0),
    'stderr': watch.text(1),
    'wall_s': round(wall_s, 4),
  }


def _file_of(text: str) -> int:
  """A file in memory that holds text, at its start."""
  fd = os.memfd_create('stdin')
  data = memoryview(text.encode())
  while data:
    data = data[os.write(fd, data) :]
  os.lseek(fd, 0, os.SEEK_SET)
  return fd


def _give_up_rights(libc: ctypes.CDLL, uid: int | None) -> None:
  """Becomes a user, and gives up every capability for now and for later."""
  for capability in range(64):
    libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
  if uid is not None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
  header = struct.pack('@Ii', 0x20080522, 0)
  libc.capset(header, bytes(24))


def _receive(fd: int) -> dict[str, Any] | None:
  head = _read_exactly(fd, 4)
  if head is None:
    return None
  body = _read_exactly(fd, struct.unpack('<I', head)[0])
  return None if body is None else json.loads(body)


def _read_exactly(fd: int, count: int) -> bytes | None:
  data = bytearray()
  while len(data) < count:
    piece = os.read(fd, count - len(data))
    if not piece:
      return None
    data += piece
  return bytes(data)


def _send(fd: int, frame: dict[str, Any]) -> None:
  body = json.dumps(frame).encode()
  data = memoryview(struct.pack('<I', len(body)) + body)
  while data:
    data = data[os.write(fd, data) :]
