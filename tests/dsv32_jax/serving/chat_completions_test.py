"""Chat over the real client: messages, streams, tools, formats, counts."""

import json
import math

import openai
import pytest

from dsv32_jax import chat
from tests.support import scripted_model

HELLO = ''.join(scripted_model.CONTENT)
THOUGHT = ''.join(scripted_model.REASONING)
USER = [{'role': 'user', 'content': 'Is anybody there?'}]
TOOL = {
  'type': 'function',
  'function': {
    'name': 'stock_level',
    'description': 'How many there are.',
    'parameters': {
      'type': 'object',
      'properties': {'sku': {'type': 'string'}, 'limit': {'type': 'integer'}},
      'required': ['sku'],
    },
  },
}
ARGUMENTS = {'sku': 'A-7', 'limit': 3}


def _ask(client, **options):
  defaults = {'model': 'scripted', 'messages': USER, 'temperature': 0}
  return client.chat.completions.create(**defaults | options)


def _streamed(client, **options):
  """All chunks, and the message that they make."""
  chunks = list(_ask(client, stream=True, **options))
  message = {'content': '', 'reasoning_content': '', 'tool_calls': {}}
  for chunk in chunks:
    for choice in chunk.choices:
      delta = choice.delta
      message['content'] += delta.content or ''
      message['reasoning_content'] += getattr(delta, 'reasoning_content', '')
      for call in delta.tool_calls or ():
        known = message['tool_calls'].setdefault(call.index, ['', '', ''])
        known[0] += call.id or ''
        known[1] += call.function.name or ''
        known[2] += call.function.arguments or ''
  return chunks, message


def test_chat_completion_is_the_models_reply_with_its_counts(client):
  answer = _ask(client)
  (choice,) = answer.choices
  assert (choice.message.role, choice.message.content) == ('assistant', HELLO)
  assert choice.message.tool_calls is None
  assert choice.logprobs is None
  assert choice.finish_reason == 'stop'
  assert not hasattr(choice.message, 'reasoning_content')
  assert (answer.object, answer.model) == ('chat.completion', 'scripted')
  prompt = chat.encode(
    chat.messages_from_openai(USER), scripted_model.WordTokenizer()
  )
  assert answer.usage.prompt_tokens == len(prompt)
  # Three words and the end.
  assert answer.usage.completion_tokens == 4
  assert answer.usage.total_tokens == len(prompt) + 4


def test_chat_stream_is_the_same_reply_in_pieces(client):
  chunks, message = _streamed(client, stream_options={'include_usage': True})
  assert message['content'] == HELLO
  assert len({chunk.id for chunk in chunks}) == 1
  assert {chunk.object for chunk in chunks} == {'chat.completion.chunk'}
  assert chunks[0].choices[0].delta.role == 'assistant'
  *pieces, last, counts = chunks
  assert [piece.choices[0].finish_reason for piece in pieces] == [None] * len(
    pieces
  )
  assert last.choices[0].finish_reason == 'stop'
  assert {chunk.usage for chunk in chunks[:-1]} == {None}
  assert counts.choices == []
  assert counts.usage == _ask(client).usage


@pytest.mark.parametrize(
  'asking',
  [
    {'chat_template_kwargs': {'thinking': True}},
    {'thinking': {'type': 'enabled'}},
    {'reasoning_effort': 'high'},
  ],
  ids=lambda asking: next(iter(asking)),
)
def test_chat_reasoning_comes_apart_when_asked_for(client, asking):
  message = _ask(client, extra_body=asking).choices[0].message
  assert message.reasoning_content == THOUGHT
  assert message.content == HELLO
  _, streamed = _streamed(client, extra_body=asking)
  assert streamed['reasoning_content'] == THOUGHT
  assert streamed['content'] == HELLO


def test_chat_tool_calls_come_apart_from_the_content(calling_client):
  (choice,) = _ask(calling_client, tools=[TOOL]).choices
  assert choice.finish_reason == 'tool_calls'
  assert choice.message.content == HELLO
  (call,) = choice.message.tool_calls
  assert (call.type, call.function.name) == ('function', 'stock_level')
  assert json.loads(call.function.arguments) == ARGUMENTS
  assert call.id.startswith('call_')
  assert not hasattr(choice, 'warnings')


def test_chat_tool_calls_are_streamed_piece_by_piece(calling_client):
  thinking = {'chat_template_kwargs': {'thinking': True}}
  chunks, message = _streamed(calling_client, tools=[TOOL], extra_body=thinking)
  assert message['reasoning_content'] == THOUGHT
  assert message['content'] == HELLO
  ((index, (identity, name, arguments)),) = message['tool_calls'].items()
  assert (index, name) == (0, 'stock_level')
  assert identity.startswith('call_')
  assert json.loads(arguments) == ARGUMENTS
  assert chunks[-1].choices[0].finish_reason == 'tool_calls'
  carrying = [c for c in chunks if c.choices[0].delta.tool_calls]
  assert len(carrying) > 2


def test_chat_results_of_a_tool_continue_the_conversation(calling_client):
  first = _ask(calling_client, tools=[TOOL]).choices[0].message
  results = [
    {
      'role': 'tool',
      'tool_call_id': first.tool_calls[0].id,
      'content': '12',
    }
  ]
  messages = [*USER, first.model_dump(exclude_none=True), *results]
  again = _ask(calling_client, tools=[TOOL], messages=messages)
  assert again.choices[0].message.content == HELLO
  results[0]['tool_call_id'] = 'call_of_nobody'
  with pytest.raises(openai.BadRequestError, match='tool_call_id'):
    _ask(calling_client, tools=[TOOL], messages=messages)


