"""Messages, tools and tool calls: what a conversation is made of.

Values are plain: they compare by value, hold no token ids and know no model.
The dicts in them are not to be changed.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from dsv32_jax.chat import markup
from dsv32_jax.chat.errors import ChatError

Mode = Literal['chat', 'thinking']
Role = Literal['system', 'developer', 'user', 'assistant', 'tool']

# As deep as a JSON value may be; Python's own parser gives up a little later.
_MAX_DEPTH = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolSpec:
  """A function that the model may call.

  Attributes:
    name: what a call says.
    description: for the model.
    parameters: JSON schema of the arguments, an object; None for any.
    strict: as the OpenAI API has it; shown to the model if it is not None.

  Raises:
    ChatError: if the name cannot stand in a tag or a value is not JSON.
  """

  name: str
  description: str = ''
  parameters: dict[str, Any] | None = None
  strict: bool | None = None

  def __post_init__(self):
    check_name('name', self.name)
    check_text('description', self.description)
    check_json('parameters', self.parameters)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolCall:
  """A call that the model makes.

  Attributes:
    name: of the function.
    arguments: by name; JSON values.
    id: by which a result says what it answers. The model does not write it: who
      runs the calls may give one, or leave it empty and keep results in order.

  Raises:
    ChatError: if a name cannot stand in a tag or a value is not JSON.

  >>> ToolCall(name='stock_level', arguments={'sku': 'A-7', 'limit': 3}).name
  'stock_level'
  """

  name: str
  arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
  id: str = ''

  def __post_init__(self):
    check_name('name', self.name)
    check_json('arguments', self.arguments)
    for key in self.arguments:
      check_name(f'arguments[{key!r}]', key, may_be_empty=True)
    check_text('id', self.id)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
  """One turn, or one result of a call.

  Attributes:
    role: 'system' speaks without a marker, 'developer' as a user who brings
      tools along, 'tool' is the result of one call.
    content: text.
    reasoning: of an assistant, what it thought before `content`.
    tool_calls: of an assistant.
    tool_call_id: of a tool message, `ToolCall.id` of the call that it answers;
      '' for the next one.
    tools: of a system or developer message: what may be called.
    response_format: of the same: the JSON schema of the answer
      (`schema.response_schema` has the forms that it may have).

  Raises:
    ChatError: if the role is unknown or a field does not go with it.

  >>> Message(role='user', content='hello')
  Message(role='user', content='hello')
  """

  role: Role
  content: str = ''
  reasoning: str = ''
  tool_calls: tuple[ToolCall, ...] = ()
  tool_call_id: str = ''
  tools: tuple[ToolSpec, ...] = ()
  response_format: dict[str, Any] | None = None

  def __post_init__(self):
    if self.role not in get_args(Role):
      raise ChatError(
        'role', f'got {self.role!r}, expected one of {list(get_args(Role))}'
      )
    for field in ('content', 'reasoning', 'tool_call_id'):
      check_text(field, getattr(self, field))
    check_json('response_format', self.response_format)
    for field, roles in _ONLY_WITH.items():
      if getattr(self, field) and self.role not in roles:
        raise ChatError(
          field, f'got one in a {self.role} message, expected {_either(roles)}'
        )

  def __repr__(self) -> str:
    shown = ', '.join(
      f'{field.name}={getattr(self, field.name)!r}'
      for field in dataclasses.fields(self)
      if field.name == 'role' or getattr(self, field.name)
    )
    return f'Message({shown})'


_ONLY_WITH: dict[str, tuple[str, ...]] = {
  'reasoning': ('assistant',),
  'tool_calls': ('assistant',),
  'tool_call_id': ('tool',),
  'tools': ('system', 'developer'),
  'response_format': ('system', 'developer'),
}


def _either(roles: tuple[str, ...]) -> str:
  return f'a role of {list(roles)}' if len(roles) > 1 else f'role {roles[0]!r}'


def check_text(field: str, value: object) -> None:
  """Refuses what is not text that can be encoded.

  Raises:
    ChatError: naming `field`.
  """
  if not isinstance(value, str):
    raise ChatError(field, f'got {type(value).__name__}, expected text')
  try:
    value.encode()
  except UnicodeEncodeError as error:
    # JSON can spell half of a UTF-16 pair, which no tokenizer takes.
    raise ChatError(
      field,
      f'got the unpaired surrogate {value[error.start]!r} at character '
      f'{error.start}, expected text',
    ) from None


def check_name(
  field: str, value: object, *, may_be_empty: bool = False
) -> None:
  """Refuses a name that cannot stand between the quotes of a tag.

  Raises:
    ChatError: naming `field`.
  """
  check_text(field, value)
  assert isinstance(value, str)
  if not value and not may_be_empty:
    raise ChatError(field, 'got an empty name')
  for part in ('"', '\n', markup.DSML):
    if part in value:
      raise ChatError(field, f'got {value!r}, expected a name without {part!r}')


def check_json(field: str, value: object, *, depth: int = 0) -> None:
  """Refuses what JSON cannot hold.

  Raises:
    ChatError: naming `field` and the place in it.
  """
  if depth > _MAX_DEPTH:
    raise ChatError(field, f'got more than {_MAX_DEPTH} levels')
  if isinstance(value, str):
    check_text(field, value)
  elif isinstance(value, Mapping):
    for key, item in value.items():
      check_text(f'{field}: key', key)
      check_json(f'{field}[{key!r}]', item, depth=depth + 1)
  elif isinstance(value, list | tuple):
    for index, item in enumerate(value):
      check_json(f'{field}[{index}]', item, depth=depth + 1)
  elif isinstance(value, float) and not math.isfinite(value):
    raise ChatError(field, f'got {value}, which JSON cannot hold')
  elif value is not None and not isinstance(value, bool | int | float):
    raise ChatError(field, f'got {type(value).__name__}, expected a JSON value')
