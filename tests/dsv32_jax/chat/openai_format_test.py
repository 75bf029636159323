import pytest

from dsv32_jax.chat.errors import ChatError
from dsv32_jax.chat.openai_format import (
  message_to_openai,
  messages_from_openai,
  tool_to_openai,
  tools_from_openai,
)
from dsv32_jax.chat.types import Message, ToolCall, ToolSpec

_TOOL = {
  'type': 'function',
  'function': {
    'name': 'stock_level',
    'description': 'How many are left.',
    'parameters': {
      'type': 'object',
      'properties': {'sku': {'type': 'string'}},
    },
    'strict': True,
  },
}
_CONVERSATION = [
  {'role': 'system', 'content': 'S.', 'tools': [_TOOL]},
  {'role': 'user', 'content': 'U1'},
  {
    'role': 'assistant',
    'content': None,
    'reasoning_content': 'R1',
    'tool_calls': [
      {
        'id': 'call_1',
        'type': 'function',
        'function': {
          'name': 'stock_level',
          'arguments': '{"sku": "A-7", "größe": [1, null]}',
        },
      }
    ],
  },
  {'role': 'tool', 'content': '12', 'tool_call_id': 'call_1'},
  {'role': 'assistant', 'content': 'A1'},
  {
    'role': 'developer',
    'content': 'D',
    'response_format': {'type': 'json_object'},
  },
]
_SPEC = ToolSpec(
  name='stock_level',
  description='How many are left.',
  parameters={'type': 'object', 'properties': {'sku': {'type': 'string'}}},
  strict=True,
)


def test_conversation_is_read_into_messages():
  call = ToolCall(
    name='stock_level',
    arguments={'sku': 'A-7', 'größe': [1, None]},
    id='call_1',
  )
  assert messages_from_openai(_CONVERSATION) == (
    Message(role='system', content='S.', tools=(_SPEC,)),
    Message(role='user', content='U1'),
    Message(role='assistant', reasoning='R1', tool_calls=(call,)),
    Message(role='tool', content='12', tool_call_id='call_1'),
    Message(role='assistant', content='A1'),
    Message(
      role='developer',
      content='D',
      response_format={'type': 'json_object'},
    ),
  )


def test_messages_are_written_as_they_were_read():
  messages = messages_from_openai(_CONVERSATION)
  assert [message_to_openai(m) for m in messages] == _CONVERSATION


def test_tools_are_read_and_written():
  assert tools_from_openai([_TOOL]) == (_SPEC,)
  assert tool_to_openai(_SPEC) == _TOOL
  assert tools_from_openai(None) == ()


def test_text_parts_are_joined():
  parts = [{'type': 'text', 'text': 'a '}, {'type': 'text', 'text': 'b'}]
  (message,) = messages_from_openai([{'role': 'user', 'content': parts}])
  assert message.content == 'a b'


def test_fields_that_clients_send_back_are_taken():
  # What the openai client's `model_dump` gives for a reply.
  reply = {
    'role': 'assistant',
    'content': 'A',
    'refusal': None,
    'annotations': None,
    'audio': None,
    'function_call': None,
    'tool_calls': None,
    'reasoning': 'R',
  }
  (message,) = messages_from_openai([reply])
  assert message == Message(role='assistant', content='A', reasoning='R')


def user(**fields):
  return [{'role': 'user', 'content': 'U', **fields}]


def calls(*calls):
  return [{'role': 'assistant', 'tool_calls': list(calls)}]


def function(**fields):
  return {'type': 'function', 'function': {'name': 'f', **fields}}


