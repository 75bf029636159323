"""A child process of the supervisor, on its way to being a program.

It runs inside the sandbox.
"""

import fcntl
import os
import resource
import signal
import sys
import traceback
from typing import Any

from dsv32_jax.agents.sandbox import leftovers, repl, seccomp

# By which a child says that Python ran out of memory, or that it could not be
# made ready. A program can say the same, which earns it nothing.
NO_MEMORY_EXIT = 120
NOT_STARTED_EXIT = 121


def become(
  frame: dict[str, Any],
  work: str,
  stdin: int,
  stdout: int,
  stderr: int,
  session: tuple[int, int] | None = None,
) -> None:
  """Turns this child into the program; never returns.

  Args:
    frame: the program.
    work: the directory that it runs in.
    stdin: descriptor of its standard input.
    stdout: likewise.
    stderr: likewise.
    session: by which a session is told what to run and says that it has.
  """
  code = NOT_STARTED_EXIT
  try:
    os.setsid()
    wanted = [stdin, stdout, stderr, *(session or ())]
    # First above all targets, so that none is overwritten before its turn.
    wanted = [fcntl.fcntl(fd, fcntl.F_DUPFD, 64) for fd in wanted]
    for target, source in enumerate(wanted):
      os.dup2(source, target, inheritable=target < 3)
    os.closerange(len(wanted), 4096)
    os.chdir(work)
    _limit(frame['limits'])
    seccomp.install()
    if session:
      signal.signal(signal.SIGINT, signal.default_int_handler)
      code = repl.serve(3, 4)
      return
    if frame['argv']:
      os.execve(frame['argv'][0], frame['argv'], {})
    source = frame['source']
    frame.clear()
    code = _execute(source)
  except MemoryError:
    code = NO_MEMORY_EXIT
  except BaseException as error:
    try:
      os.write(2, f'{type(error).__name__}: {error}\n'.encode())
    except OSError:
      pass
  finally:
    os._exit(code)


def _execute(source: str) -> int:
  """Runs Python source as the main module; returns its exit code."""
  signal.signal(signal.SIGINT, signal.default_int_handler)
  code = 0
  main_module = type(sys)('__main__')
  sys.modules['__main__'] = main_module
  sys.argv = ['program.py']
  try:
    compiled = compile(source, 'program.py', 'exec')
    del source
    exec(compiled, main_module.__dict__)
  except SystemExit as leaving:
    if isinstance(leaving.code, int):
      code = leaving.code & 255
    elif leaving.code is not None:
      print(leaving.code, file=sys.stderr)
      code = 1
  except MemoryError:
    code = NO_MEMORY_EXIT
  except BaseException:
    code = 1
    traceback.print_exc()
  for stream in (sys.stdout, sys.stderr):
    try:
      stream.flush()
    except (OSError, ValueError):
      code = code or 1
  return code


def _limit(limits: dict[str, Any]) -> None:
  cpu_s = max(int(limits['cpu_s'] + 0.999), 1)
  others = leftovers.tasks_of_user() - 1
  for name, soft, hard in (
    ('RLIMIT_CORE', 0, 0),
    # The hard limit kills what ignores the signal of the soft one.
    ('RLIMIT_CPU', cpu_s, cpu_s + 1),
    ('RLIMIT_AS', limits['memory_bytes'], limits['memory_bytes']),
    ('RLIMIT_FSIZE', limits['file_bytes'], limits['file_bytes']),
    ('RLIMIT_NOFILE', limits['open_files'], limits['open_files']),
    ('RLIMIT_MSGQUEUE', 0, 0),
    ('RLIMIT_MEMLOCK', 0, 0),
    ('RLIMIT_STACK', 8 << 20, 64 << 20),
    (
      'RLIMIT_NPROC',
      *[others + limits['processes']] * 2,
    ),
  ):
    kind = getattr(resource, name)
    most = resource.getrlimit(kind)[1]
    if most != resource.RLIM_INFINITY:
      soft, hard = min(soft, most), min(hard, most)
    resource.setrlimit(kind, (soft, hard))
