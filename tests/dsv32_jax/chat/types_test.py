import pytest

from dsv32_jax.chat import markup
from dsv32_jax.chat.errors import ChatError
from dsv32_jax.chat.types import Message, ToolCall, ToolSpec
from dsv32_jax.data import tokenizer


def nested(levels):
  value = 1
  for _ in range(levels):
    value = [value]
  return value


def test_markup_names_special_strings_of_the_tokenizers():
  known = (*markup.CONTROL_STRINGS, markup.DSML)
  assert set(known) <= set(tokenizer.SPECIAL_STRINGS)


# What is made, and the field that the error names.
REFUSED = {
  'reasoning of a user': (
    lambda: Message(role='user', reasoning='hm'),
    'reasoning',
  ),
  'calls of a tool': (
    lambda: Message(role='tool', tool_calls=(ToolCall(name='f'),)),
    'tool_calls',
  ),
  'call id of an assistant': (
    lambda: Message(role='assistant', tool_call_id='1'),
    'tool_call_id',
  ),
  'tools of a user': (
    lambda: Message(role='user', tools=(ToolSpec(name='f'),)),
    'tools',
  ),
  'format of an assistant': (
    lambda: Message(role='assistant', response_format={'type': 'object'}),
    'response_format',
  ),
  'half a surrogate pair': (
    lambda: Message(role='user', content='a\ud800'),
    'content',
  ),
  'empty function name': (lambda: ToolCall(name=''), 'name'),
  'quote in a function name': (lambda: ToolSpec(name='a"b'), 'name'),
  'line end in a function name': (lambda: ToolCall(name='a\nb'), 'name'),
  'tag in a function name': (lambda: ToolCall(name='</｜DSML｜a'), 'name'),
  'quote in an argument name': (
    lambda: ToolCall(name='f', arguments={'a"': 1}),
    "arguments['a\"']",
  ),
  'infinite argument': (
    lambda: ToolCall(name='f', arguments={'a': [1.0, float('inf')]}),
    "arguments['a'][1]",
  ),
  'surrogate deep in an argument': (
    lambda: ToolCall(name='f', arguments={'a': {'b': '\udfff'}}),
    "arguments['a']['b']",
  ),
  'argument that is no JSON': (
    lambda: ToolCall(name='f', arguments={'a': {1, 2}}),
    "arguments['a']",
  ),
  'key that is no text': (
    lambda: ToolCall(name='f', arguments={'a': {1: 2}}),
    "arguments['a']: key",
  ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_value_that_does_not_fit_is_refused_with_its_field(case):
  make, field = REFUSED[case]
  with pytest.raises(ChatError) as caught:
    make()
  assert caught.value.field == field
  assert str(caught.value).startswith(f'{field}: ')
  assert '\n' not in str(caught.value)


def test_error_can_be_sent_whatever_stands_in_it():
  # A field's name is the sender's too.
  error = ChatError('a\ud800\nb', 'got\u2028' + 'x' * 10_000)
  assert error.field == 'a\\ud800\\nb'
  assert len(str(error).encode()) < 400
  assert str(error).isprintable()


def test_argument_beyond_the_deepest_level_is_refused():
  ToolCall(name='f', arguments={'a': nested(99)})
  with pytest.raises(ChatError, match='100 levels'):
    ToolCall(name='f', arguments={'a': nested(100)})


def test_argument_name_may_be_empty():
  assert ToolCall(name='f', arguments={'': 1}).arguments == {'': 1}


def test_messages_compare_by_value():
  call = ToolCall(name='f', arguments={'a': [1]})
  other = ToolCall(name='f', arguments={'a': [1]})
  message = Message(role='assistant', tool_calls=(call,))
  assert message == Message(role='assistant', tool_calls=(other,))
  assert message != Message(role='assistant')