REFUSED_MESSAGES = {
  'no list': ({'role': 'user'}, 'messages'),
  'none': ([], 'messages'),
  'no object': (['hello'], 'messages[0]'),
  'no role': ([{'content': 'U'}], 'messages[0].role'),
  'unknown role': ([{'role': 'robot'}], 'messages[0].role'),
  'role that is no text': ([{'role': ['user']}], 'messages[0].role'),
  'number as content': (user(content=3), 'messages[0].content'),
  'picture': (
    user(content=[{'type': 'image_url', 'image_url': {}}]),
    'messages[0].content[0].type',
  ),
  'part without text': (
    user(content=[{'type': 'text'}]),
    'messages[0].content[0].text',
  ),
  'part that is no object': (user(content=['a']), 'messages[0].content[0]'),
  'surrogate': (user(content='\ud800'), 'messages[0].content'),
  'misspelt field': (user(contents='U'), 'messages[0].contents'),
  'calls of a user': (
    user(tool_calls=[function()]),
    'messages[0].tool_calls',
  ),
  'calls as an object': (
    [{'role': 'assistant', 'tool_calls': {}}],
    'messages[0].tool_calls',
  ),
  'call of another type': (
    calls({'type': 'custom'}),
    'messages[0].tool_calls[0].type',
  ),
  'call without function': (
    calls({'type': 'function'}),
    'messages[0].tool_calls[0].function',
  ),
  'call without name': (
    calls({'type': 'function', 'function': {}}),
    'messages[0].tool_calls[0].name',
  ),
  'name that is no text': (
    calls(function(name=['f'])),
    'messages[0].tool_calls[0].function.name',
  ),
  'broken arguments': (
    calls(function(), function(arguments='{"a": ')),
    'messages[0].tool_calls[1].function.arguments',
  ),
  'arguments too deep for the parser': (
    calls(function(arguments='[' * 200_000)),
    'messages[0].tool_calls[0].function.arguments',
  ),
  'arguments that are no object': (
    calls(function(arguments='[1]')),
    'messages[0].tool_calls[0].function.arguments',
  ),
  'arguments of NaN': (
    calls(function(arguments='{"a": NaN}')),
    "messages[0].tool_calls[0].arguments['a']",
  ),
  'tool call id of a number': (
    [{'role': 'tool', 'content': '1', 'tool_call_id': 7}],
    'messages[0].tool_call_id',
  ),
  'old function call': (
    [{'role': 'assistant', 'function_call': {'name': 'f'}}],
    'messages[0].function_call',
  ),
  'bad schema of a message': (
    [{'role': 'system', 'tools': [function(parameters={'type': 'objct'})]}],
    'messages[0].tools[0].parameters.type',
  ),
  'bad format of a message': (
    [{'role': 'system', 'response_format': {'type': 'json_schema'}}],
    'messages[0].response_format.json_schema.schema',
  ),
}


@pytest.mark.parametrize('case', REFUSED_MESSAGES)
def test_bad_message_is_refused_with_its_field(case):
  messages, field = REFUSED_MESSAGES[case]
  with pytest.raises(ChatError) as caught:
    messages_from_openai(messages)
  assert caught.value.field == field
  assert '\n' not in str(caught.value)


REFUSED_TOOLS = {
  'no list': ({}, 'tools'),
  'no object': (['f'], 'tools[0]'),
  'another type': ([{'type': 'web_search'}], 'tools[0].type'),
  'no name': ([{'type': 'function', 'function': {}}], 'tools[0].name'),
  'quote in the name': ([function(name='"')], 'tools[0].name'),
  'description of a list': (
    [function(description=[])],
    'tools[0].function.description',
  ),
  'parameters of a list': (
    [function(parameters=[])],
    'tools[0].function.parameters',
  ),
  'strict of a text': ([function(strict='no')], 'tools[0].function.strict'),
  'no schema': (
    [function(parameters={'properties': {'a': {'type': 'text'}}})],
    'tools[0].parameters.properties.a.type',
  ),
  'two of a name': ([function(), function()], 'tools[1].name'),
}


@pytest.mark.parametrize('case', REFUSED_TOOLS)
def test_bad_tool_is_refused_with_its_field(case):
  tools, field = REFUSED_TOOLS[case]
  with pytest.raises(ChatError) as caught:
    tools_from_openai(tools)
  assert caught.value.field == field
  assert '\n' not in str(caught.value)