def test_chat_tool_choice_none_offers_and_gives_no_calls(calling_client):
  offered = _ask(calling_client, tools=[TOOL])
  (choice,) = (
    answer := _ask(calling_client, tools=[TOOL], tool_choice='none')
  ).choices
  assert choice.message.tool_calls is None
  assert choice.finish_reason == 'stop'
  # The prompt does not even name them.
  assert answer.usage.prompt_tokens < offered.usage.prompt_tokens - 500


def test_chat_calls_that_do_not_fit_their_schema_come_with_a_warning(
  calling_client,
):
  strings = json.loads(json.dumps(TOOL).replace('integer', 'string'))
  (choice,) = _ask(calling_client, tools=[strings]).choices
  assert json.loads(choice.message.tool_calls[0].function.arguments)
  (warning,) = choice.warnings
  assert 'limit' in warning


@pytest.mark.parametrize('kind', ['json_object', 'json_schema'])
def test_chat_replies_that_miss_their_format_come_with_a_warning(client, kind):
  schema = {'type': 'object', 'required': ['level']}
  form = {'type': kind}
  if kind == 'json_schema':
    form['json_schema'] = {'name': 'stock', 'schema': schema}
  (choice,) = _ask(client, response_format=form).choices
  assert choice.message.content == HELLO
  assert len(choice.warnings) == 1
  last = _streamed(client, response_format=form)[0][-1]
  assert last.choices[0].warnings == choice.warnings
  plain = _ask(client, response_format={'type': 'text'}).choices[0]
  assert not hasattr(plain, 'warnings')


def test_chat_logprobs_are_those_of_every_token_of_the_reply(client):
  options = {'logprobs': True, 'top_logprobs': 3}
  entries = _ask(client, **options).choices[0].logprobs.content
  assert [entry.token for entry in entries] == list(scripted_model.CONTENT)
  for entry in entries:
    assert bytes(entry.bytes).decode() == entry.token
    assert len(entry.top_logprobs) == 3
    # Greedy, so the best one was taken.
    assert entry.top_logprobs[0].token == entry.token
    assert entry.top_logprobs[0].logprob == entry.logprob
    assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1.001
    assert -0.1 < entry.logprob <= 0
  chunks, _ = _streamed(client, **options)
  streamed = [
    entry
    for chunk in chunks
    if chunk.choices[0].logprobs
    for entry in chunk.choices[0].logprobs.content
  ]
  assert streamed == entries
  assert (
    _ask(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs
    == []
  )


def test_chat_stop_strings_end_the_reply_before_them(client):
  answer = _ask(client, stop=['rld n', 'never'])
  assert answer.choices[0].message.content == 'Hello wö'
  assert answer.choices[0].finish_reason == 'stop'
  _, message = _streamed(client, stop='rld n')
  assert message['content'] == 'Hello wö'


@pytest.mark.parametrize('field', ['max_tokens', 'max_completion_tokens'])
def test_chat_length_is_bounded_by_either_field(client, field):
  answer = _ask(client, **{field: 2})
  assert answer.choices[0].message.content == 'Hello wörld'
  assert answer.choices[0].finish_reason == 'length'
  assert answer.usage.completion_tokens == 2


def test_chat_calls_that_are_cut_off_are_no_calls(calling_client):
  cut = len(scripted_model.CONTENT) + 4
  (choice,) = _ask(calling_client, tools=[TOOL], max_tokens=cut).choices
  assert choice.message.tool_calls is None
  assert choice.finish_reason == 'length'
  assert choice.message.content == HELLO


def test_chat_choices_differ_by_their_seeds_and_repeat_with_them(client):
  # Hot enough that the script is left.
  options = {'n': 3, 'temperature': 30, 'max_tokens': 12, 'seed': 5}
  first, again = _ask(client, **options), _ask(client, **options)
  texts = [choice.message.content for choice in first.choices]
  assert [choice.index for choice in first.choices] == [0, 1, 2]
  assert len(set(texts)) == 3
  assert texts == [choice.message.content for choice in again.choices]
  # The second choice is the first of the next seed.
  alone = _ask(client, **options | {'n': 1, 'seed': 6})
  assert alone.choices[0].message.content == texts[1]
  other = _ask(client, **options | {'n': 1, 'seed': None})
  assert other.choices[0].message.content not in texts
  streams = {0: '', 1: '', 2: ''}
  for chunk in _ask(client, stream=True, **options):
    for choice in chunk.choices:
      streams[choice.index] += choice.delta.content or ''
  assert list(streams.values()) == texts
  # The prompt is counted once.
  assert first.usage.prompt_tokens == alone.usage.prompt_tokens


def test_chat_truncations_are_passed_on(client):
  hot = {'temperature': 100, 'seed': 1}
  for narrow in (
    {'top_p': 1e-6},
    {'extra_body': {'top_k': 1}},
    {'extra_body': {'min_p': 1.0}},
  ):
    assert _ask(client, **hot, **narrow).choices[0].message.content == HELLO
  assert _ask(client, **hot, max_tokens=3).choices[0].message.content != HELLO
