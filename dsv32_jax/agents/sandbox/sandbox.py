r"""Runs programs that nobody has read (docs/sandbox.md).

>>> with Sandbox() as sandbox:
...   result = sandbox.run(Program(source='print(6 * 7)'))
>>> result.status, result.stdout
('ok', '42\n')
"""

import dataclasses
import functools
from collections.abc import Sequence

from dsv32_jax.agents.sandbox import isolation
from dsv32_jax.agents.sandbox.isolation import BackendName
from dsv32_jax.agents.sandbox.link import SandboxError, Supervisor
from dsv32_jax.agents.sandbox.types import Limits, Program, Result

# The supervisor ends a program at its limits; this long after them it is not
# believed to be there any more.
_GRACE_S = 10.0


class Sandbox:
  """One set of namespaces, in which programs run one after another.

  It starts with its first program, and starts again if a program has broken
  it. Not to be shared between threads.
  """

  def __init__(
    self,
    *,
    backend: BackendName | None = None,
    limits: Limits | None = None,
    disk_bytes: int = 64 << 20,
  ):
    """Chooses the backend; starts nothing yet.

    Args:
      backend: None takes the first that works of bubblewrap and unshare.
        'unsafe_rlimits' keeps programs neither from files nor from the network,
        and is for programs that are trusted.
      limits: of programs that bring none.
      disk_bytes: the most that the files of a program take.

    Raises:
      SandboxError: if the backend, or any at all, does not work here.
    """
    if disk_bytes < 1 << 16:
      raise ValueError(
        f'disk_bytes: got {disk_bytes}, expected at least {1 << 16}'
      )
    self.backend = choose_backend(backend)
    self.is_safe = self.backend != 'unsafe_rlimits'
    self._limits = limits or Limits()
    self._disk_bytes = disk_bytes
    self._supervisor: Supervisor | None = None
    self.num_started = 0

  def run(self, program: Program) -> Result:
    """Runs one program."""
    limits = program.limits or self._limits
    frame = {
      'source': program.source,
      'argv': program.argv,
      'stdin': program.stdin,
      'files': program.files,
      'keeps_files': program.keeps_files,
      'keeps_state': program.keeps_state,
      'limits': dataclasses.asdict(limits),
    }
    if self._supervisor is None:
      self._supervisor = Supervisor(self.backend, self._disk_bytes)
      self.num_started += 1
    result = self._supervisor.run(frame, limits.wall_s + _GRACE_S)
    if result.status == 'error':
      self.close()
    return result

  def run_many(self, programs: Sequence[Program]) -> list[Result]:
    """Runs programs in their order; a start costs once for all.

    A program with which the sandbox fails is run again alone.
    """
    results = []
    for program in programs:
      result = self.run(program)
      if result.status == 'error':
        result = self.run(program)
        self.close()
      results.append(result)
    return results

  def close(self) -> None:
    """Ends everything in it; a later program starts it again."""
    if self._supervisor is not None:
      self._supervisor.close()
      self._supervisor = None

  def __enter__(self) -> 'Sandbox':
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def choose_backend(name: str | None = None) -> BackendName:
  """The backend of that name, or the first safe one that works here.

  Raises:
    SandboxError: if it does not work, with the reason.
  """
  if name is not None and name not in isolation.NAMES:
    raise ValueError(
      f'backend: got {name!r}, expected one of {list(isolation.NAMES)}'
    )
  problems = []
  for candidate in isolation.AUTOMATIC if name is None else (name,):
    problem = why_not(candidate)
    if problem is None:
      return candidate  # pyrefly: ignore
    problems.append(f'{candidate}: {problem}')
  raise SandboxError(
    f'no sandbox works on this machine ({"; ".join(problems)}); programs that '
    "are trusted can be run with backend='unsafe_rlimits'"
  )


@functools.cache
def why_not(name: str) -> str | None:
  """Why a backend does not work on this machine; None if it does."""
  try:
    supervisor = Supervisor(name, 1 << 20)
  except (SandboxError, FileNotFoundError) as error:
    return str(error)
  supervisor.close()
  return None
