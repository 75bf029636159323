"""Completions over the real client: text and ids in, text out."""

import openai
import pytest

from tests.support import scripted_model

THINK_END = scripted_model.WordTokenizer.special_ids['</think>']
HELLO = ''.join(scripted_model.CONTENT)
TICK, TOCK = scripted_model.ids(scripted_model.ENDLESS)


def _ask(client, prompt, **options):
  defaults = {'model': 'scripted', 'temperature': 0, 'max_tokens': 8}
  return client.completions.create(prompt=prompt, **defaults | options)


def test_completion_of_ids_goes_on_from_the_last_one(client):
  answer = _ask(client, [65, THINK_END])
  (choice,) = answer.choices
  assert (choice.text, choice.finish_reason) == (HELLO, 'stop')
  assert answer.object == 'text_completion'
  assert answer.usage.prompt_tokens == 2
  assert answer.usage.completion_tokens == 4


def test_completion_of_several_prompts_keeps_their_order(client):
  answer = _ask(client, [[THINK_END], [TOCK]], n=2, max_tokens=3)
  assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
  ticking = 'tick tock tick '
  assert [c.text for c in answer.choices] == [HELLO, HELLO, ticking, ticking]
  assert {choice.finish_reason for choice in answer.choices} == {'length'}
  assert answer.usage.prompt_tokens == 2
  assert answer.usage.completion_tokens == 12


def test_completion_of_text_begins_with_the_token_of_documents(client):
  texts = ['ab</think>', 'c']
  answer = _ask(client, texts, max_tokens=1)
  # Special strings in text are plain text.
  assert answer.usage.prompt_tokens == sum(len(text) + 1 for text in texts)
  ids = [[256, *text.encode()] for text in texts]
  again = _ask(client, ids, max_tokens=1)
  assert [c.text for c in answer.choices] == [c.text for c in again.choices]


def test_completion_stream_is_the_same_text_in_pieces(client):
  options = {'stream': True, 'stream_options': {'include_usage': True}}
  *chunks, last = list(_ask(client, [THINK_END], **options))
  assert ''.join(chunk.choices[0].text for chunk in chunks) == HELLO
  assert chunks[-1].choices[0].finish_reason == 'stop'
  assert last.usage == _ask(client, [THINK_END]).usage


def test_completion_logprobs_name_tokens_and_their_places(client):
  found = _ask(client, [THINK_END], logprobs=2).choices[0].logprobs
  assert found.tokens == list(scripted_model.CONTENT)
  assert found.text_offset == [0, 5, 11]
  for token, logprob, top in zip(
    found.tokens, found.token_logprobs, found.top_logprobs, strict=True
  ):
    assert top[token] == logprob
    assert -0.1 < logprob <= 0
  chosen = _ask(client, [THINK_END], logprobs=0).choices[0].logprobs
  assert chosen.tokens == found.tokens
  assert chosen.top_logprobs == [{}, {}, {}]


def test_completion_is_as_long_as_is_usual_if_nothing_is_said(server, client):
  room = server.service.max_tokens
  usual = server.service.settings.default_max_tokens
  assert usual == room  # So the context is what ends it.
  long = [TICK] * (room - 20)
  answer = client.completions.create(model='scripted', prompt=long)
  assert answer.usage.completion_tokens == 20
  assert answer.choices[0].finish_reason == 'length'


@pytest.mark.parametrize(
  ('prompt', 'options', 'param'),
  [
    ([THINK_END], {'best_of': 3}, 'best_of'),
    ([THINK_END], {'echo': True}, 'echo'),
    ([THINK_END], {'suffix': 'x'}, 'suffix'),
    ([THINK_END], {'presence_penalty': 0.5}, 'presence_penalty'),
    ([THINK_END], {'logit_bias': {'5': 1}}, 'logit_bias'),
    ([THINK_END], {'extra_body': {'stream_options': {}}}, 'stream_options'),
    ([[1]] * 65, {'n': 2}, 'n'),
    ([], {}, 'prompt'),
    ([5, 'a'], {}, 'prompt'),
    ([100_000], {}, None),
    ([-1], {}, None),
  ],
)
def test_completion_what_cannot_be_done_is_refused(
  client, prompt, options, param
):
  with pytest.raises(openai.BadRequestError) as caught:
    _ask(client, prompt, **options)
  assert caught.value.type == 'invalid_request_error'
  assert caught.value.param == param
  assert '\n' not in caught.value.message
