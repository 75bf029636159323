"""The sections that tell the model of tools and of the answer's format.

The markup is DeepSeek-V3.2's, the wording ours (docs/deviations.md).
"""

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from dsv32_jax.chat import markup
from dsv32_jax.chat.openai_format import function_of
from dsv32_jax.chat.schema import response_schema
from dsv32_jax.chat.types import Message, ToolCall

_PARAMETER = (
  f'{markup.PARAMETER} name="PARAMETER" string="true|false">VALUE'
  f'{markup.PARAMETER_END}'
)
_TOOLS = f"""## Tools

You can call the functions that are listed at the end of this section. To do so,
end your reply with a block of this form, one invoke for each call:

{markup.CALLS}
{markup.INVOKE} name="FUNCTION">
{_PARAMETER}
...
{markup.INVOKE_END}
...
{markup.CALLS_END}

For a string write string="true" and the string as it is, without quotes or
escapes. For anything else (a number, true, false, null, a list, an object)
write string="false" and the value as JSON. Nothing follows the block.

The results come back in the order of the calls. If you think before you reply,
think about them too before you go on:

{markup.RESULTS}
{markup.RESULT}...{markup.RESULT_END}
{markup.RESULTS_END}

{markup.THINK}...{markup.THINK_END}

The functions, each with the JSON schema of its parameters:

<functions>
"""
_TOOLS_END = '\n</functions>\n'

_RESPONSE_FORMAT = """## Response Format:

Your reply must be one JSON value that meets this JSON schema, and nothing else:
"""

_MARKUP = re.compile(
  '(' + '|'.join(map(re.escape, (*markup.CONTROL_STRINGS, markup.DSML))) + ')'
)


class Piece(NamedTuple):
  """A part of the text.

  Attributes:
    text: as it reads.
    is_control: it is a string that only the template may write, and becomes the
      id of its own where the vocabulary has one.
  """

  text: str
  is_control: bool = False


def marked(text: str) -> list[Piece]:
  """The pieces of text that is ours: control strings in it are meant."""
  return [
    Piece(part, index % 2 == 1)
    for index, part in enumerate(_MARKUP.split(text))
    if part
  ]


def plain(text: str) -> list[Piece]:
  """The piece of text that is someone else's, if there is any."""
  return [Piece(text)] if text else []


def of_request(message: Message) -> list[Piece]:
  """The sections of a system or developer message, each after a blank line."""
  pieces = []
  if message.tools:
    pieces += marked('\n\n' + _TOOLS)
    pieces += plain('\n'.join(_dump(function_of(t)) for t in message.tools))
    pieces += marked(_TOOLS_END)
  schema = response_schema(message.response_format)
  if schema is not None:
    pieces += marked('\n\n' + _RESPONSE_FORMAT)
    pieces += plain(_dump(schema))
  return pieces


def of_calls(calls: Sequence[ToolCall]) -> list[Piece]:
  """The block of calls that ends an assistant message, if there are calls."""
  if not calls:
    return []
  pieces = marked(f'\n\n{markup.CALLS}\n')
  for call in calls:
    pieces += marked(f'{markup.INVOKE} name="')
    pieces += plain(call.name)
    pieces += marked('">\n')
    for index, (key, value) in enumerate(call.arguments.items()):
      pieces += marked(('\n' if index else '') + f'{markup.PARAMETER} name="')
      pieces += plain(key)
      text, is_string = argument_text(value)
      pieces += marked(f'" string="{"true" if is_string else "false"}">')
      pieces += plain(text)
      pieces += marked(markup.PARAMETER_END)
    pieces += marked(f'\n{markup.INVOKE_END}\n')
  return pieces + marked(markup.CALLS_END)


def of_results(results: Sequence[Message], *, are_all: bool) -> list[Piece]:
  """The block of results of an assistant's calls, if there are results."""
  if not results:
    return []
  pieces = marked(f'\n\n{markup.RESULTS}')
  for result in results:
    pieces += marked(f'\n{markup.RESULT}')
    pieces += plain(result.content)
    pieces += marked(markup.RESULT_END)
  return pieces + (marked(f'\n{markup.RESULTS_END}\n\n') if are_all else [])


def argument_text(value: Any) -> tuple[str, bool]:
  """An argument as it stands between its tags, and whether it is a raw string.

  >>> argument_text('A-7'), argument_text([1, 'x'])
  (('A-7', True), ('[1, "x"]', False))
  """
  if isinstance(value, str) and _PARAMETER_STOP not in value:
    return value, True
  # Raw text cannot hold the tag that ends it. JSON can, spelt otherwise.
  text = _dump(value)
  if _PARAMETER_STOP in text:
    text = text.replace('｜', '\\uff5c')
  return text, False


_PARAMETER_STOP = markup.PARAMETER_END[1:-1]


def _dump(value: Any) -> str:
  return json.dumps(value, ensure_ascii=False)
