"""Programs, what they may use, and how they end."""

import dataclasses
import os
from typing import Literal

Status = Literal[
  'ok',
  'exit',
  'signal',
  'timeout',
  'cpu',
  'memory',
  'output',
  'processes',
  'file_size',
  'files',
  'error',
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """What a program may use.

  Attributes:
    wall_s: time from start to end.
    cpu_s: of one process; the kernel counts whole seconds, so it is rounded up.
    memory_bytes: address space of one process, and about the memory of all.
    processes: processes and threads at a time, the program among them.
    file_bytes: of one file.
    files: files and directories that it makes.
    open_files: of one process.
    output_bytes: standard output and standard error together.
  """

  wall_s: float = 5.0
  cpu_s: float = 2.0
  memory_bytes: int = 256 << 20
  processes: int = 16
  file_bytes: int = 16 << 20
  files: int = 10_000
  open_files: int = 64
  output_bytes: int = 1 << 20

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not value > 0:
        raise ValueError(
          f'Limits.{field.name}: got {value}, expected a positive number'
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """What to run, in a directory of its own.

  Attributes:
    source: Python; run isolated (`python -I`) without third-party packages.
    argv: instead of it a command, its first part an absolute path.
    stdin: text.
    files: text by relative path, in the directory beforehand.
    limits: None takes the sandbox's.
    keeps_files: leaves the directory as it is for the sandbox's next program.
    keeps_state: runs the source as if typed at a prompt (`repl`), in the
      process of the sandbox's programs right before it that did so too, with
      their variables, files and processes. Wall, processor time and output are
      limited for each program, the rest as for the first of them.
  """

  source: str = ''
  argv: tuple[str, ...] = ()
  stdin: str = ''
  files: dict[str, str] = dataclasses.field(default_factory=dict)
  limits: Limits | None = None
  keeps_files: bool = False
  keeps_state: bool = False

  def __post_init__(self):
    if bool(self.argv) and bool(self.source):
      raise ValueError('argv: got one beside a source, expected one of them')
    if self.argv and not os.path.isabs(self.argv[0]):
      raise ValueError(
        f'argv: got {self.argv[0]!r}, expected an absolute path first'
      )
    if self.keeps_state and (self.argv or self.stdin):
      raise ValueError(
        'keeps_state: got it with argv or stdin, expected a source only'
      )
    for path in self.files:
      parts = path.split('/')
      if not path or os.path.isabs(path) or '..' in parts or '\0' in path:
        raise ValueError(
          f'files: got {path!r}, expected a relative path without ..'
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """How a program ended.

  Attributes:
    status: 'ok' (exit code 0), 'exit' (another one), 'signal'; what it went
      beyond: 'timeout' (wall time), 'cpu', 'memory', 'output', 'processes',
      'file_size', 'files'; or 'error', where the sandbox itself failed.
    exit_code: of 'ok' and 'exit'.
    signal: of 'signal'.
    stdout: what it wrote, up to its limit; what is no UTF-8 is replaced.
    stderr: likewise.
    wall_s: how long it ran.
    is_alive: its process waits for the next program that keeps state.
    detail: of 'error', one line.
  """

  status: Status
  exit_code: int | None = None
  signal: int | None = None
  stdout: str = ''
  stderr: str = ''
  wall_s: float = 0.0
  is_alive: bool = False
  detail: str = ''
