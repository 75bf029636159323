"""What can be wrong with a conversation, and with a model's completion."""

import enum

# Text of whoever sent the request stands in messages; no more of it than this.
_LONGEST = 300


class ChatError(ValueError):
  """A conversation, tool or format that cannot be used.

  Attributes:
    field: where, such as 'messages[2].content'; '' if it is no single field.
    reason: what was found and what was expected.
  """

  def __init__(self, field: str, reason: str):
    self.field = one_line(field)
    self.reason = one_line(reason)
    super().__init__(f'{self.field}: {self.reason}' if field else self.reason)


class ParseErrorCode(enum.StrEnum):
  """How a completion breaks the grammar, or what was asked for."""

  # The grammar.
  REASONING_NOT_CLOSED = 'reasoning_not_closed'
  CALLS_IN_REASONING = 'calls_in_reasoning'
  CONTROL_IN_TEXT = 'control_in_text'
  MISSING_EOS = 'missing_eos'
  TEXT_AFTER_CALLS = 'text_after_calls'
  TEXT_AFTER_EOS = 'text_after_eos'
  TEXT_BETWEEN_TAGS = 'text_between_tags'
  TRUNCATED_CALLS = 'truncated_calls'
  BAD_NAME = 'bad_name'
  BAD_STRING_ATTRIBUTE = 'bad_string_attribute'
  DUPLICATE_PARAMETER = 'duplicate_parameter'
  # What the grammar leaves open.
  BAD_JSON = 'bad_json'
  UNKNOWN_TOOL = 'unknown_tool'
  BAD_ARGUMENTS = 'bad_arguments'
  BAD_RESPONSE = 'bad_response'


class ParseError(ValueError):
  """A completion that cannot be read as a message.

  Attributes:
    code: which kind of mistake.
    position: where in the completion, in characters.
    reason: one line.
  """

  def __init__(self, code: ParseErrorCode, position: int, reason: str):
    self.code = code
    self.position = position
    self.reason = one_line(reason)
    super().__init__(f'{code} at character {position}: {self.reason}')


def one_line(text: str) -> str:
  r"""Text that can be printed and sent: line ends and the like are escaped.

  >>> one_line('a\nb\ud800')
  'a\\nb\\ud800'
  """
  if len(text) > _LONGEST:
    text = text[: _LONGEST - 3] + '...'
  return ''.join(
    c if c.isprintable() else c.encode('unicode_escape').decode() for c in text
  )
