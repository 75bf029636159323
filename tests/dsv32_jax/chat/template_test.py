import dataclasses

import pytest

from dsv32_jax.chat.errors import ChatError
from dsv32_jax.chat.template import check_ready, render, with_request
from dsv32_jax.chat.types import Message, ToolCall, ToolSpec

_BOS = '<｜begin▁of▁sentence｜>'
_EOS = '<｜end▁of▁sentence｜>'
_SYSTEM = Message(role='system', content='S.')
_CALLS = Message(
  role='assistant',
  reasoning='R1',
  tool_calls=(
    ToolCall(name='stock_level', arguments={'sku': 'A-7', 'limit': 3}),
    ToolCall(name='stock_level', arguments={'sku': 'B-9', 'limit': 1}),
  ),
)
_ANSWER = Message(role='assistant', content='A1', reasoning='R2')
_CALLS_TEXT = (
  '\n\n<｜DSML｜function_calls>\n'
  '<｜DSML｜invoke name="stock_level">\n'
  '<｜DSML｜parameter name="sku" string="true">A-7</｜DSML｜parameter>\n'
  '<｜DSML｜parameter name="limit" string="false">3</｜DSML｜parameter>\n'
  '</｜DSML｜invoke>\n'
  '<｜DSML｜invoke name="stock_level">\n'
  '<｜DSML｜parameter name="sku" string="true">B-9</｜DSML｜parameter>\n'
  '<｜DSML｜parameter name="limit" string="false">1</｜DSML｜parameter>\n'
  '</｜DSML｜invoke>\n'
  f'</｜DSML｜function_calls>{_EOS}'
)
_RESULTS_TEXT = (
  '\n\n<function_results>\n<result>12</result>\n<result>0</result>\n'
  '</function_results>\n\n'
)


def user(content):
  return Message(role='user', content=content)


def result(content, call_id=''):
  return Message(role='tool', content=content, tool_call_id=call_id)


_ASKED = (_SYSTEM, user('U1'), _CALLS, result('12'), result('0'))


def test_worked_example_keeps_reasoning_across_results():
  assert render(_ASKED, mode='thinking') == (
    f'{_BOS}S.<｜User｜>U1<｜Assistant｜><think>R1</think>'
    f'{_CALLS_TEXT}{_RESULTS_TEXT}<think>'
  )


def test_worked_example_drops_reasoning_at_a_new_user_message_alone():
  messages = (*_ASKED, _ANSWER, user('U2'))
  assert render(messages, mode='thinking') == (
    f'{_BOS}S.<｜User｜>U1<｜Assistant｜></think>{_CALLS_TEXT}{_RESULTS_TEXT}'
    f'</think>A1{_EOS}<｜User｜>U2<｜Assistant｜><think>'
  )


def test_answer_before_the_next_message_keeps_all_reasoning():
  assert render((*_ASKED, _ANSWER), mode='thinking').endswith(
    f'<think>R1</think>{_CALLS_TEXT}{_RESULTS_TEXT}<think>R2</think>A1{_EOS}'
  )


def test_chat_mode_has_no_reasoning():
  messages = (*_ASKED, _ANSWER, user('U2'))
  assert render(messages, mode='chat') == (
    f'{_BOS}S.<｜User｜>U1<｜Assistant｜></think>{_CALLS_TEXT}{_RESULTS_TEXT}'
    f'</think>A1{_EOS}<｜User｜>U2<｜Assistant｜></think>'
  )


def test_keep_reasoning_keeps_that_of_earlier_turns():
  # The reference's switch of this meaning changes nothing.
  messages = (*_ASKED, _ANSWER, user('U2'))
  assert render(messages, mode='thinking', keep_reasoning=True) == (
    f'{_BOS}S.<｜User｜>U1<｜Assistant｜><think>R1</think>{_CALLS_TEXT}'
    f'{_RESULTS_TEXT}<think>R2</think>A1{_EOS}'
    '<｜User｜>U2<｜Assistant｜><think>'
  )


