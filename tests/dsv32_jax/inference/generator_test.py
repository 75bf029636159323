"""Text and messages through a model whose weights are random."""

import pytest

from dsv32_jax import chat, inference
from dsv32_jax.data.tokenizer import ByteTokenizer
from dsv32_jax.modules.transformer import DeepSeekV32
from tests.support import tiny_configs

CFG = tiny_configs.config(
  vocab_size=300, scan_layers=False, max_position_embeddings=128
)


@pytest.fixture(scope='module')
def generator():
  return inference.Generator(
    DeepSeekV32(CFG),
    tiny_configs.variables(CFG),
    ByteTokenizer(),
    config=inference.EngineConfig(max_batch=1, prefill_chunk=16),
  )


def test_complete_continues_the_bytes_of_a_text(generator):
  parts = []
  completion = generator.complete(
    'def f(', max_new_tokens=8, on_text=parts.append
  )
  assert completion.prompt == tuple(b'def f(')
  assert len(completion.tokens) == 8
  assert ''.join(parts) == completion.text
  cut = generator.complete(
    'def f(', max_new_tokens=8, stop=[completion.text[2:4]]
  )
  assert cut.text == completion.text[:2]
  assert cut.finish_reason == 'stop'


def test_chat_gives_the_message_of_the_tokens_after_the_opener(generator):
  messages = [chat.Message(role='user', content='2+2?')]
  reply = generator.chat('2+2?', max_new_tokens=12)
  assert reply == generator.chat(messages, max_new_tokens=12)
  engine = generator.engine
  ticket = engine.submit(
    inference.Request(
      prompt=tuple(chat.encode(messages, ByteTokenizer())), max_new_tokens=12
    )
  )
  engine.run()
  text = ByteTokenizer().decode(ticket.result(0).tokens)
  assert reply == chat.parse(text, recover=True)


def test_chat_refuses_a_conversation_that_no_reply_can_follow(generator):
  with pytest.raises(chat.ChatError, match='messages'):
    generator.chat([chat.Message(role='system', content='S')])


def test_prompt_that_does_not_fit_is_refused(generator):
  with pytest.raises(inference.RequestTooLong, match='expected at most 128'):
    generator.complete('a' * 200)
