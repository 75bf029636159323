r"""Loads a server for minutes, and reports its memory, throughput and latency.

  python experiments/bench_serve.py --minutes=10 --output=serve.jsonl
  python experiments/bench_serve.py --url=http://127.0.0.1:8000 --minutes=1

Without --url it starts a server of its own: preset `tiny` with random weights.
Clients ask one request after the other over the OpenAI client: chat and text,
streamed or whole, of mixed lengths; some leave in the middle, some ask for what
has to be refused. Memory is what /metrics says of the server's process, each
minute from the end of the warm-up (all programs are compiled by then).
Needs the extras `serve` and `test`.
"""

import asyncio
import contextlib
import json
import random
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
from absl import flags

from dsv32_jax.training import flags as run_flags

_URL = flags.DEFINE_string('url', None, 'A server that runs already.')
_MODEL = flags.DEFINE_string('model', 'tiny', 'Its model.')
_MINUTES = flags.DEFINE_float('minutes', 10.0, 'How long.')
_CLIENTS = flags.DEFINE_integer('clients', 32, 'Requests at a time.')
_MAX_BATCH = flags.DEFINE_integer('max_batch', 16, 'Of our own server.')
_LONGEST = flags.DEFINE_integer('longest', 500, 'Tokens of a request, at most.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the mixture.')
_OUTPUT = flags.DEFINE_string('output', None, 'JSONL file to append to.')

_RESIDENT = re.compile(r'^process_resident_memory_bytes (\S+)$', re.MULTILINE)
_PERCENTILES = (50, 90, 99)


def main(argv: list[str]) -> None:
  del argv
  with contextlib.ExitStack() as stack:
    url = _URL.value or stack.enter_context(_server())
    result = asyncio.run(_load(url))
  print(json.dumps(result, indent=2))
  if _OUTPUT.value:
    with open(_OUTPUT.value, 'a', encoding='utf-8') as file:
      print(json.dumps(result), file=file)


