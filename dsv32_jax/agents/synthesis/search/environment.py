"""A search task as an environment."""

import os
import pathlib
from collections.abc import Sequence

from dsv32_jax.agents.synthesis.search.corpus import Corpus
from dsv32_jax.agents.synthesis.search.scoring import given_answer, is_right
from dsv32_jax.agents.synthesis.search.tasks import SearchTask
from dsv32_jax.agents.synthesis.search.tools import make_tools
from dsv32_jax.agents.types import Score, Tool
from dsv32_jax.chat import Message

_SYSTEM = (
  'Answer the question with what the library says. Everything in it is '
  'invented, so nothing that you know helps; search and read. The library '
  'also reports mistakes of others, and says so. End your last reply with one '
  'line: Answer: NAME'
)


class SearchEnvironment:
  """One episode of a task. The last reply is judged; nothing else ends it."""

  def __init__(self, task: SearchTask, library: str | os.PathLike):
    """Opens the library.

    Args:
      task: to solve.
      library: file of its world.

    Raises:
      ValueError: if the library is not there or not readable.
    """
    if not pathlib.Path(library).is_file():
      raise ValueError(
        f'library: got {library}, expected the file of world {task.world}'
      )
    self._task = task
    self._corpus = Corpus(library)
    self._tools = make_tools(self._corpus)

  @property
  def tools(self) -> Sequence[Tool]:
    return self._tools

  @property
  def is_over(self) -> bool:
    return False

  def start(self) -> Sequence[Message]:
    """See `Environment`."""
    return (
      Message(
        role='system',
        content=_SYSTEM,
        tools=tuple(tool.spec for tool in self._tools),
      ),
      Message(role='user', content=self._task.question),
    )

  def score(self, messages: Sequence[Message]) -> Score:
    """1 for the right name in a last reply without calls, else 0."""
    last = messages[-1] if messages else None
    if last is None or last.role != 'assistant' or last.tool_calls:
      return Score(reward=0.0, reasons=('no answer was given',))
    answer = given_answer(last.content)
    if is_right(answer, self._task.answer):
      return Score(reward=1.0, reasons=('the answer is right',))
    return Score(
      reward=0.0,
      reasons=(f'got {answer[:80]!r}, expected {self._task.answer!r}',),
    )

  def close(self) -> None:
    """Closes the library."""
    self._corpus.close()
