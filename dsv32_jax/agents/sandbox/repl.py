"""Runs sources one after another, as typed at Python's prompt.

It runs inside the sandbox, in the program's own process.
"""

import ast
import linecache
import os
import struct
import sys
import traceback
from typing import Any


def serve(commands: int, done: int) -> int:
  """Runs what it is told until it ends itself.

  Args:
    commands: descriptor; four bytes of length, then a source.
    done: descriptor; after each source b'0', or b'1' if it raised.

  Returns:
    Its exit code.
  """
  main_module = type(sys)('__main__')
  sys.modules['__main__'] = main_module
  sys.argv = ['']
  # What a source has written is not lost where it is ended.
  for stream in (sys.stdout, sys.stderr):
    stream.reconfigure(line_buffering=True)  # pyrefly: ignore
  own = os.getpid()
  count = 0
  # A source may close what this speaks by, which is its end.
  while head := _read(commands, 4):
    source = _read(commands, struct.unpack('<I', head)[0]).decode()
    count += 1
    raised, code = _run(source, f'<call {count}>', main_module.__dict__)
    for stream in (sys.stdout, sys.stderr):
      try:
        stream.flush()
      except (OSError, ValueError):
        raised = True
    # A copy of this process, made by the source, has no turn of its own.
    if code is not None or os.getpid() != own:
      return code or 0
    try:
      os.write(done, b'1' if raised else b'0')
    except OSError:
      return 1
  return 0


def _run(
  source: str, name: str, names: dict[str, Any]
) -> tuple[bool, int | None]:
  """Whether it raised, and the exit code if it wants to leave."""
  # So that tracebacks show lines.
  linecache.cache[name] = (
    len(source),
    None,
    source.splitlines(keepends=True),
    name,
  )
  try:
    tree = ast.parse(source, name)
    last = tree.body[-1] if tree.body else None
    shown = None
    if isinstance(last, ast.Expr):
      tree.body.pop()
      shown = compile(ast.Expression(last.value), name, 'eval')
    exec(compile(tree, name, 'exec'), names)
    if shown is not None:
      value = eval(shown, names)
      if value is not None:
        names['_'] = value
        print(repr(value))
  except SystemExit as leaving:
    if leaving.code is None or isinstance(leaving.code, int):
      return False, (leaving.code or 0) & 255
    print(leaving.code, file=sys.stderr)
    return True, 1
  except BaseException as error:
    trace = error.__traceback__
    # Without the frame of this function.
    error.__traceback__ = trace and trace.tb_next
    traceback.print_exception(error)
    return True, None
  return False, None


def _read(fd: int, count: int) -> bytes:
  """So many bytes, or none where there are no more."""
  data = b''
  while len(data) < count:
    try:
      piece = os.read(fd, count - len(data))
    except OSError:
      return b''
    if not piece:
      return b''
    data += piece
  return data