@contextlib.contextmanager
def _server() -> Iterator[str]:
  """A server of our own, until the end of the block."""
  process = subprocess.Popen(
    (
      sys.executable,
      'experiments/serve.py',
      f'--preset={_MODEL.value}',
      '--port=0',
      f'--max_batch={_MAX_BATCH.value}',
      f'--max_tokens={_LONGEST.value}',
      '--page_size=128',
      '--prefill_chunk=64',
    ),
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
      raise ValueError('url: our own server does not start')
    yield line.split()[-1].removesuffix('/v1')
  finally:
    process.terminate()
    process.wait(60)


async def _load(url: str) -> dict:
  client = openai.AsyncOpenAI(
    base_url=f'{url}/v1', api_key='none', max_retries=0, timeout=600
  )
  seen = _Seen()
  # Alone, so that every width of the programs comes up.
  begin = time.perf_counter()
  for size in range(1, _LONGEST.value - 20, 7):
    await _ask_once(client, random.Random(size), seen, size=size, plain=True)
  print(f'warm after {time.perf_counter() - begin:.0f} s', file=sys.stderr)
  seen = _Seen()
  begin = time.perf_counter()
  until = begin + 60 * _MINUTES.value
  clients = [
    asyncio.create_task(_client(client, seed, seen, until))
    for seed in range(_CLIENTS.value)
  ]
  memory = {}
  for minute in range(int(_MINUTES.value) + 1):
    await asyncio.sleep(max(0, begin + 60 * minute - time.perf_counter()))
    memory[minute] = await asyncio.to_thread(_resident, url)
    print(f'minute {minute}: {seen.line(memory[minute])}', file=sys.stderr)
  await asyncio.gather(*clients)
  await client.close()
  return seen.summary(memory, time.perf_counter() - begin)


async def _client(
  client: openai.AsyncOpenAI, seed: int, seen: '_Seen', until: float
) -> None:
  chosen = random.Random(_SEED.value * 1000 + seed)
  while time.perf_counter() < until:
    size = int(chosen.triangular(1, _LONGEST.value - 40, 30))
    await _ask_once(client, chosen, seen, size=size)


async def _ask_once(
  client: openai.AsyncOpenAI,
  chosen: random.Random,
  seen: '_Seen',
  *,
  size: int,
  plain: bool = False,
) -> None:
  """One request; the kinds are those of the module's docstring."""
  text = ''.join(chosen.choices('abcdefgh ', k=size))
  kind = 'stream' if plain else chosen.choices(
    ('stream', 'chat', 'whole', 'leave', 'refused'), (5, 3, 1, 1, 1)
  )[0]  # fmt: skip
  new = min(chosen.randrange(2, 80), _LONGEST.value - size - 12)
  begin = time.perf_counter()
  options: dict = {
    'model': _MODEL.value,
    'max_tokens': max(1, new),
    'temperature': chosen.choice((0, 1)),
    'seed': chosen.randrange(2**32),
  }
  try:
    if kind == 'whole':
      answer = await client.completions.create(prompt=text, **options)
      seen.tokens += answer.usage.completion_tokens if answer.usage else 0
    elif kind == 'refused':
      await client.completions.create(prompt=text, **options | {'top_p': 7.0})
    else:
      options |= {'stream': True, 'stream_options': {'include_usage': True}}
      messages: Any = [{'role': 'user', 'content': text}]
      stream = await (
        client.chat.completions.create(messages=messages, **options)
        if kind == 'chat'
        else client.completions.create(prompt=text, **options)
      )
      first = None
      async for chunk in stream:
        if first is None:
          first = time.perf_counter() - begin
          seen.first_s.append(first)
        if chunk.usage:
          seen.tokens += chunk.usage.completion_tokens
        if kind == 'leave' and chosen.random() < 0.2:
          await stream.close()
          break
  except openai.BadRequestError:
    seen.count('refused')
    if kind != 'refused':
      raise
    return
  except openai.RateLimitError:
    seen.count('queue full')
    await asyncio.sleep(1)
    return
  seen.count('left' if kind == 'leave' else 'complete')
  if kind != 'leave':
    seen.whole_s.append(time.perf_counter() - begin)


class _Seen:
  """What came back."""

  def __init__(self):
    self.tokens = 0
    self.first_s: list[float] = []
    self.whole_s: list[float] = []
    self.counts: dict[str, int] = {}

  def count(self, name: str) -> None:
    self.counts[name] = self.counts.get(name, 0) + 1

  def line(self, memory: int) -> str:
    return f'{memory / 2**20:.0f} MiB, {self.counts}, {self.tokens} tokens'

  def summary(self, memory: dict[int, int], seconds: float) -> dict:
    result = {
      'minutes': _MINUTES.value,
      'clients': _CLIENTS.value,
      'max_batch': _MAX_BATCH.value,
      'answers': self.counts,
      'requests_per_s': sum(self.counts.values()) / seconds,
      'new_tokens_per_s': self.tokens / seconds,
      'first_chunk_s': _percentiles(self.first_s),
      'answer_s': _percentiles(self.whole_s),
      'resident_mib': {m: round(b / 2**20, 1) for m, b in memory.items()},
    }
    if 2 in memory:
      last = max(memory)
      result['resident_last_over_minute_2'] = memory[last] / memory[2]
    return result


def _percentiles(values: list[float]) -> dict[str, float]:
  if not values:
    return {}
  found = np.percentile(values, _PERCENTILES).tolist()
  return {
    f'p{p}': round(value, 4)
    for p, value in zip(_PERCENTILES, found, strict=True)
  }


def _resident(url: str) -> int:
  with urllib.request.urlopen(f'{url}/metrics', timeout=60) as answer:
    found = _RESIDENT.search(answer.read().decode())
  if found is None:
    raise ValueError('url: /metrics has no process_resident_memory_bytes')
  return int(float(found.group(1)))


if __name__ == '__main__':
  run_flags.run(main)
