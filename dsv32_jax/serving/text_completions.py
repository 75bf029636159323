"""POST /v1/completions: text or token ids, continued."""

from typing import Any

from dsv32_jax.inference.requests import Progress, Request
from dsv32_jax.serving import replies
from dsv32_jax.serving.protocol import CompletionRequest
from dsv32_jax.serving.service import Service


class TextReply:
  """The answer to one completion request; see `replies.Reply`.

  Choices come prompt by prompt, n of each. Text is encoded as plain text, after
  the token that begins a document.

  Raises:
    ApiError: 400, for a prompt that is too long.
  """

  chunk_object = whole_object = 'text_completion'
  prefix = 'cmpl'

  def __init__(self, body: CompletionRequest, service: Service):
    tokenizer = service.tokenizer
    prompts = [
      [tokenizer.bos_id, *map(int, tokenizer.encode(prompt))]
      if isinstance(prompt, str)
      else prompt
      for prompt in body.prompts()
    ]
    self._tokenizer = tokenizer
    self._num_top = body.logprobs
    self.requests = [
      Request(
        prompt=tuple(prompt),
        max_new_tokens=service.room(prompt, body.max_tokens, field='prompt'),
        sampling=body.sampling(),
        seed=seed,
        stop_ids=(tokenizer.eos_id,),
        stop_strings=body.stops,
        top_logprobs=body.logprobs or 0,
      )
      for prompt in prompts
      for seed in body.seeds()
    ]
    self.usage = replies.Usage(sum(map(len, prompts)))
    self._wholes = [
      {
        'index': index,
        'text': '',
        'logprobs': None if body.logprobs is None else _no_logprobs(),
        'finish_reason': None,
      }
      for index in range(len(self.requests))
    ]
    self._offsets = [0] * len(self.requests)

  def opening(self, index: int) -> list[dict[str, Any]]:
    return []

  def chunks(self, index: int, progress: Progress) -> list[dict[str, Any]]:
    self.usage.completion_tokens += len(progress.tokens)
    progress, _ = replies.without_end(
      progress, self.requests[index], self._tokenizer
    )
    logprobs = None
    if self._num_top is not None and progress.tokens:
      logprobs = self._logprobs(index, progress)
    whole: dict[str, Any] = self._wholes[index]
    whole['text'] += progress.text
    whole['finish_reason'] = progress.finish_reason
    if logprobs:
      for name, values in logprobs.items():
        whole['logprobs'][name] += values
    if not (progress.text or logprobs or progress.finish_reason):
      return []
    return [
      {
        'index': index,
        'text': progress.text,
        'logprobs': logprobs,
        'finish_reason': progress.finish_reason,
      }
    ]

  def choice(self, index: int) -> dict[str, Any]:
    return self._wholes[index]

  def _logprobs(self, index: int, progress: Progress) -> dict[str, list]:
    out = _no_logprobs()
    top = progress.top_logprobs or ((),) * len(progress.tokens)
    for token, logprob, others in zip(
      progress.tokens, progress.logprobs, top, strict=True
    ):
      text, _ = replies.token_text(self._tokenizer, token)
      out['tokens'].append(text)
      out['token_logprobs'].append(replies.finite(logprob))
      # Of tokens with the same text, the likeliest.
      named: dict[str, float] = {}
      for other, value in others:
        name, _ = replies.token_text(self._tokenizer, other)
        named.setdefault(name, replies.finite(value))
      out['top_logprobs'].append(named)
      out['text_offset'].append(self._offsets[index])
      self._offsets[index] += len(text)
    return out


def _no_logprobs() -> dict[str, list]:
  return {
    'tokens': [],
    'token_logprobs': [],
    'top_logprobs': [],
    'text_offset': [],
  }