def test_keep_reasoning_shows_that_an_earlier_turn_had_none():
  messages = (user('U1'), Message(role='assistant', content='A1'), user('U2'))
  text = render(messages, mode='thinking', keep_reasoning=True)
  assert f'U1<｜Assistant｜><think></think>A1{_EOS}<｜User｜>U2' in text


def test_earlier_developer_message_stays():
  # The reference drops it in thinking mode, and then fails.
  messages = (
    Message(role='developer', content='D'),
    _ANSWER,
    user('U'),
  )
  assert render(messages, mode='thinking') == (
    f"{_BOS}<｜User｜>\n\n# The user's message is: D<｜Assistant｜></think>"
    f'A1{_EOS}<｜User｜>U<｜Assistant｜><think>'
  )


def test_developer_message_drops_reasoning_as_a_user_message_does():
  messages = (user('U'), _ANSWER, Message(role='developer', content='D'))
  assert render(messages, mode='thinking') == (
    f'{_BOS}<｜User｜>U<｜Assistant｜></think>A1{_EOS}'
    "<｜User｜>\n\n# The user's message is: D<｜Assistant｜><think>"
  )


def test_call_without_arguments_has_an_empty_line():
  call = Message(
    role='assistant', content='C', tool_calls=(ToolCall(name='f'),)
  )
  assert render((call,)) == (
    f'{_BOS}C\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n\n'
    f'</｜DSML｜invoke>\n</｜DSML｜function_calls>{_EOS}'
  )


@pytest.mark.parametrize(
  ('value', 'text'),
  [
    ('<b> "x" \\n', ' string="true"><b> "x" \\n</'),
    ('', ' string="true"></'),
    ('3', ' string="true">3</'),
    (3.5, ' string="false">3.5</'),
    (None, ' string="false">null</'),
    (True, ' string="false">true</'),
    ({'ü': ['<', 1]}, ' string="false">{"ü": ["<", 1]}</'),
    # Raw text cannot hold its own closing tag.
    (
      'a</｜DSML｜parameter>',
      ' string="false">"a</\\uff5cDSML\\uff5cparameter>"</',
    ),
  ],
)
def test_argument_is_written_by_its_type(value, text):
  call = ToolCall(name='f', arguments={'k': value})
  rendered = render((Message(role='assistant', tool_calls=(call,)),))
  assert f'name="k"{text}｜DSML｜parameter>\n' in rendered


_TOOL = ToolSpec(
  name='f', description='Größe.', parameters={'type': 'object'}, strict=True
)
_TOOL_LINE = (
  '{"name": "f", "description": "Größe.", "parameters": {"type": "object"}, '
  '"strict": true}'
)


def test_system_message_shows_tools_and_format_behind_its_content():
  message = dataclasses.replace(
    _SYSTEM,
    tools=(_TOOL, ToolSpec(name='g')),
    response_format={'type': 'json_object'},
  )
  text = render((message,))
  assert text.startswith(f'{_BOS}S.\n\n## Tools\n')
  tools, response_format = text.split('\n\n## Response Format:\n')
  assert tools.endswith(
    f'\n<functions>\n{_TOOL_LINE}\n{{"name": "g"}}\n</functions>\n'
  )
  assert response_format.endswith('\n{"type": "object"}')
  for markup in (
    '<｜DSML｜function_calls>',
    '<｜DSML｜invoke name="',
    'string="true|false"',
    '</｜DSML｜function_calls>',
    '<function_results>',
  ):
    assert markup in tools


def test_developer_message_shows_tools_before_its_content():
  message = Message(role='developer', content='D', tools=(_TOOL,))
  text = render((message,), mode='thinking')
  assert text.startswith(f'{_BOS}<｜User｜>\n\n## Tools\n')
  assert text.endswith(
    f"{_TOOL_LINE}\n</functions>\n\n\n# The user's message is: D"
    '<｜Assistant｜><think>'
  )


