"""Messages and tools from and to the dicts of the OpenAI API.

Two fields are DeepSeek's own: `reasoning_content` of an assistant message, and
`tools` and `response_format` of a single message.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, get_args

from dsv32_jax.chat import schema
from dsv32_jax.chat.errors import ChatError
from dsv32_jax.chat.types import Message, Role, ToolCall, ToolSpec

# Fields of a message that say nothing to the model.
_IGNORED = ('name', 'refusal', 'audio', 'annotations', 'function_call')
_FIELDS = (
  'role',
  'content',
  'reasoning_content',
  'reasoning',
  'tool_calls',
  'tool_call_id',
  'tools',
  'response_format',
)


def messages_from_openai(messages: object) -> tuple[Message, ...]:
  """Reads the `messages` of a request.

  Args:
    messages: a list of dicts. `content` is text, None or a list of text parts;
      an assistant's reasoning is `reasoning_content` or `reasoning`.

  Raises:
    ChatError: naming the field, as 'messages[2].content'.

  >>> messages_from_openai([{'role': 'user', 'content': 'hello'}])
  (Message(role='user', content='hello'),)
  """
  if not isinstance(messages, list | tuple):
    raise ChatError('messages', f'got {_kind(messages)}, expected a list')
  if not messages:
    raise ChatError('messages', 'got none, expected at least one')
  return tuple(
    _message(item, f'messages[{index}]') for index, item in enumerate(messages)
  )


def tools_from_openai(
  tools: object, *, field: str = 'tools'
) -> tuple[ToolSpec, ...]:
  """Reads the `tools` of a request; None is none.

  Raises:
    ChatError: naming the field, as 'tools[0].function.name'; also if a schema
      of arguments is not a JSON schema, or two tools share a name.

  >>> tools_from_openai([{'type': 'function', 'function': {'name': 'now'}}])[
  ...   0
  ... ].name
  'now'
  """
  if tools is None:
    return ()
  if not isinstance(tools, list | tuple):
    raise ChatError(field, f'got {_kind(tools)}, expected a list')
  specs = tuple(
    _tool(item, f'{field}[{index}]') for index, item in enumerate(tools)
  )
  try:
    schema.tool_schemas(specs)
  except ChatError as error:
    _inside(field.removesuffix('tools'), error)
  return specs


def message_to_openai(message: Message) -> dict[str, Any]:
  """Writes a message as the API has it.

  >>> message_to_openai(Message(role='assistant', content='2', reasoning='1+1'))
  {'role': 'assistant', 'content': '2', 'reasoning_content': '1+1'}
  """
  out: dict[str, Any] = {'role': message.role, 'content': message.content}
  if message.tool_calls and not message.content:
    out['content'] = None
  if message.reasoning:
    out['reasoning_content'] = message.reasoning
  if message.tool_calls:
    out['tool_calls'] = [call_to_openai(call) for call in message.tool_calls]
  if message.role == 'tool':
    out['tool_call_id'] = message.tool_call_id
  if message.tools:
    out['tools'] = [tool_to_openai(tool) for tool in message.tools]
  if message.response_format is not None:
    out['response_format'] = message.response_format
  return out


def call_to_openai(call: ToolCall) -> dict[str, Any]:
  """Writes a call as the API has it: the arguments are JSON text.

  >>> call_to_openai(ToolCall(name='now', id='call_1'))['function']
  {'name': 'now', 'arguments': '{}'}
  """
  arguments = json.dumps(call.arguments, ensure_ascii=False)
  return {
    'id': call.id,
    'type': 'function',
    'function': {'name': call.name, 'arguments': arguments},
  }


def tool_to_openai(tool: ToolSpec) -> dict[str, Any]:
  """Writes a tool as the API has it.

  >>> tool_to_openai(ToolSpec(name='now'))
  {'type': 'function', 'function': {'name': 'now'}}
  """
  return {'type': 'function', 'function': function_of(tool)}


def function_of(tool: ToolSpec) -> dict[str, Any]:
  """The inner dict of `tool_to_openai`, which the model is shown too."""
  out: dict[str, Any] = {'name': tool.name}
  if tool.description:
    out['description'] = tool.description
  if tool.parameters is not None:
    out['parameters'] = tool.parameters
  if tool.strict is not None:
    out['strict'] = tool.strict
  return out


def _message(item: object, where: str) -> Message:
  item = _object(item, where)
  for key in item:
    # A misspelt field would change what the model is told, without a word.
    if key not in _FIELDS and key not in _IGNORED:
      raise ChatError(f'{where}.{key}', f'is unknown, expected {_FIELDS}')
  if item.get('function_call'):
    raise ChatError(
      f'{where}.function_call', 'is the old form, expected tool_calls'
    )
  role: Any = item.get('role')
  if role not in get_args(Role):
    raise ChatError(
      f'{where}.role', f'got {role!r}, expected one of {list(get_args(Role))}'
    )
  response_format = item.get('response_format')
  try:
    schema.check_response_format(response_format)
    return Message(
      role=role,
      content=_text(item.get('content'), f'{where}.content'),
      reasoning=_text(
        item.get('reasoning_content') or item.get('reasoning'),
        f'{where}.reasoning_content',
      ),
      tool_calls=_calls(item.get('tool_calls'), f'{where}.tool_calls'),
      tool_call_id=_string(item.get('tool_call_id'), f'{where}.tool_call_id'),
      tools=tools_from_openai(item.get('tools'), field=f'{where}.tools'),
      response_format=response_format,
    )
  except ChatError as error:
    _inside(f'{where}.', error)


def _string(value: object, where: str) -> str:
  if value is not None and not isinstance(value, str):
    raise ChatError(where, f'got {_kind(value)}, expected text')
  return value or ''


def _text(content: object, where: str) -> str:
  """Text as it is, None as '', a list of text parts joined."""
  if content is None:
    return ''
  if isinstance(content, str):
    return content
  if not isinstance(content, list | tuple):
    raise ChatError(
      where, f'got {_kind(content)}, expected text or a list of text parts'
    )
  texts = []
  for index, part in enumerate(content):
    part = _object(part, f'{where}[{index}]')
    if part.get('type') != 'text':
      raise ChatError(
        f'{where}[{index}].type',
        f"got {part.get('type')!r}, expected 'text': the model reads no other",
      )
    if not isinstance(part.get('text'), str):
      raise ChatError(
        f'{where}[{index}].text',
        f'got {_kind(part.get("text"))}, expected text',
      )
    texts.append(part['text'])
  return ''.join(texts)


def _calls(calls: object, where: str) -> tuple[ToolCall, ...]:
  if calls is None:
    return ()
  if not isinstance(calls, list | tuple):
    raise ChatError(where, f'got {_kind(calls)}, expected a list')
  return tuple(
    _call(item, f'{where}[{index}]') for index, item in enumerate(calls)
  )


def _call(item: object, where: str) -> ToolCall:
  item = _object(item, where)
  function = _function(item, where)
  arguments = function.get('arguments')
  if arguments is None:
    arguments = {}
  elif isinstance(arguments, str):
    try:
      # Some servers write no arguments as no text.
      arguments = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError) as error:
      raise ChatError(
        f'{where}.function.arguments', f'is not JSON ({error})'
      ) from None
  if not isinstance(arguments, dict):
    raise ChatError(
      f'{where}.function.arguments',
      f'got {_kind(arguments)}, expected a JSON object',
    )
  try:
    return ToolCall(
      name=_string(function.get('name'), f'{where}.function.name'),
      arguments=arguments,
      id=_string(item.get('id'), f'{where}.id'),
    )
  except ChatError as error:
    _inside(f'{where}.', error)


def _tool(item: object, where: str) -> ToolSpec:
  function = _function(_object(item, where), where)
  parameters = function.get('parameters')
  if parameters is not None and not isinstance(parameters, dict):
    raise ChatError(
      f'{where}.function.parameters',
      f'got {_kind(parameters)}, expected a JSON schema (an object)',
    )
  strict = function.get('strict')
  if strict is not None and not isinstance(strict, bool):
    raise ChatError(
      f'{where}.function.strict', f'got {_kind(strict)}, expected a boolean'
    )
  try:
    return ToolSpec(
      name=_string(function.get('name'), f'{where}.function.name'),
      description=_string(
        function.get('description'), f'{where}.function.description'
      ),
      parameters=parameters,
      strict=strict,
    )
  except ChatError as error:
    _inside(f'{where}.', error)


def _function(item: Mapping[str, Any], where: str) -> Mapping[str, Any]:
  if item.get('type', 'function') != 'function':
    raise ChatError(
      f'{where}.type', f"got {item['type']!r}, expected 'function'"
    )
  return _object(item.get('function'), f'{where}.function')


def _object(item: object, where: str) -> Mapping[str, Any]:
  if not isinstance(item, Mapping):
    raise ChatError(where, f'got {_kind(item)}, expected an object')
  return item


def _inside(where: str, error: ChatError) -> NoReturn:
  """Raises an error of a part again, with the whole's place in front."""
  if error.field.startswith(where):
    raise error
  raise ChatError(where + error.field, error.reason) from None


def _kind(value: object) -> str:
  """What JSON calls the type of a value."""
  names: Sequence[tuple[type, str]] = (
    (bool, 'a boolean'),
    (str, 'text'),
    (int, 'a number'),
    (float, 'a number'),
    (list, 'a list'),
    (dict, 'an object'),
  )
  if value is None:
    return 'null'
  return next(
    (name for kind, name in names if isinstance(value, kind)),
    type(value).__name__,
  )
