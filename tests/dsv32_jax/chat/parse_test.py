import pytest

from dsv32_jax.chat.errors import ChatError, ParseError
from dsv32_jax.chat.errors import ParseErrorCode as Code
from dsv32_jax.chat.parse import parse
from dsv32_jax.chat.stream import CompletionParser
from dsv32_jax.chat.types import Message, ToolCall, ToolSpec

_EOS = '<｜end▁of▁sentence｜>'
_CALLS, _CALLS_END = (
  '\n\n<｜DSML｜function_calls>\n',
  '</｜DSML｜function_calls>',
)
_TOOLS = (
  ToolSpec(
    name='f',
    parameters={
      'type': 'object',
      'properties': {'k': {'type': 'string'}, 'n': {'type': 'integer'}},
      'required': ['k'],
    },
  ),
  ToolSpec(name='g'),
)


def invoke(body, name=' name="f"'):
  return f'<｜DSML｜invoke{name}>\n{body}</｜DSML｜invoke>\n'


def parameter(value, head=' name="k" string="true"'):
  return f'<｜DSML｜parameter{head}>{value}</｜DSML｜parameter>\n'


def block(*invokes):
  return _CALLS + ''.join(invokes) + _CALLS_END


def reply(content='', reasoning='', *calls):
  return Message(
    role='assistant', content=content, reasoning=reasoning, tool_calls=calls
  )


_CALL = block(invoke(parameter('v')))
_F = ToolCall(name='f', arguments={'k': 'v'})

# What is accepted: mode, text, message.
ACCEPTED = {
  'answer': ('chat', f'A{_EOS}', reply('A')),
  'nothing': ('chat', _EOS, reply()),
  'thought and answer': ('thinking', f'R</think>A{_EOS}', reply('A', 'R')),
  'no thought': ('thinking', f'</think>A{_EOS}', reply('A')),
  'call': ('chat', f'A{_CALL}{_EOS}', reply('A', '', _F)),
  'no end after calls': ('chat', f'A{_CALL}', reply('A', '', _F)),
  'empty block of calls': ('chat', f'A{block()}{_EOS}', reply('A')),
  'call without arguments': (
    'chat',
    block(invoke('\n')) + _EOS,
    reply('', '', ToolCall(name='f')),
  ),
  'call without arguments or their line': (
    'chat',
    block(invoke('')) + _EOS,
    reply('', '', ToolCall(name='f')),
  ),
  'signs in a raw value': (
    'chat',
    block(invoke(parameter('<a> </｜DSML｜invoke> <think>'))) + _EOS,
    reply(
      '',
      '',
      ToolCall(name='f', arguments={'k': '<a> </｜DSML｜invoke> <think>'}),
    ),
  ),
  'values of every type': (
    'chat',
    block(
      invoke(
        ''.join(
          parameter(text, f' name="{text}" string="false"')
          for text in ('1', '-0.5', 'true', 'null', '[]', '{}', ' 2 ')
        )
      )
    ),
    reply(
      '',
      '',
      ToolCall(
        name='f',
        arguments={
          '1': 1,
          '-0.5': -0.5,
          'true': True,
          'null': None,
          '[]': [],
          '{}': {},
          ' 2 ': 2,
        },
      ),
    ),
  ),
  'line ends before calls': (
    'chat',
    f'A\n{_CALL}{_EOS}',
    reply('A\n', '', _F),
  ),
}


@pytest.mark.parametrize('case', ACCEPTED)
def test_sound_completion_is_read(case):
  mode, text, message = ACCEPTED[case]
  assert parse(text, mode=mode) == message


_TO_INVOKE = _CALLS + '<｜DSML｜invoke'
_TO_NAME = _TO_INVOKE + ' name="f">\n'
_TO_PARAMETER = _TO_NAME + '<｜DSML｜parameter'
_JSON = ' name="k" string="false"'

