"""Bar 6: two hundred streams at a time from the real client."""

import asyncio

import numpy as np
import openai
import pytest

from dsv32_jax import inference, presets
from dsv32_jax.data.tokenizer import ByteTokenizer
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.serving.loading import Loaded
from tests.support import serving, tiny_configs

REQUESTS = 200
CONFIG = inference.EngineConfig(
  max_batch=32,
  page_size=128,
  max_tokens=128,
  prefill_chunk=16,
  decode_steps=4,
)


def _tiny():
  cfg = presets.tiny()
  return Loaded(DeepSeekV32(cfg), tiny_configs.variables(cfg), ByteTokenizer())


def _requests():
  """Chats and texts of many lengths."""
  generator = np.random.default_rng(0)
  for number in range(REQUESTS):
    size = int(generator.integers(1, 60))
    text = bytes(generator.integers(97, 123, size, np.uint8)).decode()
    options = {
      'model': 'tiny',
      'max_tokens': int(generator.integers(1, 32)),
      'temperature': 0,
      'stream': True,
      'stream_options': {'include_usage': True},
    }
    if number % 2:
      yield {'messages': [{'role': 'user', 'content': text}], **options}
    else:
      yield {'prompt': text, **options}


async def _stream(client, options):
  """Text, reason and numbers of tokens of one request."""
  create = (
    client.chat.completions.create
    if 'messages' in options
    else client.completions.create
  )
  text, reason, usage = '', None, None
  async for chunk in await create(**options):
    usage = chunk.usage or usage
    for choice in chunk.choices:
      piece = choice.delta.content if 'messages' in options else choice.text
      text += piece or ''
      reason = choice.finish_reason or reason
  return text, reason, usage.model_dump()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_hundred_streams_at_a_time_equal_one_at_a_time():
  requests = list(_requests())

  async def ask(url, *, together):
    async with openai.AsyncOpenAI(
      base_url=f'{url}/v1', api_key='any', max_retries=0, timeout=240
    ) as client:
      if together:
        return await asyncio.gather(*[_stream(client, r) for r in requests])
      return [await _stream(client, r) for r in requests]

  with serving.running(_tiny(), CONFIG, model='tiny') as server:
    one_by_one = asyncio.run(ask(server.url, together=False))
    at_once = asyncio.run(ask(server.url, together=True))
    stats = server.stats()
    assert stats.free_pages == stats.total_pages
    assert stats.finished == {
      reason: 2 * sum(found == reason for _, found, _ in one_by_one)
      for reason in {reason for _, reason, _ in one_by_one}
    }
  for request, alone, among in zip(requests, one_by_one, at_once, strict=True):
    assert among == alone, request
    assert alone[1] in ('stop', 'length')
    assert 0 < alone[2]['completion_tokens'] <= request['max_tokens']
