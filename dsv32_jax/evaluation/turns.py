"""Processes that measure in turns, so that whatever a machine does meets all.

A worker answers its start and every line on its standard input with one line of
JSON, and ends when its input does.
"""

import contextlib
import json
import pathlib
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any


class Worker:
  """One such process."""

  def __init__(
    self,
    name: str,
    command: Sequence[str],
    log: pathlib.Path,
    *,
    environment: Mapping[str, str] | None = None,
  ):
    """Starts it.

    Args:
      name: in messages.
      command: to run.
      log: where its standard error goes.
      environment: its whole environment; None passes this process's on.
    """
    self.name = name
    self._log = log
    with log.open('w') as stderr:
      self._process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=environment,
        text=True,
      )
    assert self._process.stdin
    assert self._process.stdout
    self._commands, self._answers = self._process.stdin, self._process.stdout

  def ask(self, question: Any) -> dict:
    """Sends a line and waits for the answer.

    Raises:
      RuntimeError: the process has ended; with the end of its log.
    """
    try:
      print(question, file=self._commands, flush=True)
    except BrokenPipeError:
      raise self._ended() from None
    return self.answer()

  def answer(self) -> dict:
    """Waits for a line of JSON; the first one tells that it is ready.

    Raises:
      RuntimeError: the process has ended; with the end of its log.
    """
    for line in self._answers:
      # Programs print more than they are asked for.
      if line.startswith('{'):
        return json.loads(line)
    raise self._ended()

  def close(self) -> None:
    """Ends the process when it has done what it was asked for."""
    # What was left unsent concerns nobody: it may have ended by itself.
    with contextlib.suppress(BrokenPipeError):
      self._commands.close()
    self._process.wait()
    self._answers.close()

  def kill(self) -> None:
    """Ends the process at once."""
    self._process.kill()
    self.close()

  def _ended(self) -> RuntimeError:
    tail = ''.join(self._log.read_text().splitlines(True)[-15:])
    return RuntimeError(f'{self.name} ended:\n{tail}')
