"""The engine as the policy of agents: tokens in, tokens out."""

import math
import time

from dsv32_jax import chat
from dsv32_jax.agents.types import PolicyError, Query, Reply
from dsv32_jax.inference.engine_thread import EngineThread
from dsv32_jax.inference.requests import (
  Completion,
  QueueFull,
  Record,
  Request,
)
from dsv32_jax.inference.sampling import Sampling
from dsv32_jax.inference.tickets import Ticket

_PAUSE_S = 0.05
_NO_RECORD = Record()


class EnginePolicy:
  """Continues the tokens of an episode; its replies are what was sampled.

  Any number of episodes may ask at a time: each waits in a thread of its own
  while the engine's thread runs them as one batch.
  """

  def __init__(
    self,
    running: EngineThread,
    tokenizer: chat.ChatTokenizer,
    *,
    sampling: Sampling | None = None,
    record: Record = _NO_RECORD,
  ):
    """Starts nothing.

    Args:
      running: the engine's thread, started.
      tokenizer: of the model.
      sampling: how tokens are drawn; temperature 1 and top-p 0.95 unless given.
      record: what the engine keeps of each token, for training.
    """
    self._running = running
    self._tokenizer = tokenizer
    self._controls = chat.ControlTokens.from_tokenizer(tokenizer)
    self._sampling = sampling or Sampling(temperature=1.0, top_p=0.95)
    self._record = record

  def reply(self, query: Query) -> Reply:
    """See `Policy`.

    A query without tokens has its messages encoded.

    Raises:
      PolicyError: the engine has ended ('policy_error'), has no room for the
        prompt ('tokens'), or took too long ('wall').
    """
    completion = self._complete(query)
    tokens = completion.tokens
    text = self._controls.decode(tokens, self._tokenizer)
    message, error = None, None
    try:
      # Calls are checked by who runs them, so that the model reads the mistake.
      message = chat.parse(text, mode=query.mode)
    except chat.ParseError as problem:
      error = problem.code
    return Reply(
      message=message,
      text=text,
      error=error,
      tokens=tokens,
      num_tokens=len(tokens),
      was_cut=completion.finish_reason == 'length',
      completion=completion,
    )

  def _complete(self, query: Query) -> Completion:
    until = math.inf
    if query.timeout_s is not None:
      until = time.monotonic() + query.timeout_s
    prompt = query.tokens or tuple(
      chat.encode(
        query.messages,
        self._tokenizer,
        mode=query.mode,
        controls=self._controls,
      )
    )
    most = self._running.engine.max_tokens
    if len(prompt) >= most:
      raise PolicyError(
        f'the prompt has {len(prompt)} tokens, the engine takes {most}',
        ending='tokens',
      )
    request = Request(
      prompt=prompt,
      max_new_tokens=min(query.max_new_tokens, most - len(prompt)),
      sampling=self._sampling,
      seed=query.seed,
      stop_ids=(self._controls.ids[chat.EOS],),
      record=self._record,
    )
    ticket = self._submit(request, until)
    left = None if math.isinf(until) else max(until - time.monotonic(), 0.0)
    try:
      completion = ticket.result(left)
    except TimeoutError:
      self._running.cancel(ticket)
      raise PolicyError('no time is left', ending='wall') from None
    if completion.finish_reason in ('error', 'cancelled'):
      raise PolicyError(
        f'the engine ended the reply: {completion.finish_reason}'
        + (f' ({completion.error})' if completion.error else '')
      )
    return completion

  def _submit(self, request: Request, until: float) -> Ticket:
    while True:
      try:
        return self._running.submit(request)
      except QueueFull:
        if time.monotonic() >= until:
          raise PolicyError('no time is left', ending='wall') from None
        time.sleep(_PAUSE_S)
      except RuntimeError as error:
        raise PolicyError(str(error)) from None
