import pytest

from dsv32_jax.agents.policies import ScriptedPolicy
from dsv32_jax.agents.types import PolicyError, Query, Reply
from dsv32_jax.chat import EOS, Message, ParseErrorCode, ToolCall

USER = Message(role='user')
CALL = Message(role='assistant', tool_calls=(ToolCall(name='f'),))


def test_place_in_the_script_is_told_by_the_turn():
  policy = ScriptedPolicy([CALL, f'2</think>Two.{EOS}', 'not closed'])
  first = policy.reply(Query(messages=(USER, CALL, USER)))
  assert first == Reply(message=CALL)
  turn = (USER, CALL, Message(role='tool'))
  second = policy.reply(Query(messages=turn))
  assert second.message == Message(
    role='assistant', content='Two.', reasoning='2'
  )
  third = policy.reply(Query(messages=(*turn, CALL, Message(role='tool'))))
  assert third == Reply(
    message=None,
    text='not closed',
    error=ParseErrorCode.REASONING_NOT_CLOSED,
  )
  with pytest.raises(PolicyError, match='the script has 3 lines'):
    policy.reply(Query(messages=(USER, CALL, CALL, CALL)))


def test_function_is_asked_with_the_query():
  policy = ScriptedPolicy(lambda query: Reply(message=None, text=query.mode))
  assert policy.reply(Query(messages=(USER,), mode='chat')).text == 'chat'
