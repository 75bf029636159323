"""A request that runs: what it has so far, on the host."""

import dataclasses
from typing import Any

import numpy as np

from dsv32_jax.inference.detokenize import Decoder, TextStream
from dsv32_jax.inference.requests import (
  Completion,
  FinishReason,
  Progress,
)
from dsv32_jax.inference.sampling import Sampling

NOT_FINITE = 'the model gave a value that is not finite'


@dataclasses.dataclass(frozen=True)
class Given:
  """What a step gave.

  Attributes:
    progress: for whoever asked.
    num_tokens: new tokens in it.
  """

  progress: Progress
  num_tokens: int


class Active:
  """Collects a request's tokens and what is recorded with them.

  Attributes:
    ticket: of the request.
    request: what was asked.
    place: its row in decode calls, or None without one.
    group: of devices that has its pages.
    pages: that its caches are in.
    length: tokens in its caches.
    tokens: new tokens so far.
    ended: why it ended, or None.
  """

  def __init__(self, ticket: Any, tokenizer: Decoder | None):
    self.ticket = ticket
    self.request = ticket.request
    self.prompt = ticket.request.prompt
    self.place: Any = None
    self.group = 0
    self.pages: list[int] = []
    self.length = 0
    self.tokens: list[int] = []
    self.ended: FinishReason | None = None
    self._error: str | None = None
    self._logprobs: list[float] = []
    self._sampling_logprobs: list[float] = []
    self._top: list[tuple[tuple[int, float], ...]] = []
    self._prompt_experts: list[np.ndarray] = []
    self._experts: list[np.ndarray] = []
    self._selected: list[np.ndarray] = []
    self._kept: list[np.ndarray | None] = []
    self._text = None
    if tokenizer is not None:
      self._text = TextStream(tokenizer, self.request.stop_strings)

  @property
  def is_prefilling(self) -> bool:
    return self.length < len(self.prompt)

  @property
  def remaining(self) -> int:
    return self.request.max_new_tokens - len(self.tokens)

  @property
  def newest(self) -> int:
    """The token that is not in the caches yet."""
    return self.tokens[-1]

  def add_prompt(self, count: int, emission: Any, row: int) -> None:
    """Notes that so many tokens of the prompt are in the caches."""
    self.length += count
    if self.request.record.experts and emission.expert_LBTA is not None:
      experts_TLA = emission.expert_LBTA[:, row, :count].swapaxes(0, 1)
      if not self.is_prefilling:
        # The last one gives the first new token.
        self._experts.append(experts_TLA[-1])
        experts_TLA = experts_TLA[:-1]
      self._prompt_experts.append(experts_TLA)

  def add_step(self, emission: Any, row: int) -> Given:
    """Adds the tokens of a step, up to the one that ends the request."""
    count = int(emission.count_B[row])
    from_prompt = not self.tokens
    start, text = len(self.tokens), ''
    for index in range(count):
      token = int(emission.token_BE[row, index])
      logprob = float(emission.logprob_BE[row, index])
      if not np.isfinite(logprob):
        self.ended = 'error'
        self._error = NOT_FINITE
        break
      self.tokens.append(token)
      self._logprobs.append(logprob)
      self._sampling_logprobs.append(
        float(emission.sampling_logprob_BE[row, index])
      )
      self._record(emission, row, index, from_prompt)
      if self._text is not None:
        text += self._text.push(token)
      if token in self.request.stop_ids or (
        self._text is not None and self._text.stopped
      ):
        self.ended = 'stop'
        break
    if not from_prompt:
      self.length += count
    if self.ended is None and not self.remaining:
      self.ended = 'length'
    if self.ended is not None and self._text is not None:
      text += self._text.flush()
    return Given(self._progress(start, text), len(self.tokens) - start)

  def finish(self, reason: FinishReason, error: str | None = None) -> Progress:
    """Ends the request from outside."""
    self.ended, self._error = reason, error
    text = '' if self._text is None else self._text.flush()
    return self._progress(len(self.tokens), text)

  def completion(self) -> Completion:
    """Everything, after the end."""
    assert self.ended is not None
    record = self.request.record
    return Completion(
      prompt=self.prompt,
      tokens=tuple(self.tokens),
      logprobs=tuple(self._logprobs),
      sampling_logprobs=tuple(self._sampling_logprobs),
      top_logprobs=tuple(self._top),
      text='' if self._text is None else self._text.text,
      finish_reason=self.ended,
      error=self._error,
      experts=_stacked(self._experts) if record.experts else None,
      prompt_experts=(
        _joined(self._prompt_experts) if record.experts else None
      ),
      kept=tuple(self._kept) if record.kept else None,
      selected=_stacked(self._selected) if record.selected else None,
    )

  def _record(
    self, emission: Any, row: int, index: int, from_prompt: bool
  ) -> None:
    request = self.request
    if request.top_logprobs:
      tokens = emission.top_token_BEM[row, index, : request.top_logprobs]
      logprobs = emission.top_logprob_BEM[row, index, : request.top_logprobs]
      self._top.append(
        tuple(zip(tokens.tolist(), logprobs.tolist(), strict=True))
      )
    if request.record.kept:
      kept = None
      if _truncates(request.sampling):
        bits = np.unpackbits(emission.kept_BEV8[row, index])
        kept = np.flatnonzero(bits).astype(np.int32)
      self._kept.append(kept)
    if request.record.experts and emission.expert_LBTA is not None:
      if not from_prompt:
        self._experts.append(emission.expert_LBTA[:, row, index])
    if request.record.selected and emission.selected_LBEK is not None:
      self._selected.append(emission.selected_LBEK[:, row, index])

  def _progress(self, start: int, text: str) -> Progress:
    return Progress(
      tokens=tuple(self.tokens[start:]),
      logprobs=tuple(self._logprobs[start:]),
      sampling_logprobs=tuple(self._sampling_logprobs[start:]),
      top_logprobs=tuple(self._top[start:]),
      text=text,
      finish_reason=self.ended,
      error=self._error,
    )


def _truncates(sampling: Sampling) -> bool:
  return (
    sampling.temperature == 0
    or sampling.top_k is not None
    or sampling.top_p < 1
    or sampling.min_p > 0
  )


def _stacked(parts: list[np.ndarray]) -> np.ndarray | None:
  return np.stack(parts) if parts else None


def _joined(parts: list[np.ndarray]) -> np.ndarray | None:
  return np.concatenate(parts) if parts else None
