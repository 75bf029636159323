"""Answers, whole and in chunks: what both kinds of completion have in common.

A reply follows one request of a client. It takes the engine's reports and gives
pieces of choices, which are either sent at once or put together.
"""

import dataclasses
import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from dsv32_jax.data.tokenizer import Tokenizer
from dsv32_jax.inference.requests import Progress, Request

# What the API shows for a probability of 0, as JSON has no infinity.
_LEAST_LOGPROB = -9999.0


@runtime_checkable
class Reply(Protocol):
  """One answer that is being made.

  Attributes:
    requests: for the engine, one a choice.
    usage: tokens so far.
    chunk_object: the `object` of a chunk.
    whole_object: the `object` of a whole answer.
    prefix: of its id.
  """

  requests: Sequence[Request]
  usage: 'Usage'
  chunk_object: str
  whole_object: str
  prefix: str

  def opening(self, index: int) -> list[dict[str, Any]]:
    """Chunks of a choice before its first report."""
    ...

  def chunks(self, index: int, progress: Progress) -> list[dict[str, Any]]:
    """Choices of the chunks that a report gives, in order."""
    ...

  def choice(self, index: int) -> dict[str, Any]:
    """A whole choice, when it has ended; `chunks` was called throughout."""
    ...


@dataclasses.dataclass
class Usage:
  """Counts tokens.

  Attributes:
    prompt_tokens: each prompt once, however many choices it has.
    completion_tokens: of all choices, the token that ends one included.
  """

  prompt_tokens: int
  completion_tokens: int = 0

  def body(self) -> dict[str, int]:
    return {
      'prompt_tokens': self.prompt_tokens,
      'completion_tokens': self.completion_tokens,
      'total_tokens': self.prompt_tokens + self.completion_tokens,
    }


class Envelope:
  """What stands around choices: id, time, model."""

  def __init__(self, prefix: str, model: str):
    self._head = {
      'id': f'{prefix}-{uuid.uuid4().hex}',
      'created': int(time.time()),
      'model': model,
    }

  def wrap(
    self, name: str, choices: Sequence[dict[str, Any]], **more: Any
  ) -> dict[str, Any]:
    return {**self._head, 'object': name, 'choices': list(choices), **more}


def without_end(
  progress: Progress, request: Request, tokenizer: Tokenizer
) -> tuple[Progress, bool]:
  """A report without the token that ends a choice, which nobody asked for.

  Returns:
    The report, and whether that token was in it.
  """
  tokens = progress.tokens
  if not tokens or tokens[-1] not in request.stop_ids:
    return progress, False
  end = tokenizer.decode([tokens[-1]])
  shorter = dataclasses.replace(
    progress,
    tokens=tokens[:-1],
    logprobs=progress.logprobs[:-1],
    top_logprobs=progress.top_logprobs[:-1],
    text=progress.text.removesuffix(end),
  )
  return shorter, True


def token_text(
  tokenizer: Tokenizer, token: int
) -> tuple[str, list[int] | None]:
  """A token's text and bytes; None for one that is no whole text by itself."""
  text = tokenizer.decode([token])
  return text, None if '\ufffd' in text else list(text.encode())


def finite(logprob: float) -> float:
  return max(logprob, _LEAST_LOGPROB)