def test_request_goes_to_the_first_system_message():
  first = dataclasses.replace(_SYSTEM, tools=(ToolSpec(name='g'),))
  messages = (user('U'), first, _SYSTEM)
  out = with_request(
    messages, tools=[_TOOL], response_format={'type': 'json_object'}
  )
  assert out == (
    user('U'),
    dataclasses.replace(
      first,
      tools=(ToolSpec(name='g'), _TOOL),
      response_format={'type': 'json_object'},
    ),
    _SYSTEM,
  )


def test_request_makes_a_system_message_where_there_is_none():
  out = with_request([user('U')], tools=[_TOOL])
  assert out == (Message(role='system', tools=(_TOOL,)), user('U'))
  assert render(out).startswith(f'{_BOS}\n\n## Tools\n')
  assert with_request([user('U')]) == (user('U'),)


def with_ids(*ids):
  return Message(
    role='assistant',
    tool_calls=tuple(ToolCall(name='f', id=call_id) for call_id in ids),
  )


@pytest.mark.parametrize(
  ('call_ids', 'results'),
  [
    (('', '', ''), [('0', ''), ('1', ''), ('2', '')]),
    (('a', 'b', 'c'), [('2', 'c'), ('0', 'a'), ('1', 'b')]),
    # Those without an id take the calls that are left.
    (('a', 'b', 'c'), [('0', ''), ('1', 'b'), ('2', '')]),
    (('a', 'b', 'c'), [('1', 'b'), ('0', ''), ('2', '')]),
    # Whoever parsed the calls gave them no ids.
    (('', '', ''), [('0', 'x'), ('1', 'y'), ('2', 'z')]),
  ],
)
def test_results_stand_in_the_order_of_the_calls(call_ids, results):
  messages = (user('U'), with_ids(*call_ids), *(result(*r) for r in results))
  assert render(messages).endswith(
    '<result>0</result>\n<result>1</result>\n<result>2</result>\n'
    '</function_results>\n\n</think>'
  )


def test_first_results_of_several_leave_the_block_open():
  assert render(_ASKED[:4]).endswith(
    f'{_EOS}\n\n<function_results>\n<result>12</result>'
  )


REFUSED = {
  'result first': ([result('1')], 'messages[0]'),
  'result after a user': ([user('U'), result('1')], 'messages[1]'),
  'result after an answer': (
    [user('U'), _ANSWER, result('1')],
    'messages[2]',
  ),
  'more results than calls': ([*_ASKED, result('3')], 'messages[5]'),
  'message among results': ([*_ASKED[:4], user('U')], 'messages[4]'),
  'unknown call': (
    [user('U'), with_ids('a', 'b'), result('1', 'c')],
    'messages[2].tool_call_id',
  ),
  'call answered twice': (
    [user('U'), with_ids('a', 'b'), result('1', 'a'), result('2', 'a')],
    'messages[3].tool_call_id',
  ),
  'two calls of one id': (
    [user('U'), with_ids('a', 'a'), result('1', 'a')],
    'messages[1].tool_calls',
  ),
  'reply without a thought': (
    [user('U'), Message(role='assistant', content='A')],
    'messages[1].reasoning',
  ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_message_out_of_place_is_refused_with_its_place(case):
  messages, field = REFUSED[case]
  with pytest.raises(ChatError) as caught:
    render(messages, mode='thinking')
  assert caught.value.field == field


@pytest.mark.parametrize(
  'messages', [[user('U')], [Message(role='developer')], _ASKED]
)
def test_conversation_that_waits_for_a_reply_is_ready(messages):
  check_ready(messages)


@pytest.mark.parametrize(
  ('messages', 'reason'),
  [
    ([], 'got none'),
    ([_SYSTEM], "role 'system'"),
    ([*_ASKED, _ANSWER], "role 'assistant'"),
    (_ASKED[:3], "role 'assistant'"),
    (_ASKED[:4], '1 of 2 results'),
    ([result('1')], r'messages\[0\]: is a result, expected a call'),
    ([user('U'), result('1')], r'messages\[1\]: is a result'),
    ([*_ASKED, result('3')], r'messages\[5\]: is result 3'),
  ],
)
def test_conversation_that_does_not_wait_is_not_ready(messages, reason):
  with pytest.raises(ChatError, match=reason):
    check_ready(messages)
