"""Generated episodes: an environment of random tools, and a policy's script."""

import json
import random
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from dsv32_jax import chat
from dsv32_jax.agents.policies import ScriptedPolicy
from dsv32_jax.agents.tools import function_tool
from dsv32_jax.agents.types import Reply, Score, ToolError
from dsv32_jax.chat import Message, Mode, ToolCall
from dsv32_jax.data.tokenizer import ByteTokenizer
from tests.support import chat_conversations

STEPS = 6
_PAIRS = [bytes((a, b)) for a in range(97, 123) for b in range(97, 123)]


class PairTokenizer(ByteTokenizer):
  """Bytes, and an id for each two small letters: one text, many spellings."""

  name = 'pairs'
  vocab_size = ByteTokenizer.vocab_size + len(_PAIRS)
  _ids: ClassVar = {bytes((i,)): i for i in range(256)} | {
    pair: ByteTokenizer.vocab_size + i for i, pair in enumerate(_PAIRS)
  }
  _parts = re.compile(rb'[a-z]{2}|.', re.DOTALL)

  def encode(self, text, *, parse_special=False):
    assert not parse_special
    found = [self._ids[part] for part in self._parts.findall(text.encode())]
    return np.asarray(found, np.int32)

  def decode(self, ids):
    return super().decode(split(ids))


def split(ids: Sequence[int]) -> list[int]:
  """The same text, spelt with no pair."""
  out: list[int] = []
  for token in map(int, ids):
    pair = token - ByteTokenizer.vocab_size
    out += _PAIRS[pair] if pair >= 0 else [token]
  return out


class GeneratedEnvironment:
  """A store of notes with some of its tools, drawn by a seed.

  What its tools return depends on all calls before, so does the score.
  """

  def __init__(self, seed: int):
    self._rng = rng = random.Random(f'environment {seed}')
    self._notes: dict[str, Any] = {}
    self._answer: str | None = None
    self.num_closed = 0
    functions = [self.keep, self.look_up, self.count, self.submit]
    chosen = rng.sample(functions, rng.randint(2, 4))
    self._tools = [function_tool(function) for function in chosen]
    self._start = [
      Message(
        role='system',
        content=chat_conversations.text(rng, with_markup=True),
        tools=tuple(tool.spec for tool in self._tools),
      ),
      Message(
        role='user', content=chat_conversations.text(rng, with_markup=True)
      ),
    ]

  def keep(self, key: str, value: int | str | list[int] = 1) -> str:
    """Keeps a value."""
    self._notes[key] = value
    return chat_conversations.text(self._rng, with_markup=True)

  def look_up(self, key: str) -> dict[str, Any]:
    """Finds a value."""
    if key not in self._notes:
      raise ToolError(f'no note is called {key!r}')
    return {'value': self._notes[key]}

  def count(self) -> int:
    """Counts the notes."""
    return len(self._notes)

  def submit(self, answer: str) -> str:
    """Ends the episode."""
    self._answer = answer
    return 'taken'

  @property
  def tools(self):
    return self._tools

  @property
  def is_over(self) -> bool:
    return self._answer is not None

  def start(self) -> list[Message]:
    return self._start

  def score(self, messages: Sequence[Message]) -> Score:
    state = json.dumps([self._notes, self._answer, len(messages)])
    return Score(reward=zlib.crc32(state.encode()) % 1000 / 999)

  def close(self) -> None:
    self.num_closed += 1


def script(
  seed: int, mode: Mode, tokenizer: chat.ChatTokenizer
) -> list[Message | str | Reply]:
  """Replies of one to four calls each, then an answer or a mistake.

  The first has two calls or more. Some calls are of no tool, some have
  arguments that do not fit; some replies bring tokens that the tokenizer would
  not have chosen.
  """
  rng = random.Random(f'script {seed}')
  lines: list[Message | str | Reply] = []
  for index in range(rng.choice((1, 1, 2, 3, STEPS + 1))):
    least = 1 if index else 2
    calls = tuple(_call(rng) for _ in range(rng.randint(least, 4)))
    reasoning = chat_conversations.text(rng) if mode == 'thinking' else ''
    message = Message(
      role='assistant',
      content=rng.choice(('', chat_conversations.text(rng))),
      reasoning=reasoning,
      tool_calls=calls,
    )
    is_usual = rng.random() < 0.7
    lines.append(message if is_usual else spelt(message, mode, tokenizer))
  if rng.random() < 0.2:
    lines.append('<｜DSML｜ is no answer' + rng.choice(('', chat.EOS)))
  else:
    lines.append(
      Message(
        role='assistant',
        content=chat_conversations.text(rng),
        reasoning='so' if mode == 'thinking' else '',
      )
    )
  return lines


def spelt(message: Message, mode: Mode, tokenizer: chat.ChatTokenizer) -> Reply:
  """A reply with tokens as a model may sample them: without any pair."""
  user = Message(role='user')
  ids = chat.encode([user, message], tokenizer, mode=mode)
  ids = split(ids[len(chat.encode([user], tokenizer, mode=mode)) :])
  return Reply(message=message, text=message.content, tokens=tuple(ids))


def policy(
  seed: int, mode: Mode, tokenizer: chat.ChatTokenizer
) -> ScriptedPolicy:
  return ScriptedPolicy(script(seed, mode, tokenizer))


def mode_of(seed: int) -> Mode:
  return 'thinking' if seed % 2 else 'chat'


_KEYS = ('a', 'b', 'größe', '検索')
_CALLS: Sequence[Callable[[random.Random], tuple[str, Mapping[str, Any]]]] = (
  lambda rng: ('keep', {'key': rng.choice(_KEYS), 'value': rng.randrange(9)}),
  lambda rng: ('keep', {'key': rng.choice(_KEYS), 'value': [1, 2]}),
  lambda rng: (
    'keep',
    {
      'key': rng.choice(_KEYS),
      'value': chat_conversations.text(rng, with_markup=True),
    },
  ),
  lambda rng: ('look_up', {'key': rng.choice(_KEYS)}),
  lambda rng: ('look_up', {'key': rng.choice(_KEYS)}),
  lambda rng: ('count', {}),
  # Arguments that do not fit, and tools that there are not.
  lambda rng: ('keep', {'key': rng.randrange(9)}),
  lambda rng: ('keep', {}),
  lambda rng: ('count', {'what': chat_conversations.json_value(rng)}),
  lambda rng: ('検索', {'q': chat_conversations.json_value(rng)}),
)


def _call(rng: random.Random) -> ToolCall:
  if rng.random() < 0.03:
    return ToolCall(name='submit', arguments={'answer': rng.choice(_KEYS)})
  name, arguments = rng.choice(_CALLS)(rng)
  return ToolCall(name=name, arguments=dict(arguments))
