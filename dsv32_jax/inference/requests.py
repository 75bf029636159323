"""What the engine is asked, and what it answers: plain host data.

Letters: N new tokens, L layers with experts, A experts a token, K selected
keys.
"""

import dataclasses
from typing import Any, Literal

import numpy as np

from dsv32_jax.inference.sampling import GREEDY, Sampling

FinishReason = Literal['stop', 'length', 'cancelled', 'error']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
  """What is kept of every new token beside it, for training to replay.

  Attributes:
    experts: the experts that each layer's router chose for the token that was
      fed in to get it.
    kept: the tokens that the truncations left to draw from.
    selected: the keys that each layer's indexer selected.
  """

  experts: bool = False
  kept: bool = False
  selected: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """One prompt to continue.

  Attributes:
    prompt: token ids, at least one.
    max_new_tokens: at most so many are drawn.
    sampling: how.
    seed: of the draws; the same seed gives the same tokens whatever else the
      engine does at the time.
    stop_ids: a token of these ends the request, and is part of the answer.
    stop_strings: text that ends the request; not part of the answer's text.
      Needs an engine with a tokenizer.
    top_logprobs: report this many of the most likely tokens at every step.
    record: what else to keep.
  """

  prompt: tuple[int, ...]
  max_new_tokens: int
  sampling: Sampling = GREEDY
  seed: int = 0
  stop_ids: tuple[int, ...] = ()
  stop_strings: tuple[str, ...] = ()
  top_logprobs: int = 0
  record: Record = Record()

  def __post_init__(self):
    object.__setattr__(self, 'prompt', tuple(int(t) for t in self.prompt))
    if not self.prompt:
      raise ValueError('prompt: got no token, expected at least one')
    if self.max_new_tokens < 1:
      raise ValueError(
        f'max_new_tokens: got {self.max_new_tokens}, expected at least 1'
      )
    if not 0 <= self.seed < 2**32:
      raise ValueError(
        f'seed: got {self.seed}, expected 0 to 2**32 - 1 (an unsigned 32-bit '
        'number)'
      )
    if not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
      raise ValueError(
        f'top_logprobs: got {self.top_logprobs}, expected 0 to '
        f'{MAX_TOP_LOGPROBS}'
      )
    if any(not text for text in self.stop_strings):
      raise ValueError('stop_strings: got an empty string, expected text')


MAX_TOP_LOGPROBS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
  """What is new of one request since the last report.

  Attributes:
    tokens: new token ids.
    logprobs: of each under the model itself: temperature 1, all tokens.
    sampling_logprobs: of each under the distribution it was drawn from.
    top_logprobs: for each, the most likely tokens with their logprobs, best
      first; empty unless asked for.
    text: new text, if the engine has a tokenizer. Text that may turn out to be
      the start of a stop string, or an incomplete character, is held back until
      that is known.
    finish_reason: None while the request goes on; in the last report why it
      ended: 'stop' (a stop id or string), 'length', 'cancelled' or 'error'.
    error: one line, with 'error'.
  """

  tokens: tuple[int, ...] = ()
  logprobs: tuple[float, ...] = ()
  sampling_logprobs: tuple[float, ...] = ()
  top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
  text: str = ''
  finish_reason: FinishReason | None = None
  error: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
  """One finished request.

  Attributes:
    prompt: as it was asked.
    tokens: new token ids, N of them, a stop id included.
    logprobs: see `Progress`.
    sampling_logprobs: see `Progress`.
    top_logprobs: see `Progress`.
    text: the new text up to a stop string, or '' without a tokenizer.
    finish_reason: see `Progress`.
    error: see `Progress`.
    experts: int [N, L, A], or None if not asked for: row n is of the token
      whose logits gave the n-th new one. See `prompt_experts`.
    prompt_experts: int [T - 1, L, A], of the prompt's tokens but the last.
    kept: for each new token the ids that could have been drawn, or None where
      all could.
    selected: int [N, layers, K], -1 for no key, in the order of `experts`.
    prompt_selected: int [T - 1, layers, K], in that of `prompt_experts`.
  """

  prompt: tuple[int, ...]
  tokens: tuple[int, ...]
  logprobs: tuple[float, ...]
  sampling_logprobs: tuple[float, ...]
  top_logprobs: tuple[tuple[tuple[int, float], ...], ...]
  text: str
  finish_reason: FinishReason
  error: str | None = None
  experts: np.ndarray | None = None
  prompt_experts: np.ndarray | None = None
  kept: tuple[Any, ...] | None = None
  selected: np.ndarray | None = None
  prompt_selected: np.ndarray | None = None


class QueueFull(RuntimeError):
  """The engine has as many waiting requests as it takes; try again later."""


class RequestTooLong(ValueError):
  """A prompt with its new tokens cannot fit this engine, however long it waits.

  The message names both lengths and the limit.
  """
