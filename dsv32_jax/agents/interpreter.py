"""A tool that runs Python in the sandbox and remembers what it ran."""

from collections.abc import Mapping
from typing import Any

from dsv32_jax.agents.sandbox import (
  Limits,
  Program,
  Result,
  Sandbox,
  SandboxError,
)
from dsv32_jax.agents.types import ToolError
from dsv32_jax.chat import ToolSpec

LIMITS = Limits(wall_s=20.0, cpu_s=10.0, memory_bytes=512 << 20)
_LONGEST_CODE = 100_000
_DESCRIPTION = (
  'Runs Python 3 in a session: variables, functions, imports and files stay '
  'for later calls. Returns what the code prints and, as at the prompt, the '
  'value of a last expression. There is the standard library only, no network, '
  'and each call may take {wall:g} s.'
)
# Why a session is gone.
_ENDS = {
  'timeout': 'the code ran for more than {limits.wall_s:g} s',
  'cpu': 'the code used more than {limits.cpu_s:g} s of processor time',
  'memory': 'the code used more than {limits.memory_bytes} bytes of memory',
  'output': 'the code wrote more than {limits.output_bytes} bytes',
  'processes': 'the code started more than {limits.processes} processes',
  'files': 'the code made more than {limits.files} files',
  'file_size': 'a file grew beyond {limits.file_bytes} bytes',
  'exit': 'the code ended the session',
  'ok': 'the code ended the session',
  'signal': 'signal {signal} ended the session',
}
_LOST = 'a new one begins with the next call, without its variables and files'


class PythonTool:
  r"""Python with a memory, for one episode.

  Its process lives in the sandbox from the first call to `close`; between calls
  it stands still. A call that goes beyond a limit ends it, and the result says
  that its state is lost. Not for several threads at a time.

  >>> with PythonTool() as tool:
  ...   tool({'code': 'x = 6'}), tool({'code': 'print("six")\nx * 7'})
  ('[no output]', 'six\n42')

  Attributes:
    spec: of the tool `python`, with one argument, `code`.
  """

  def __init__(
    self,
    *,
    sandbox: Sandbox | None = None,
    limits: Limits = LIMITS,
    max_characters: int = 10_000,
  ):
    """Starts nothing yet.

    Args:
      sandbox: used by nobody else meanwhile, and ended by `close`; None makes
        one.
      limits: of each call: wall and processor time and output; the others of
        the session.
      max_characters: of a result; the middle of a longer one is cut.
    """
    if max_characters < 100:
      raise ValueError(
        f'max_characters: got {max_characters}, expected at least 100'
      )
    self._sandbox = sandbox
    self._limits = limits
    self._max_characters = max_characters
    self._is_closed = False
    self.spec = ToolSpec(
      name='python',
      description=_DESCRIPTION.format(wall=limits.wall_s),
      parameters={
        'type': 'object',
        'properties': {
          'code': {'type': 'string', 'description': 'What to run.'}
        },
        'required': ['code'],
        'additionalProperties': False,
      },
    )

  def __call__(self, arguments: Mapping[str, Any]) -> str:
    """See `Tool`; what the code raises is in the result, as a traceback.

    Raises:
      ToolError: code that is too long, a sandbox that fails, or a call after
        `close`.
    """
    if self._is_closed:
      raise ToolError('the session is closed')
    code = str(arguments['code'])
    if len(code) > _LONGEST_CODE:
      raise ToolError(
        f'code: got {len(code)} characters, expected at most {_LONGEST_CODE}'
      )
    try:
      self._sandbox = self._sandbox or Sandbox()
      result = self._sandbox.run(
        Program(source=code, limits=self._limits, keeps_state=True)
      )
    except SandboxError as error:
      raise ToolError(f'Python cannot be run: {error}') from None
    if result.status == 'error':
      raise ToolError(f'the session failed ({result.detail}); {_LOST}')
    return self._text(result)

  def close(self) -> None:
    """Ends the session: no process and no file of it stays."""
    self._is_closed = True
    if self._sandbox is not None:
      self._sandbox.close()
      self._sandbox = None

  def __enter__(self) -> 'PythonTool':
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _text(self, result: Result) -> str:
    parts = []
    for part in (result.stdout, result.stderr):
      if stripped := part.rstrip('\n'):
        parts.append(stripped)
    text = cut('\n'.join(parts), self._max_characters)
    if result.is_alive:
      return text or '[no output]'
    why = _ENDS[result.status].format(limits=self._limits, signal=result.signal)
    note = f'[{why}; {_LOST}]'
    return f'{text}\n{note}' if text else note


def cut(text: str, limit: int) -> str:
  r"""The text, or its beginning and end with a note of what is between.

  >>> cut('a' * 6 + 'b' * 6, 8)
  'aaaa\n[4 characters cut here]\nbbbb'

  Args:
    text: any.
    limit: characters of it that are kept.
  """
  if len(text) <= limit:
    return text
  half = limit // 2
  note = f'[{len(text) - 2 * half} characters cut here]'
  return f'{text[:half]}\n{note}\n{text[-half:]}'
