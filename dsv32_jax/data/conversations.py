"""Chat conversations to learn from, and the JSONL files that hold them.

Which of their tokens are learnt is in `conversation_tokens`.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from dsv32_jax import chat
from dsv32_jax.config.data import SourceConfig
from dsv32_jax.data import cache, sources

_FIELDS = ('messages', 'tools', 'response_format', 'mode')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation:
  """A conversation to learn from.

  Attributes:
    messages: ends with a reply of the assistant.
    mode: 'thinking' or 'chat'.
    tags: what else is known of it, such as its domain; JSON values.

  Raises:
    ChatError: if nothing of it can be learnt, or it has reasoning in chat mode,
      which would not be learnt.
  """

  messages: tuple[chat.Message, ...]
  mode: chat.Mode = 'chat'
  tags: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    for name in _FIELDS:
      if name in self.tags:
        raise chat.ChatError(
          f'tags.{name}', 'is a field of the file, expected another name'
        )
    if not self.messages:
      raise chat.ChatError('messages', 'got none, expected at least one')
    last = len(self.messages) - 1
    if self.messages[last].role != 'assistant':
      raise chat.ChatError(
        f'messages[{last}]',
        f'is the last and has role {self.messages[last].role!r}, expected a '
        'reply of the assistant',
      )
    for index, message in enumerate(self.messages):
      if message.role == 'assistant':
        # Where the model could not reply there is no opener to learn from.
        chat.check_ready(self.messages[:index], mode=self.mode)
      if message.reasoning and self.mode == 'chat':
        raise chat.ChatError(
          f'messages[{index}].reasoning',
          "got some in mode 'chat', expected none (mode 'thinking' learns it)",
        )

  def to_json(self) -> dict[str, Any]:
    """The object of a JSONL line; `from_json` reads it back."""
    messages = [chat.message_to_openai(message) for message in self.messages]
    return {**self.tags, 'mode': self.mode, 'messages': messages}

  @classmethod
  def from_json(cls, record: Any) -> 'Conversation':
    """Reads the object of a JSONL line.

    Args:
      record: `messages` as the OpenAI API has them (reasoning in
        `reasoning_content`); if it has them `tools` and `response_format`, of
        the whole conversation, and `mode`. Without a mode it is 'thinking' if
        the last reply has reasoning. Everything else is a tag.

    Raises:
      ChatError: naming the field.
    """
    if not isinstance(record, Mapping):
      raise chat.ChatError(
        '', f'got a {type(record).__name__}, expected a JSON object'
      )
    messages = chat.with_request(
      chat.messages_from_openai(record.get('messages')),
      tools=chat.tools_from_openai(record.get('tools')),
      response_format=record.get('response_format'),
    )
    default = 'thinking' if messages[-1].reasoning else 'chat'
    mode = record.get('mode', default)
    if mode not in get_args(chat.Mode):
      raise chat.ChatError(
        'mode', f'got {mode!r}, expected one of {list(get_args(chat.Mode))}'
      )
    return cls(
      messages=messages,
      mode=mode,
      tags={k: v for k, v in record.items() if k not in _FIELDS},
    )


def write(path: str | os.PathLike, records: Iterable[Conversation]) -> None:
  """Writes conversations as JSONL, all or nothing."""
  lines = (
    json.dumps(record.to_json(), ensure_ascii=False) for record in records
  )
  cache.write_atomically(os.fspath(path), ''.join(f'{x}\n' for x in lines))


def read(path: str | os.PathLike) -> list[Conversation]:
  """Reads the conversations of a JSONL file, a directory or a glob pattern.

  Raises:
    ValueError: naming the file and line of a record that is not a
      conversation, or the path if nothing is there.
  """
  source = SourceConfig(kind='conversations', path=os.fspath(path))
  label = sources.label_of(source)
  return [parse_line(n, text, label) for n, text in sources.jsonl_lines(source)]


def parse_line(name: str, line: bytes, label: str) -> Conversation:
  """Reads a line; `name` and `label` say in errors where it stands.

  Raises:
    ValueError: for a line that is not a conversation.
  """
  try:
    return Conversation.from_json(json.loads(line))
  except (ValueError, RecursionError) as error:
    kind = '' if isinstance(error, chat.ChatError) else 'not JSON: '
    raise ValueError(f'{label}: {name}: {kind}{error}') from None
