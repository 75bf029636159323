import pathlib
import random
import subprocess
import sys

import pytest

from dsv32_jax.chat.errors import ParseError
from dsv32_jax.chat.parse import parse
from tests.support import chat_conversations, chat_oracle, chat_round_trip

ROOT = pathlib.Path(__file__).parents[3]


def test_generated_conversations_come_back():
  assert chat_round_trip.run(150, seed=0) > 300


@pytest.mark.slow
def test_ten_thousand_generated_conversations_come_back():
  command = [
    sys.executable,
    '-m',
    'tests.support.chat_round_trip',
    '10000',
    '1',
  ]
  out = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert out.returncode == 0, out.stderr
  assert out.stdout.startswith('10000 conversations, ')


def test_damaged_completions_are_read_as_the_oracle_reads_them():
  rng = random.Random(2)
  sound = broken = 0
  for _ in range(300):
    messages, mode = chat_conversations.conversation(rng)
    for _, completion in chat_round_trip.completions(messages, mode):
      text = chat_conversations.damaged(rng, completion)
      want = chat_oracle.read(text, mode)
      if want is None:
        with pytest.raises(ParseError) as caught:
          parse(text, mode=mode)
        assert 0 <= caught.value.position <= len(text)
        assert '\n' not in str(caught.value)
        broken += 1
      else:
        message = parse(text, mode=mode)
        calls = [(call.name, call.arguments) for call in message.tool_calls]
        assert (message.reasoning, message.content, calls) == want
        sound += 1
  assert sound > 80
  assert broken > 300
