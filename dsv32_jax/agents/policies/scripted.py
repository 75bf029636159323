"""A policy that follows a script: for tests, baselines and demonstrations."""

from collections.abc import Callable, Sequence

from dsv32_jax import chat
from dsv32_jax.agents.types import PolicyError, Query, Reply
from dsv32_jax.chat import Message

Line = Message | str | Reply
"""A message; or the text of a completion, which is parsed as a model's is; or
all that there is to a reply."""


class ScriptedPolicy:
  """Replies with the lines of a list in turn, or with those of a function.

  The place in the list is told by the conversation, so one policy serves any
  number of episodes.

  >>> policy = ScriptedPolicy([Message(role='assistant', content='42')])
  >>> policy.reply(Query(messages=(Message(role='user'),))).message.content
  '42'
  """

  def __init__(self, script: Sequence[Line] | Callable[[Query], Line]):
    """Takes the lines, or a function that may be called from several threads.

    A function may raise `PolicyError`.
    """
    self._script = script

  def reply(self, query: Query) -> Reply:
    """See `Policy`."""
    line = self._line(query)
    if isinstance(line, Reply):
      return line
    if isinstance(line, Message):
      return Reply(message=line, text=line.content)
    try:
      return Reply(message=chat.parse(line, mode=query.mode), text=line)
    except chat.ParseError as error:
      return Reply(message=None, text=line, error=error.code)

  def _line(self, query: Query) -> Line:
    if callable(self._script):
      return self._script(query)
    place = _replies_in_turn(query.messages)
    if place >= len(self._script):
      raise PolicyError(
        f'the script has {len(self._script)} lines, asked was for another'
      )
    return self._script[place]


def _replies_in_turn(messages: Sequence[Message]) -> int:
  """How many replies follow the last user or developer message."""
  count = 0
  for message in reversed(messages):
    if message.role in ('user', 'developer'):
      break
    count += message.role == 'assistant'
  return count
