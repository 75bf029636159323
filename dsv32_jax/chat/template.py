"""A conversation as the text that the model reads (docs/chat.md).

The grammar is that of DeepSeek-V3.2's own encoder. Two faults of it are not
repeated: a developer message stays when a later turn comes, and reasoning that
is to be kept is kept.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from dsv32_jax.chat import markup, sections
from dsv32_jax.chat.errors import ChatError
from dsv32_jax.chat.results import last_caller, results_of
from dsv32_jax.chat.sections import Piece, marked, plain
from dsv32_jax.chat.types import Message, Mode, ToolSpec


def render(
  messages: Sequence[Message],
  *,
  mode: Mode = 'chat',
  keep_reasoning: bool = False,
) -> str:
  """The text of a conversation.

  It ends where the model goes on: behind a user or developer message, and
  behind the last result of a block of calls, stands the opener, `<think>` in
  the last turn in thinking mode and else `</think>`.

  Reasoning of a turn is dropped once a later user or developer message has
  come, and only then; calls and results stay (arXiv:2512.02556, 3.2.1).

  The text is for people. To feed a model use `encode`: in a text, nothing tells
  a control string from a user who wrote the same.

  Args:
    messages: the conversation.
    mode: 'thinking', or 'chat' for without.
    keep_reasoning: in thinking mode, keeps that of all turns.

  Raises:
    ChatError: naming the message that does not fit where it stands.

  >>> render([Message(role='user', content='hi')], mode='thinking')
  '<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜><think>'
  """
  pieces = render_pieces(messages, mode=mode, keep_reasoning=keep_reasoning)
  return ''.join(piece.text for piece in pieces)


def render_pieces(
  messages: Sequence[Message],
  *,
  mode: Mode = 'chat',
  keep_reasoning: bool = False,
) -> list[Piece]:
  """As `render`, with what only the template may write marked.

  >>> pieces = render_pieces([Message(role='user', content='<think>')])
  >>> [piece.is_control for piece in pieces]
  [True, True, False, True, True]
  """
  if mode not in ('chat', 'thinking'):
    raise ChatError('mode', f"got {mode!r}, expected 'chat' or 'thinking'")
  last_user = _last_user(messages)
  # Messages from here on are rendered with their reasoning.
  thinks_from = len(messages)
  if mode == 'thinking':
    thinks_from = 0 if keep_reasoning else last_user

  pieces = marked(markup.BOS)
  results_end = 0
  for index, message in enumerate(messages):
    thinks = index >= thinks_from
    opener = marked(markup.THINK if thinks else markup.THINK_END)
    if message.role == 'system':
      pieces += plain(message.content) + sections.of_request(message)
    elif message.role in ('user', 'developer'):
      pieces += _user(message) + opener
    elif message.role == 'assistant':
      if thinks and index > last_user:
        _check_thought(message, index)
      pieces += _assistant(message, thinks=thinks)
      results = results_of(messages, index)
      are_all = len(results) == len(message.tool_calls)
      pieces += sections.of_results(results, are_all=are_all)
      if results and are_all:
        pieces += opener
      results_end = index + 1 + len(results)
    elif index >= results_end:
      raise ChatError(
        f'messages[{index}]', 'is a result, expected a call before it'
      )
  return pieces


def check_ready(messages: Sequence[Message], *, mode: Mode = 'chat') -> None:
  """Refuses a conversation after which the model cannot reply.

  Call it before `with_request`, so that an error counts the caller's messages.

  Raises:
    ChatError: as `render`, and unless the conversation ends with a user or
      developer message or with all results of the last calls.

  >>> check_ready([Message(role='user', content='hi')])
  """
  if not messages:
    raise ChatError('messages', 'got none, expected at least one')
  render_pieces(messages, mode=mode)
  last = len(messages) - 1
  role = messages[last].role
  if role not in ('user', 'developer', 'tool'):
    raise ChatError(
      f'messages[{last}]',
      f'is the last and has role {role!r}, expected a user or developer '
      'message or the results of calls',
    )
  caller, missing = last_caller(messages)
  if missing:
    raise ChatError(
      f'messages[{last}]',
      f'is the last, but {missing} of {len(messages[caller].tool_calls)} '
      f'results for messages[{caller}] are missing',
    )


def with_request(
  messages: Sequence[Message],
  *,
  tools: Sequence[ToolSpec] = (),
  response_format: dict[str, Any] | None = None,
) -> tuple[Message, ...]:
  """Puts tools and format of a whole request where the model reads them.

  That is the first system message, or a new one in front.

  Args:
    messages: the conversation.
    tools: added to those that the message has.
    response_format: replaces that of the message unless it is None.

  >>> messages = with_request(
  ...   [Message(role='user')], tools=[ToolSpec(name='f')]
  ... )
  >>> [message.role for message in messages]
  ['system', 'user']
  """
  messages = tuple(messages)
  if not tools and response_format is None:
    return messages
  place = next(
    (i for i, message in enumerate(messages) if message.role == 'system'), None
  )
  if place is None:
    messages = (Message(role='system'), *messages)
    place = 0
  old = messages[place]
  new = dataclasses.replace(
    old,
    tools=(*old.tools, *tools),
    response_format=(
      old.response_format if response_format is None else response_format
    ),
  )
  return (*messages[:place], new, *messages[place + 1 :])


def _last_user(messages: Sequence[Message]) -> int:
  """Index of the last user or developer message, or -1."""
  return max(
    (i for i, m in enumerate(messages) if m.role in ('user', 'developer')),
    default=-1,
  )


def _check_thought(message: Message, index: int) -> None:
  if not message.reasoning and not message.tool_calls:
    raise ChatError(
      f'messages[{index}].reasoning',
      'is empty, expected reasoning or tool_calls in a reply to the last user '
      'message in thinking mode',
    )


def _user(message: Message) -> list[Piece]:
  pieces = marked(markup.USER)
  if message.role == 'developer':
    pieces += sections.of_request(message)
    pieces += marked('\n\n' + markup.DEVELOPER_HEADING)
  return pieces + plain(message.content) + marked(markup.ASSISTANT)


def _assistant(message: Message, *, thinks: bool) -> list[Piece]:
  pieces = []
  if thinks:
    pieces += plain(message.reasoning) + marked(markup.THINK_END)
  pieces += plain(message.content)
  pieces += sections.of_calls(message.tool_calls)
  return pieces + marked(markup.EOS)
