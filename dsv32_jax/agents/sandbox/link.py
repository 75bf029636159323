"""The way into a sandbox: starts its supervisor and speaks with it."""

import contextlib
import json
import os
import select
import signal
import struct
import subprocess
import tempfile
import time
from typing import Any, get_args

from dsv32_jax.agents.sandbox import isolation
from dsv32_jax.agents.sandbox.types import Result, Status

_START_S = 60.0
_LONGEST_FRAME = 64 << 20


class SandboxError(RuntimeError):
  """A sandbox that cannot be started."""


class Supervisor:
  """The process at the other end of the pipe."""

  def __init__(self, backend: str, disk_bytes: int):
    self._cleanup = contextlib.ExitStack()
    try:
      walls = self._cleanup.enter_context(
        isolation.walls(backend, disk_bytes=disk_bytes)
      )
      self._stderr = self._cleanup.enter_context(tempfile.TemporaryFile())
      self._process = subprocess.Popen(
        walls.command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=self._stderr,
        env={'PATH': os.defpath, 'LC_ALL': 'C.UTF-8'},
        cwd='/',
        start_new_session=True,
      )
      assert self._process.stdin is not None
      assert self._process.stdout is not None
      self._in, self._out = self._process.stdin, self._process.stdout
      try:
        self._receive(time.monotonic() + _START_S)
      except (OSError, EOFError, ValueError, TimeoutError) as error:
        self.close(complain=True)
        raise SandboxError(self._complaint or str(error)) from None
    except BaseException:
      self._cleanup.close()
      raise

  def run(self, frame: dict[str, Any], timeout_s: float) -> Result:
    body = json.dumps(frame).encode('utf-8', errors='replace')
    deadline = time.monotonic() + timeout_s
    try:
      self._in.write(struct.pack('<I', len(body)) + body)
      self._in.flush()
      reply = self._receive(deadline)
      return _read_result(reply)
    except TimeoutError:
      detail = f'the sandbox did not answer within {timeout_s:g} s'
    except (OSError, EOFError):
      detail = 'the sandbox died'
    except ValueError as error:
      detail = f'the sandbox answered what it should not: {error}'[:300]
    return Result(status='error', detail=detail)

  def close(self, *, complain: bool = False) -> None:
    """Ends the supervisor, and with it everything that it has started."""
    with contextlib.suppress(OSError):
      self._in.close()
    # At the end of its input it leaves by itself, and a namespace ends with its
    # process 1. Without namespaces it is the one that knows what to end.
    with contextlib.suppress(subprocess.TimeoutExpired):
      self._process.wait(timeout=2.0)
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self._process.pid, signal.SIGKILL)
    self._process.wait()
    self._out.close()
    if complain:
      self._stderr.seek(0)
      lines = self._stderr.read().decode(errors='replace').splitlines()
      self._complaint = lines[-1] if lines else ''
    self._cleanup.close()

  def _receive(self, deadline: float) -> dict[str, Any]:
    (length,) = struct.unpack('<I', self._read(4, deadline))
    if length > _LONGEST_FRAME:
      raise ValueError(f'{length} bytes')
    frame = json.loads(self._read(length, deadline))
    if not isinstance(frame, dict):
      raise ValueError('no object')
    return frame

  def _read(self, count: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < count:
      left = deadline - time.monotonic()
      if left <= 0 or not select.select([self._out], [], [], left)[0]:
        raise TimeoutError('no answer in time')
      piece = os.read(self._out.fileno(), count - len(data))
      if not piece:
        raise EOFError('the supervisor ended')
      data += piece
    return bytes(data)


def _read_result(reply: dict[str, Any]) -> Result:
  """The frame as a result; nothing in it is taken on trust."""
  status, code = reply.get('status'), reply.get('code')
  if status not in get_args(Status):
    raise ValueError(f'status {status!r}'[:100])
  if status == 'error':
    return Result(status='error', detail=str(reply.get('detail', ''))[:300])
  if not isinstance(code, int | None):
    raise ValueError('code')
  return Result(
    status=status,  # pyrefly: ignore
    exit_code=code if status in ('ok', 'exit') else None,
    signal=code if status == 'signal' else None,
    stdout=str(reply.get('stdout', '')),
    stderr=str(reply.get('stderr', '')),
    wall_s=float(reply.get('wall_s', 0.0)),
    is_alive=reply.get('is_alive') is True,
  )
