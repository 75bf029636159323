import json
import random

import pytest

from dsv32_jax.chat import events
from dsv32_jax.chat.errors import ChatError
from dsv32_jax.chat.stream import CompletionParser
from dsv32_jax.chat.template import render
from dsv32_jax.chat.types import Message, ToolSpec
from tests.support import chat_conversations

_EOS = '<｜end▁of▁sentence｜>'
_COMPLETION = (
  'let me\nsee</think>Looking.\n\n<｜DSML｜function_calls>\n'
  '<｜DSML｜invoke name="find">\n'
  '<｜DSML｜parameter name="q" string="true">a "<b>"\n</｜DSML｜parameter>\n'
  '<｜DSML｜parameter name="n" string="false">[1, {"x": null}]'
  '</｜DSML｜parameter>\n'
  '</｜DSML｜invoke>\n'
  '<｜DSML｜invoke name="now">\n\n</｜DSML｜invoke>\n'
  f'</｜DSML｜function_calls>{_EOS}'
)


def read(pieces, mode, **options):
  """All events of a text in pieces, neighbouring deltas joined."""
  parser = CompletionParser(mode, **options)
  found = [event for piece in pieces for event in parser.feed(piece)]
  found += parser.finish()
  assert parser.finish() == []
  joined = []
  for event in found:
    last = joined[-1] if joined else None
    if (
      isinstance(event, events.ReasoningDelta)
      and isinstance(last, events.ReasoningDelta)
    ) or (
      isinstance(event, events.ContentDelta)
      and isinstance(last, events.ContentDelta)
    ):
      joined[-1] = type(event)(last.text + event.text)
    elif isinstance(event, events.ArgumentsDelta) and isinstance(
      last, events.ArgumentsDelta
    ):
      assert last.index == event.index
      joined[-1] = events.ArgumentsDelta(event.index, last.text + event.text)
    elif isinstance(event, events.Failed):
      error = event.error
      joined.append(('failed', error.code, error.position, error.reason))
    else:
      joined.append(event)
  failures = [(e.code, e.position, e.reason) for e in parser.failures]
  return joined, parser.message, failures


def test_events_of_a_completion_tell_all_of_it():
  (*found, ended), message, failures = read([_COMPLETION], 'thinking')
  first, second = message.tool_calls
  assert found == [
    events.ReasoningDelta('let me\nsee'),
    events.ContentDelta('Looking.'),
    events.CallStarted(0, 'find'),
    events.ArgumentsDelta(0, '{"q": "a \\"<b>\\"\\n", "n": [1, {"x": null}]}'),
    events.CallFinished(0, first),
    events.CallStarted(1, 'now'),
    events.ArgumentsDelta(1, '{}'),
    events.CallFinished(1, second),
  ]
  assert ended == events.Ended(message)
  assert first.arguments == {'q': 'a "<b>"\n', 'n': [1, {'x': None}]}
  assert failures == []


def test_text_is_given_as_soon_as_it_cannot_be_markup():
  parser = CompletionParser('thinking')
  assert parser.feed('ab</thi') == [events.ReasoningDelta('ab')]
  assert parser.feed('s') == [events.ReasoningDelta('</this')]
  assert parser.feed('</think>x\n') == [events.ContentDelta('x')]
  assert parser.feed('\n<') == []
  assert parser.feed('p>') == [events.ContentDelta('\n\n<p>')]


def test_string_argument_is_given_while_it_comes():
  parser = CompletionParser('chat')
  head = _COMPLETION[_COMPLETION.index('\n\n<') :]
  parser.feed(head[: head.index('a "<b>')])
  assert parser.feed('print("1 < 2") <') == [
    events.ArgumentsDelta(0, 'print(\\"1 < 2\\") ')
  ]


def random_cuts(rng, text):
  places = sorted(
    rng.randrange(len(text) + 1) for _ in range(rng.choice((1, 3, 10, 40)))
  )
  return [
    text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)
  ]


def check_cuts(text, mode, cuts, **options):
  want = read([text], mode, **options)
  for pieces in cuts:
    assert read(pieces, mode, **options) == want, pieces


_TOOLS = (
  ToolSpec(
    name='find',
    parameters={'type': 'object', 'properties': {'q': {'maxLength': 3}}},
  ),
)
_SAMPLES = {
  'sound': _COMPLETION,
  'truncated': _COMPLETION[:-70],
  'call in reasoning': _COMPLETION.replace('</think>', ''),
  'two ends of thought': _COMPLETION.replace('Looking', '</think>'),
  'missing line end': _COMPLETION.replace(
    '</｜DSML｜invoke>\n', '</｜DSML｜invoke>'
  ),
  'no attribute': _COMPLETION.replace(' string="true"', ''),
  'text after': _COMPLETION + 'x',
}


@pytest.mark.parametrize('recover', [False, True])
@pytest.mark.parametrize('case', _SAMPLES)
def test_every_cut_in_two_reads_the_same(case, recover):
  text = _SAMPLES[case]
  cuts = [[text[:at], text[at:]] for at in range(len(text) + 1)]
  check_cuts(text, 'thinking', [*cuts, list(text)], recover=recover)
  check_cuts(text, 'thinking', [list(text)], recover=recover, tools=_TOOLS)


def test_generated_completions_read_the_same_in_any_cut():
  rng = random.Random(0)
  for _ in range(80):
    messages, mode = chat_conversations.conversation(rng)
    prompt = render(messages[:-1], mode=mode)
    replies = [
      render((*messages[:i], m), mode=mode)[
        len(render(messages[:i], mode=mode)) :
      ]
      for i, m in enumerate(messages)
      if m.role == 'assistant'
    ]
    assert render(messages, mode=mode) == prompt + replies[-1]
    for reply in replies[-2:]:
      for text in (reply, chat_conversations.damaged(rng, reply)):
        cuts = [random_cuts(rng, text), random_cuts(rng, text), list(text)]
        check_cuts(text, mode, cuts, recover=rng.random() < 0.5)


def test_argument_deltas_are_the_json_of_the_arguments():
  rng = random.Random(1)
  checked = 0
  for _ in range(200):
    messages, _ = chat_conversations.conversation(rng)
    calls = [m for m in messages if m.tool_calls]
    if not calls:
      continue
    whole = Message(role='assistant', tool_calls=calls[0].tool_calls)
    text = render((whole,)).removeprefix('<｜begin▁of▁sentence｜>')
    found, message, _ = read(random_cuts(rng, text), 'chat')
    deltas = [e for e in found if isinstance(e, events.ArgumentsDelta)]
    assert [e.text for e in deltas] == [
      json.dumps(call.arguments, ensure_ascii=False)
      for call in whole.tool_calls
    ]
    assert message.tool_calls == whole.tool_calls
    checked += len(deltas)
  assert checked > 100


def test_failed_parser_says_nothing_more():
  parser = CompletionParser('chat')
  *_, failed = parser.feed('a<think>b')
  assert isinstance(failed, events.Failed)
  assert parser.feed(f'c{_EOS}') == []
  assert parser.finish() == []
  assert parser.message == Message(role='assistant', content='a')
  assert parser.failures == (failed.error,)


def test_feeding_a_finished_parser_is_an_error():
  parser = CompletionParser('chat')
  parser.finish()
  with pytest.raises(RuntimeError, match='finished'):
    parser.feed('a')


def test_text_that_cannot_be_encoded_is_refused():
  with pytest.raises(ChatError, match=r'^text: .*surrogate'):
    CompletionParser('chat').feed('\ud800')
