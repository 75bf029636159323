import json
import random
from typing import ClassVar

import numpy as np
import pytest

from dsv32_jax import chat, data
from dsv32_jax.chat import Message, ToolCall
from dsv32_jax.config.data import (
  DataConfig,
  RecallConfig,
  SourceConfig,
  TokenizerConfig,
)
from dsv32_jax.data import conversation_tokens, conversations
from dsv32_jax.data.conversations import Conversation
from dsv32_jax.data.tokenizer import ByteTokenizer
from tests.support import chat_conversations

TOKENIZER = ByteTokenizer()
USER = Message(role='user', content='2+2?')


def simple(number: int = 0, **tags) -> Conversation:
  """A question and its answer in chat mode, of 14 tokens and a few."""
  return Conversation(
    messages=(
      Message(role='user', content=f'{number}+1?'),
      Message(role='assistant', content=str(number + 1)),
    ),
    tags=tags,
  )


def with_tools() -> tuple[Message, ...]:
  """A turn with a call and its result, then a second turn."""
  call = ToolCall(name='add', arguments={'a': 2, 'b': 2})
  return (
    Message(role='system', content='Be brief.'),
    USER,
    Message(role='assistant', reasoning='Ask.', tool_calls=(call,)),
    Message(role='tool', content='4</think>'),
    Message(role='assistant', reasoning='Done.', content='Four.'),
    Message(role='user', content='Sure?'),
    Message(role='assistant', reasoning='Yes.', content='Quite.'),
  )


def learnt(conversation: Conversation) -> list[str]:
  """What is learnt of each sequence, replies parted by '|'."""
  out = []
  for ids, is_target in conversation_tokens.sequences(conversation, TOKENIZER):
    runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(is_target)) + 1)
    learnt_runs = [run for run in runs if is_target[run[0]]]
    out.append('|'.join(TOKENIZER.decode(ids[run]) for run in learnt_runs))
  return out


def test_sequences_chat_mode_learn_every_reply_and_its_eos_alone():
  conversation = Conversation(
    messages=(
      USER,
      Message(role='assistant', content='4'),
      Message(role='user', content='Sure?'),
      Message(role='assistant', content='Yes.'),
    )
  )
  assert learnt(conversation) == [f'4{chat.EOS}|Yes.{chat.EOS}']


def test_sequences_thinking_mode_learn_each_turn_with_its_own_reasoning():
  conversation = Conversation(messages=with_tools(), mode='thinking')
  first, second = learnt(conversation)
  call, answer = first.split('|')
  assert call.startswith('Ask.</think>\n\n<｜DSML｜function_calls>')
  assert call.endswith(f'function_calls>{chat.EOS}')
  assert answer == f'Done.</think>Four.{chat.EOS}'
  assert second == f'Yes.</think>Quite.{chat.EOS}'


def test_sequences_thinking_turn_without_reasoning_is_context_only():
  messages = (
    USER,
    Message(role='assistant', content='4'),
    Message(role='user', content='Sure?'),
    Message(role='assistant', reasoning='Yes.', content='Quite.'),
  )
  conversation = Conversation(messages=messages, mode='thinking')
  assert learnt(conversation) == [f'Yes.</think>Quite.{chat.EOS}']


@pytest.mark.parametrize('seed', range(60))
def test_sequences_random_conversation_learns_what_encode_adds(seed):
  """A reply is what `chat.encode` appends when its message is appended."""
  messages, mode = chat_conversations.conversation(random.Random(seed))
  conversation = Conversation(messages=messages, mode=mode)
  users = [i for i, m in enumerate(messages) if m.role in ('user', 'developer')]
  bounds = zip(users, [*users[1:], len(messages)], strict=True)
  turns = list(bounds) if mode == 'thinking' else [(0, len(messages))]
  found = conversation_tokens.sequences(conversation, TOKENIZER)
  assert len(found) == len(turns)
  for (ids, is_target), (first, end) in zip(found, turns, strict=True):
    part = messages[:end]
    np.testing.assert_array_equal(ids, chat.encode(part, TOKENIZER, mode=mode))
    expected = np.zeros(len(ids), bool)
    for index in range(first, end):
      if messages[index].role == 'assistant':
        before = len(chat.encode(part[:index], TOKENIZER, mode=mode))
        after = len(chat.encode(part[: index + 1], TOKENIZER, mode=mode))
        expected[before:after] = True
    np.testing.assert_array_equal(is_target, expected)


