"""What the protocols need of a model: prompts in, replies out.

A policy is any callable of this form: our engine (`EnginePolicy`), an
OpenAI-compatible endpoint (`endpoint.EndpointPolicy`), or a function that a
test has written.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from dsv32_jax import chat
from dsv32_jax.chat import Message, Mode, ParseError
from dsv32_jax.inference.engine import Engine
from dsv32_jax.inference.requests import Completion, Request
from dsv32_jax.inference.sampling import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
  """One conversation to continue.

  Attributes:
    messages: ends with a user message.
    seed: of the draws.
  """

  messages: tuple[Message, ...]
  seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
  """What a policy answered.

  Attributes:
    content: the answer; what there is of it if it is not finished.
    reasoning: what was thought before it.
    num_tokens: sampled in all.
    num_reasoning_tokens: of these, before the answer.
    is_finished: whether the policy ended it by itself; not if it was cut off
      at the longest length, or could not be read.
    error: one line, if the policy could not answer.
  """

  content: str
  reasoning: str = ''
  num_tokens: int = 0
  num_reasoning_tokens: int = 0
  is_finished: bool = True
  error: str | None = None


@runtime_checkable
class Policy(Protocol):
  """Answers many prompts at once."""

  def __call__(self, prompts: Sequence[Prompt]) -> list[Reply]:
    """Returns one reply a prompt, in order."""
    ...


def seed_of(*parts: Any) -> int:
  """A seed that depends on what it is for and on nothing else.

  >>> seed_of('task', 3) == seed_of('task', 3) != seed_of('task', 4)
  True
  """
  digest = hashlib.sha256(repr(parts).encode()).digest()
  return int.from_bytes(digest[:4], 'big')


class EnginePolicy:
  """Our own engine as a policy.

  Attributes:
    engine: runs nothing else meanwhile.
  """

  def __init__(
    self,
    engine: Engine,
    tokenizer: chat.ChatTokenizer,
    *,
    mode: Mode,
    max_new_tokens: int,
    sampling: Sampling,
  ):
    self.engine = engine
    self._tokenizer = tokenizer
    self._mode: Mode = mode
    self._controls = chat.ControlTokens.from_tokenizer(tokenizer)
    self._max_new_tokens = max_new_tokens
    self._sampling = sampling

  def __call__(self, prompts: Sequence[Prompt]) -> list[Reply]:
    replies: list[Reply] = []
    # No more at a time than the engine lets wait.
    count = max(1, self.engine.config.max_waiting)
    for begin in range(0, len(prompts), count):
      replies += self._answer(prompts[begin : begin + count])
    return replies

  def _answer(self, prompts: Sequence[Prompt]) -> list[Reply]:
    tickets = [
      self.engine.submit(
        Request(
          prompt=tuple(
            chat.encode(
              prompt.messages,
              self._tokenizer,
              mode=self._mode,
              controls=self._controls,
            )
          ),
          max_new_tokens=self._max_new_tokens,
          sampling=self._sampling,
          seed=prompt.seed,
          stop_ids=(self._tokenizer.eos_id,),
        )
      )
      for prompt in prompts
    ]
    self.engine.run()
    return [
      read_completion(
        ticket.result(), self._tokenizer, self._controls, mode=self._mode
      )
      for ticket in tickets
    ]


def read_completion(
  completion: Completion,
  tokenizer: chat.ChatTokenizer,
  controls: chat.ControlTokens,
  *,
  mode: Mode,
) -> Reply:
  """What an engine's completion says.

  One that breaks the grammar of chat, or was cut off, is not finished; what can
  be read of it is kept.
  """
  text = controls.decode(completion.tokens, tokenizer)
  is_finished = completion.finish_reason == 'stop'
  error = completion.error
  try:
    message = chat.parse(text, mode=mode)
  except ParseError as parse_error:
    message = chat.parse(text, mode=mode, recover=True)
    error = error or (str(parse_error) if is_finished else None)
    is_finished = False
  thought = 0
  if mode == 'thinking':
    end = controls.ids.get(chat.THINK_END)
    before = itertools.takewhile(lambda t: t != end, completion.tokens)
    thought = len(list(before))
  return Reply(
    content=message.content,
    reasoning=message.reasoning,
    num_tokens=len(completion.tokens),
    num_reasoning_tokens=thought,
    is_finished=is_finished,
    error=error,
  )
