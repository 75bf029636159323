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
  """What some steps gave.

  Attributes:
    progress: for whoever asked.
    num_tokens: new tokens in it.
    num_steps: that it took part in.
  """

  progress: Progress
  num_tokens: int
  num_steps: int


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
    self._prompt_selected: list[np.ndarray] = []
    self._selected: list[np.ndarray] = []
    self._kept: list[np.ndarray] = []
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
    record = self.request.record
    for asked, found_LBTX, of_prompt, of_new in (
      (
        record.experts,
        emission.expert_LBTA,
        self._prompt_experts,
        self._experts,
      ),
      (
        record.selected,
        emission.selected_LBTK,
        self._prompt_selected,
        self._selected,
      ),
    ):
      if asked and found_LBTX is not None:
        found_TLX = found_LBTX[:, row, :count].swapaxes(0, 1)
        if not self.is_prefilling:
          # The last one gives the first new token.
          of_new.append(found_TLX[-1:])
          found_TLX = found_TLX[:-1]
        of_prompt.append(found_TLX)

  def add_steps(self, emissions: Any, row: int) -> Given:
    """Adds the tokens of several steps, up to the one that ends the request.

    Args:
      emissions: `rounds.Emission` with a leading axis of W steps, on the host.
      row: of this request in them.
    """
    from_prompt = not self.tokens
    start = len(self.tokens)
    count_W = emissions.count_B[:, row]
    most = emissions.token_BE.shape[2]
    # All of a request's steps at once: with hundreds of requests, work on the
    # host for each token would take as long as the device does.
    step_X, index_X = np.nonzero(np.arange(most)[None, :] < count_W[:, None])
    tokens = emissions.token_BE[step_X, row, index_X].tolist()
    logprob_X = emissions.logprob_BE[step_X, row, index_X]
    end, text = self._end_of(tokens, logprob_X)
    at = step_X[:end], row, index_X[:end]
    self.tokens += tokens[:end]
    self._logprobs += logprob_X[:end].tolist()
    self._sampling_logprobs += emissions.sampling_logprob_BE[at].tolist()
    self._record(emissions, *at, from_prompt=from_prompt)
    # A request that ended rests in the steps that were left.
    num_steps = 0
    if len(step_X):
      num_steps = int(step_X[min(end, len(step_X) - 1)]) + 1
    if not from_prompt:
      self.length += end
    if self.ended is None and not self.remaining:
      self.ended = 'length'
    if self.ended is not None and self._text is not None:
      text += self._text.flush()
    return Given(self._progress(start, text), end, num_steps)

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
      experts=_joined(self._experts) if record.experts else None,
      prompt_experts=(
        _joined(self._prompt_experts) if record.experts else None
      ),
      kept=self._kept_sets() if record.kept else None,
      selected=(_joined(_as_wide(self._selected)) if record.selected else None),
      prompt_selected=(
        _joined(_as_wide(self._prompt_selected)) if record.selected else None
      ),
    )

  def _kept_sets(self) -> tuple[np.ndarray | None, ...]:
    """The kept ids of every new token, or None where all were kept."""
    if not self._kept:
      return (None,) * len(self.tokens)
    return tuple(self._kept)

  def _end_of(
    self, tokens: list[int], logprob_X: np.ndarray
  ) -> tuple[int, str]:
    """How many of these tokens count, and their text; sets `ended`."""
    text = ''
    is_finite_X = np.isfinite(logprob_X)
    for number, token in enumerate(tokens):
      if not is_finite_X[number]:
        self.ended, self._error = 'error', NOT_FINITE
        return number, text
      if self._text is not None:
        text += self._text.push(token)
      if token in self.request.stop_ids or (
        self._text is not None and self._text.stopped
      ):
        self.ended = 'stop'
        return number + 1, text
    return len(tokens), text

  def _record(
    self,
    emissions: Any,
    step_X: np.ndarray,
    row: int,
    index_X: np.ndarray,
    *,
    from_prompt: bool,
  ) -> None:
    request = self.request
    at = step_X, row, index_X
    if request.top_logprobs:
      M = request.top_logprobs
      self._top += [
        tuple(zip(ids, logprobs, strict=True))
        for ids, logprobs in zip(
          emissions.top_token_BEM[at][:, :M].tolist(),
          emissions.top_logprob_BEM[at][:, :M].tolist(),
          strict=True,
        )
      ]
    if request.record.kept and truncates(request.sampling):
      if emissions.kept_BEM is not None:
        self._kept += _filled(emissions.kept_BEM[at])
      else:
        self._kept += _set_bits(emissions.kept_BEV8[at])
    if from_prompt:
      # What gave the first new token came with the prompt.
      return
    if request.record.experts and emissions.expert_LBTA is not None:
      experts_WLTA = emissions.expert_LBTA[:, :, row]
      self._experts.append(experts_WLTA[step_X, :, index_X])
    if request.record.selected and emissions.selected_LBTK is not None:
      selected_WLTK = emissions.selected_LBTK[:, :, row]
      self._selected.append(selected_WLTK[step_X, :, index_X])

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


def truncates(sampling: Sampling) -> bool:
  """Whether some tokens can never be drawn."""
  return (
    sampling.temperature == 0
    or sampling.top_k is not None
    or sampling.top_p < 1
    or sampling.min_p > 0
  )


def _as_wide(parts: list[np.ndarray]) -> list[np.ndarray]:
  """Selections of equal K: a cache of fewer than k tokens gives fewer."""
  most = max((part.shape[-1] for part in parts), default=0)
  return [
    np.pad(
      part,
      [(0, 0)] * (part.ndim - 1) + [(0, most - part.shape[-1])],
      constant_values=-1,
    )
    for part in parts
  ]


def _joined(parts: list[np.ndarray]) -> np.ndarray | None:
  return np.concatenate(parts) if parts else None


def _filled(ids_XM: np.ndarray) -> list[np.ndarray]:
  """Each row without the -1 at its end."""
  counts = np.sum(ids_XM >= 0, axis=1).tolist()
  return [ids_M[:count] for ids_M, count in zip(ids_XM, counts, strict=True)]


def _set_bits(bits_XV8: np.ndarray) -> list[np.ndarray]:
  """Numbers of the bits that are set in every row, ascending, int32.

  Few bytes of a row have any, and only those are unpacked.
  """
  row_Z, byte_Z = np.nonzero(bits_XV8)
  bits_Z8 = np.unpackbits(bits_XV8[row_Z, byte_Z][:, None], axis=1)
  which_Y, bit_Y = np.nonzero(bits_Z8)
  id_Y = (8 * byte_Z[which_Y] + bit_Y).astype(np.int32)
  ends = np.searchsorted(row_Z[which_Y], np.arange(len(bits_XV8)), 'right')
  starts = [0, *ends[:-1]]
  return [
    id_Y[start:end] for start, end in zip(starts, ends.tolist(), strict=True)
  ]
