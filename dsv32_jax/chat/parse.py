"""Reads a whole completion."""

from collections.abc import Sequence
from typing import Any

from dsv32_jax.chat.events import Failed
from dsv32_jax.chat.stream import CompletionParser
from dsv32_jax.chat.types import Message, Mode, ToolSpec


def parse(
  text: str,
  *,
  mode: Mode = 'chat',
  tools: Sequence[ToolSpec] | None = None,
  response_format: dict[str, Any] | None = None,
  recover: bool = False,
) -> Message:
  """Reads a completion as the message that it is.

  Args:
    text: what comes after the opener, EOS included.
    mode: that of the prompt.
    tools: what may be called; None to check neither names nor arguments.
    response_format: what a reply without calls has to meet.
    recover: reads what can be read instead of raising; see `CompletionParser`.

  Returns:
    An assistant message; its calls have no ids.

  Raises:
    ParseError: at the first mistake, unless `recover`.
    ChatError: if a schema of a tool or the response format is none.

  >>> parse('1 plus 1</think>2<｜end▁of▁sentence｜>', mode='thinking')
  Message(role='assistant', content='2', reasoning='1 plus 1')
  """
  parser = CompletionParser(
    mode, tools=tools, response_format=response_format, recover=recover
  )
  for event in [*parser.feed(text), *parser.finish()]:
    if isinstance(event, Failed):
      raise event.error
  return parser.message