# What is not: mode, text, code, and the text before the mistake.
REFUSED = {
  'no end of thought': ('thinking', 'R', Code.REASONING_NOT_CLOSED, 'R'),
  'nothing at all': ('thinking', '', Code.REASONING_NOT_CLOSED, ''),
  'end before the end of thought': (
    'thinking',
    f'R{_EOS}',
    Code.REASONING_NOT_CLOSED,
    'R',
  ),
  'calls in the reasoning': (
    'thinking',
    f'R{_CALL}</think>A{_EOS}',
    Code.CALLS_IN_REASONING,
    'R',
  ),
  'content without end': ('chat', 'A', Code.MISSING_EOS, 'A'),
  'half an end': ('chat', 'A<｜end', Code.MISSING_EOS, 'A<｜end'),
  'text after calls': (
    'chat',
    f'{_CALL}x{_EOS}',
    Code.TEXT_AFTER_CALLS,
    _CALL,
  ),
  'half an end after calls': (
    'chat',
    f'{_CALL}<｜end',
    Code.TEXT_AFTER_CALLS,
    _CALL,
  ),
  'second block of calls': (
    'chat',
    f'{_CALL}{_CALL}{_EOS}',
    Code.TEXT_AFTER_CALLS,
    _CALL,
  ),
  'text after the end': ('chat', f'A{_EOS}x', Code.TEXT_AFTER_EOS, f'A{_EOS}'),
  'second end': ('chat', f'A{_EOS}{_EOS}', Code.TEXT_AFTER_EOS, f'A{_EOS}'),
  'text after the end of calls': (
    'chat',
    f'{_CALL}{_EOS}\n',
    Code.TEXT_AFTER_EOS,
    f'{_CALL}{_EOS}',
  ),
  'no line end after the first tag': (
    'chat',
    _CALLS[:-1] + invoke('') + _CALLS_END,
    Code.TEXT_BETWEEN_TAGS,
    _CALLS[:-2],
  ),
  'text before an invoke': (
    'chat',
    f'{_CALLS} {invoke("")}{_CALLS_END}',
    Code.TEXT_BETWEEN_TAGS,
    _CALLS,
  ),
  'no line end after a parameter': (
    'chat',
    block(invoke(parameter('v')[:-1])),
    Code.TEXT_BETWEEN_TAGS,
    _TO_NAME + parameter('v')[:-2],
  ),
  'text between parameters': (
    'chat',
    block(invoke(parameter('v') + 'x' + parameter('w', _JSON))),
    Code.TEXT_BETWEEN_TAGS,
    _TO_NAME + parameter('v'),
  ),
  'no line end after an invoke': (
    'chat',
    block(invoke('')[:-1]),
    Code.TEXT_BETWEEN_TAGS,
    _CALLS + invoke('')[:-1],
  ),
  'text in place of parameters': (
    'chat',
    block(invoke('v\n')),
    Code.TEXT_BETWEEN_TAGS,
    _TO_NAME,
  ),
  'value that contains its closing tag': (
    'chat',
    block(invoke(parameter('a</｜DSML｜parameter>b'))),
    Code.TEXT_BETWEEN_TAGS,
    _TO_NAME + parameter('a')[:-2],
  ),
  'closing tag without its sign': (
    'chat',
    block(invoke(parameter('v').replace('</', '/'))),
    Code.TEXT_BETWEEN_TAGS,
    _TO_PARAMETER + ' name="k" string="true">v',
  ),
  'no string attribute': (
    'chat',
    block(invoke(parameter('v', ' name="k"'))),
    Code.BAD_STRING_ATTRIBUTE,
    _TO_PARAMETER + ' name="k',
  ),
  'bad string attribute': (
    'chat',
    block(invoke(parameter('v', ' name="k" string="yes"'))),
    Code.BAD_STRING_ATTRIBUTE,
    _TO_PARAMETER + ' name="k',
  ),
  'duplicate parameter': (
    'chat',
    block(invoke(parameter('v') + parameter('1', _JSON))),
    Code.DUPLICATE_PARAMETER,
    _TO_NAME + parameter('v') + '<｜DSML｜parameter',
  ),
  'function without name': (
    'chat',
    block(invoke('', '')),
    Code.BAD_NAME,
    _TO_INVOKE,
  ),
  'function with an empty name': (
    'chat',
    block(invoke('', ' name=""')),
    Code.BAD_NAME,
    _TO_INVOKE,
  ),
  'line end in a name': (
    'chat',
    block(invoke('', ' name="f\n"')),
    Code.BAD_NAME,
    _TO_INVOKE + ' name="',
  ),
  'tag in a name': (
    'chat',
    block(invoke('', ' name="f</｜DSML｜invoke>"')),
    Code.BAD_NAME,
    _TO_INVOKE + ' name="',
  ),
  'parameter without name': (
    'chat',
    block(invoke(parameter('v', ' string="true"'))),
    Code.BAD_NAME,
    _TO_PARAMETER,
  ),
  'value that is no JSON': (
    'chat',
    block(invoke(parameter('v', _JSON))),
    Code.BAD_JSON,
    f'{_TO_PARAMETER}{_JSON}>',
  ),
  'value of NaN': (
    'chat',
    block(invoke(parameter('[NaN]', _JSON))),
    Code.BAD_JSON,
    f'{_TO_PARAMETER}{_JSON}>',
  ),
  'number beyond all floats': (
    'chat',
    block(invoke(parameter('1e999', _JSON))),
    Code.BAD_JSON,
    f'{_TO_PARAMETER}{_JSON}>',
  ),
  'number of too many digits': (
    'chat',
    block(invoke(parameter('1' * 5000, _JSON))),
    Code.BAD_JSON,
    f'{_TO_PARAMETER}{_JSON}>',
  ),
  'value of too many levels': (
    'chat',
    block(invoke(parameter('[' * 100_000, _JSON))),
    Code.BAD_JSON,
    f'{_TO_PARAMETER}{_JSON}>',
  ),
  'value a level too deep for a call': (
    'chat',
    block(invoke(parameter('[' * 101 + ']' * 101, _JSON))),
    Code.BAD_JSON,
    f'{_TO_PARAMETER}{_JSON}>',
  ),
  'half a surrogate pair': (
    'chat',
    block(invoke(parameter('"\\ud800"', _JSON))),
    Code.BAD_JSON,
    f'{_TO_PARAMETER}{_JSON}>',
  ),
  **{
    f'{mark} in content': (
      'chat',
      f'A {mark}{_EOS}',
      Code.CONTROL_IN_TEXT,
      'A ',
    )
    for mark in ('<think>', '</think>', '<｜begin▁of▁sentence｜>', '｜DSML｜')
  },
  **{
    f'{mark} in reasoning': (
      'thinking',
      f'R {mark}</think>A{_EOS}',
      Code.CONTROL_IN_TEXT,
      'R ',
    )
    for mark in ('<think>', '<｜begin▁of▁sentence｜>', '｜DSML｜')
  },
  'second end of thought': (
    'thinking',
    f'R</think>A</think>B{_EOS}',
    Code.CONTROL_IN_TEXT,
    'R</think>A',
  ),
  'calls after a single line end': (
    'chat',
    f'A{_CALL[1:]}{_EOS}',
    Code.CONTROL_IN_TEXT,
    'A\n<',
  ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_mistake_is_refused_with_its_code_and_place(case):
  mode, text, code, before = REFUSED[case]
  with pytest.raises(ParseError) as caught:
    parse(text, mode=mode)
  assert caught.value.code is code
  assert text[: caught.value.position] == before
  assert str(caught.value).startswith(f'{code.value} at character ')
  assert '\n' not in str(caught.value)


def test_calls_cut_anywhere_are_truncated_or_sound():
  text = block(
    invoke(parameter('v') + parameter('[1]', ' name="j" string="false"')),
    invoke('\n'),
  )
  # Up to here the text may still be content that has no end.
  content = len(_CALLS) - 2
  for end in range(content, len(text)):
    with pytest.raises(ParseError) as caught:
      parse(text[:end])
    assert caught.value.code is Code.TRUNCATED_CALLS, end
    assert caught.value.position == end
  assert len(parse(text).tool_calls) == 2


@pytest.mark.parametrize(
  ('text', 'code', 'reason'),
  [
    (
      block(invoke(parameter('v'), ' name="h"')),
      Code.UNKNOWN_TOOL,
      "got 'h', expected one of: f, g",
    ),
    (
      block(invoke(parameter('x', ' name="n" string="true"'))),
      Code.BAD_ARGUMENTS,
      "f: 'k' is a required property",
    ),
    (
      block(invoke(parameter('v') + parameter('3', ' name="n" string="true"'))),
      Code.BAD_ARGUMENTS,
      "f: n: '3' is not of type 'integer'",
    ),
    (
      block(invoke(parameter('7', _JSON))),
      Code.BAD_ARGUMENTS,
      "f: k: 7 is not of type 'string'",
    ),
  ],
)
def test_call_that_does_not_fit_its_tool_is_refused(text, code, reason):
  parse(text)  # Sound, as far as the grammar goes.
  with pytest.raises(ParseError) as caught:
    parse(text, tools=_TOOLS)
  assert caught.value.code is code
  assert caught.value.reason == reason


def test_calls_that_fit_their_tools_are_read():
  text = block(
    invoke(parameter('v') + parameter('3', ' name="n" string="false"')),
    invoke(parameter('1', _JSON), ' name="g"'),
  )
  assert [call.name for call in parse(text, tools=_TOOLS).tool_calls] == [
    'f',
    'g',
  ]


def test_call_without_any_tools_is_refused():
  with pytest.raises(ParseError, match=r'unknown_tool.*one of: none'):
    parse(_CALL, tools=())


_FORMAT = {
  'type': 'json_schema',
  'json_schema': {'name': 'n', 'schema': {'type': 'object', 'required': ['a']}},
}


@pytest.mark.parametrize(
  ('content', 'reason'),
  [
    ('{"b": 1}', "'a' is a required property"),
    ('[]', "[] is not of type 'object'"),
    ('```json\n{"a": 1}\n```', 'is not JSON'),
    ('{"a": Infinity}', 'is not JSON: got Infinity'),
    ('[' * 100_000, 'is not JSON'),
  ],
)
def test_reply_that_does_not_fit_the_format_is_refused(content, reason):
  with pytest.raises(ParseError) as caught:
    parse(f'R</think>{content}{_EOS}', mode='thinking', response_format=_FORMAT)
  assert caught.value.code is Code.BAD_RESPONSE
  assert caught.value.position == len('R</think>')
  assert reason in caught.value.reason


def test_reply_that_fits_the_format_is_read():
  assert parse(f' {{"a": 1}}\n{_EOS}', response_format=_FORMAT).content
  # Calls are no answer yet.
  assert parse(_CALL, response_format=_FORMAT).tool_calls


def test_bad_schema_of_a_tool_is_an_error_before_reading():
  tools = (ToolSpec(name='f', parameters={'type': 'objct'}),)
  with pytest.raises(ChatError, match='is not a JSON schema'):
    parse(_EOS, tools=tools)


# What is read all the same: mode, text, message, codes.
RECOVERED = {
  'no end': ('chat', 'A', reply('A'), [Code.MISSING_EOS]),
  'thought without end': (
    'thinking',
    'R<｜end',
    reply('', 'R<｜end'),
    [Code.REASONING_NOT_CLOSED],
  ),
  'end within the thought': (
    'thinking',
    f'R{_EOS}',
    reply('', 'R'),
    [Code.REASONING_NOT_CLOSED],
  ),
  'control strings': (
    'thinking',
    f'<think>R</think>A</think>B{_EOS}',
    reply('A</think>B', '<think>R'),
    [Code.CONTROL_IN_TEXT] * 2,
  ),
  'calls in the reasoning': (
    'thinking',
    f'R{block()}</think>A{_EOS}',
    reply('A', f'R{block()}'),
    [Code.CALLS_IN_REASONING, Code.CONTROL_IN_TEXT],
  ),
  'second call is cut': (
    'chat',
    f'A{_CALLS}{invoke(parameter("v"))}<｜DSML｜invoke name="f">\n',
    reply('A', '', _F),
    [Code.TRUNCATED_CALLS],
  ),
  'mistake in the second call': (
    'chat',
    f'A{block(invoke(parameter("v")), "x", invoke(parameter("w")))}{_EOS}',
    reply('A', '', _F),
    [Code.TEXT_BETWEEN_TAGS],
  ),
  'text after calls': (
    'chat',
    f'{_CALL}x{_EOS}',
    reply('', '', _F),
    [Code.TEXT_AFTER_CALLS],
  ),
  'value that is no JSON': (
    'chat',
    block(invoke(parameter('v', _JSON))),
    reply('', '', _F),
    [Code.BAD_JSON],
  ),
  'unknown tool': (
    'chat',
    block(invoke('\n', ' name="h"')),
    reply('', '', ToolCall(name='h')),
    [Code.UNKNOWN_TOOL],
  ),
  'arguments that do not fit': (
    'chat',
    block(invoke('\n')),
    reply('', '', ToolCall(name='f')),
    [Code.BAD_ARGUMENTS],
  ),
}


@pytest.mark.parametrize('case', RECOVERED)
def test_recovering_keeps_what_can_be_read(case):
  mode, text, message, codes = RECOVERED[case]
  assert parse(text, mode=mode, tools=_TOOLS, recover=True) == message
  parser = CompletionParser(mode, tools=_TOOLS, recover=True)
  parser.feed(text)
  parser.finish()
  assert [failure.code for failure in parser.failures] == codes
  with pytest.raises(ParseError):
    parse(text, mode=mode, tools=_TOOLS)
