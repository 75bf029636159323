"""What an incremental parse reports."""

import dataclasses

from dsv32_jax.chat.errors import ParseError
from dsv32_jax.chat.types import Message, ToolCall


@dataclasses.dataclass(frozen=True)
class ReasoningDelta:
  """More reasoning.

  Attributes:
    text: what is new of it.
  """

  text: str


@dataclasses.dataclass(frozen=True)
class ContentDelta:
  """More content.

  Attributes:
    text: what is new of it.
  """

  text: str


@dataclasses.dataclass(frozen=True)
class CallStarted:
  """The name of a tool call is known.

  Attributes:
    index: of the call in the message.
    name: of the function.
  """

  index: int
  name: str


@dataclasses.dataclass(frozen=True)
class ArgumentsDelta:
  """More of a call's arguments.

  Attributes:
    index: of the call in the message.
    text: JSON text; that of a whole call is `json.dumps` of its arguments with
      `ensure_ascii=False`.
  """

  index: int
  text: str


@dataclasses.dataclass(frozen=True)
class CallFinished:
  """A tool call is whole.

  Attributes:
    index: of the call in the message.
    call: the call.
  """

  index: int
  call: ToolCall


@dataclasses.dataclass(frozen=True)
class Ended:
  """The completion is over and sound; the last event.

  Attributes:
    message: all of it.
  """

  message: Message


@dataclasses.dataclass(frozen=True)
class Failed:
  """The completion cannot be read; the last event.

  Attributes:
    error: why.
  """

  error: ParseError


Event = (
  ReasoningDelta
  | ContentDelta
  | CallStarted
  | ArgumentsDelta
  | CallFinished
  | Ended
  | Failed
)