def test_sequences_control_strings_in_content_stay_plain_text():
  text = ''.join(chat.CONTROL_STRINGS)
  conversation = Conversation(
    messages=(
      Message(role='user', content=text),
      Message(role='assistant', content='no'),
    )
  )
  [(ids, is_target)] = conversation_tokens.sequences(conversation, TOKENIZER)
  eos = TOKENIZER.special_ids[chat.EOS]
  assert (ids == eos).sum() == 1
  assert TOKENIZER.decode(ids[is_target]) == f'no{chat.EOS}'


class Leaky(ByteTokenizer):
  """Makes control tokens of content."""

  def encode(self, text, *, parse_special=False):
    return ByteTokenizer().encode(text, parse_special=True)


class Foreign(ByteTokenizer):
  """Has no ids for the marks of thinking."""

  special_ids: ClassVar = {
    text: index
    for text, index in ByteTokenizer.special_ids.items()
    if 'think' not in text
  }


@pytest.mark.parametrize(
  ('tokenizer', 'message'),
  [(Leaky(), 'makes control tokens of content'), (Foreign(), 'no id for <thi')],
)
def test_sequences_tokenizer_that_lets_content_pass_for_control_is_refused(
  tokenizer, message
):
  conversation = Conversation(
    messages=(
      Message(role='user', content=chat.EOS),
      Message(role='assistant', content='no'),
    )
  )
  with pytest.raises(ValueError, match=message):
    conversation_tokens.sequences(conversation, tokenizer)


@pytest.mark.parametrize(
  ('messages', 'mode', 'error'),
  [
    ((), 'chat', 'messages: got none'),
    ((USER,), 'chat', r"messages\[0\]: .* role 'user', expected a reply"),
    (
      (
        USER,
        Message(role='assistant', content='4'),
        Message(role='assistant', content='5'),
      ),
      'chat',
      r"messages\[1\]: .* role 'assistant', expected a user",
    ),
    (
      (USER, Message(role='assistant', content='4', reasoning='2+2')),
      'chat',
      r'messages\[1\]\.reasoning: got some in mode',
    ),
  ],
)
def test_conversation_that_cannot_be_learnt_is_refused(messages, mode, error):
  with pytest.raises(chat.ChatError, match=error):
    Conversation(messages=messages, mode=mode)


def test_conversation_without_reasoning_in_thinking_mode_is_refused():
  conversation = Conversation(
    messages=(USER, Message(role='assistant', content='4')), mode='thinking'
  )
  with pytest.raises(ValueError, match=r'messages\[1\]\.reasoning: is empty'):
    conversation_tokens.sequences(conversation, TOKENIZER)


def test_write_then_read_gives_the_same_conversations(tmp_path):
  wanted = [
    simple(3, domain='mathematics', n=[1, 2]),
    Conversation(messages=with_tools(), mode='thinking'),
  ]
  conversations.write(tmp_path / 'some.jsonl', wanted)
  assert conversations.read(tmp_path / 'some.jsonl') == wanted


def test_from_json_reads_openai_form_and_infers_the_mode():
  record = {
    'messages': [
      {'role': 'user', 'content': 'hi'},
      {'role': 'assistant', 'content': 'yo', 'reasoning_content': 'greet'},
    ],
    'tools': [{'type': 'function', 'function': {'name': 'now'}}],
    'domain': 'writing',
  }
  read = Conversation.from_json(record)
  assert read.mode == 'thinking'
  assert read.tags == {'domain': 'writing'}
  assert [tool.name for tool in read.messages[0].tools] == ['now']


def test_conversation_tag_that_would_be_read_as_a_field_is_refused():
  with pytest.raises(chat.ChatError, match=r'tags\.tools: is a field'):
    simple(tools=[])


def test_from_json_unknown_mode_is_refused():
  record = simple().to_json() | {'mode': 'loud'}
  with pytest.raises(chat.ChatError, match="mode: got 'loud', expected one of"):
    Conversation.from_json(record)


def rows_config(path, **changes) -> DataConfig:
  source = SourceConfig(kind='conversations', path=str(path))
  settings = {'seq_len': 48, 'batch_size': 4, 'held_out_fraction': 0.25}
  return DataConfig(sources=(source,), **(settings | changes))


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  path = tmp_path_factory.mktemp('conversations') / 'some.jsonl'
  conversations.write(path, (simple(number) for number in range(60)))
  return path


def texts(batch) -> tuple[list[str], list[str]]:
  """Prompts and learnt replies of a batch."""
  prompts, replies = [], []
  for tokens, targets, weight, segments in zip(
    *(batch[k] for k in ('tokens', 'targets', 'loss_weight', 'segment_ids')),
    strict=True,
  ):
    for segment in range(1, segments.max() + 1):
      here = segments == segment
      prompts.append(TOKENIZER.decode(tokens[here]))
      replies.append(TOKENIZER.decode(targets[here & (weight > 0)]))
  return prompts, replies


def test_train_iterator_rows_hold_whole_conversations_and_learn_replies(path):
  config = rows_config(path)
  corpora = data.load_corpora(config, TOKENIZER)
  iterator = data.train_iterator(config, corpora, vocab_size=512)
  seen = set()
  for _ in range(20):
    prompts, replies = texts(next(iterator))
    for prompt, reply in zip(prompts, replies, strict=True):
      number = int(prompt.split('<｜User｜>')[1].split('+')[0])
      assert reply == f'{number + 1}{chat.EOS}'
      seen.add(number)
  held_out = set()
  [batch] = data.held_out_batches(
    config, corpora, seq_len=48, batch_size=2, num_batches=1
  )
  for prompt in texts(batch)[0]:
    held_out.add(int(prompt.split('<｜User｜>')[1].split('+')[0]))
  assert seen
  assert held_out
  assert not seen & held_out


def test_train_iterator_resumes_within_an_epoch_of_conversations(path):
  config = rows_config(path)
  corpora = data.load_corpora(config, TOKENIZER)
  whole = data.train_iterator(config, corpora, vocab_size=512)
  batches = [next(whole) for _ in range(5)]
  resumed = data.train_iterator(config, corpora, vocab_size=512)
  for _ in range(3):
    next(resumed)
  state = json.loads(json.dumps(resumed.get_state()))
  again = data.train_iterator(config, corpora, vocab_size=512)
  again.set_state(state)
  for batch in batches[3:]:
    np.testing.assert_array_equal(next(again)['tokens'], batch['tokens'])


def test_train_iterator_conversation_longer_than_a_row_is_refused(path):
  config = rows_config(path, seq_len=10)
  corpora = data.load_corpora(config, TOKENIZER)
  with pytest.raises(
    ValueError, match=r'seq_len: got 10, expected at least 1[0-9] for the'
  ):
    data.train_iterator(config, corpora, vocab_size=512)


def test_load_corpora_equal_conversations_are_on_one_side(tmp_path):
  conversations.write(tmp_path / 'a.jsonl', [simple(n % 7) for n in range(70)])
  config = rows_config(tmp_path, held_out_fraction=0.4)
  corpora = data.load_corpora(config, TOKENIZER)

  def documents(corpus):
    parts = np.split(corpus.tokens, corpus.offsets[1:-1])
    return {TOKENIZER.decode(part) for part in parts}

  train, held_out = documents(corpora.train[0]), documents(corpora.held_out[0])
  assert train
  assert held_out
  assert not train & held_out


@pytest.mark.parametrize(
  ('line', 'error'),
  [
    ('{"messages": [', r'bad\.jsonl:2: not JSON'),
    ('[1]', r'bad\.jsonl:2: got a list, expected a JSON object'),
    ('{"messages": []}', r'bad\.jsonl:2: messages: got none'),
    (
      '{"messages": [{"role": "user", "content": 3}]}',
      r'bad\.jsonl:2: messages\[0\]\.content: got a number',
    ),
  ],
)
def test_load_corpora_bad_line_is_refused_with_its_place(line, error, tmp_path):
  good = json.dumps(simple().to_json())
  (tmp_path / 'bad.jsonl').write_text(f'{good}\n{line}\n', encoding='utf-8')
  config = rows_config(tmp_path / 'bad.jsonl', held_out_fraction=0.0)
  with pytest.raises(ValueError, match=error):
    data.load_corpora(config, TOKENIZER)


def test_data_config_conversations_beside_recall_rows_are_refused(path):
  with pytest.raises(ValueError, match=r'recall\.share: got 0\.5 beside'):
    rows_config(path, recall=RecallConfig(share=0.5, num_keys=4, min_gap=4))


def test_make_tokenizer_bpe_of_conversations_alone_is_refused(path):
  config = rows_config(path, tokenizer=TokenizerConfig(kind='bpe'))
  with pytest.raises(ValueError, match=r"tokenizer\.kind: got 'bpe'"):
    data.make_tokenizer(config, vocab_size=512)
