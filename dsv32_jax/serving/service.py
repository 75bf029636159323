"""The engine as the application sees it: requests in, reports awaited."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from dsv32_jax import chat
from dsv32_jax.data.tokenizer import Tokenizer
from dsv32_jax.inference.engine_thread import EngineThread
from dsv32_jax.inference.requests import (
  Progress,
  QueueFull,
  Request,
  RequestTooLong,
)
from dsv32_jax.serving import errors
from dsv32_jax.serving.metrics import Metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """How the service presents itself.

  Attributes:
    model: its name in the API.
    api_key: that every request under /v1 must bring; None asks for none.
    max_body_bytes: of a request.
    default_max_tokens: new tokens where a request does not say; fewer if the
      context has no more room.
    shutdown_seconds: how long running requests may go on after a signal.
  """

  model: str
  api_key: str | None = None
  max_body_bytes: int = 8 * 2**20
  default_max_tokens: int = 4096
  shutdown_seconds: int | float = 30

  def __post_init__(self):
    for name in ('max_body_bytes', 'default_max_tokens'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'{name}: got {getattr(self, name)}, expected at least 1'
        )
    if self.shutdown_seconds < 0:
      raise ValueError(
        f'shutdown_seconds: got {self.shutdown_seconds}, expected 0 or more'
      )
    if not self.model:
      raise ValueError("model: got '', expected a name")
    key = self.api_key
    if key is not None and not (key.isascii() and key.isprintable() and key):
      # Not shown: it is somebody's secret all the same.
      raise ValueError('api_key: expected printable ASCII characters')


class Service:
  """What all requests share.

  Attributes:
    settings: how it presents itself.
    running: the engine's thread.
    tokenizer: of the model.
    controls: ids of the chat format's control strings.
    metrics: what /metrics shows.
    is_draining: whether it takes no new work.
    started: when, in seconds of the epoch.
  """

  def __init__(
    self, running: EngineThread, tokenizer: Tokenizer, settings: Settings
  ):
    self.settings = settings
    self.running = running
    self.tokenizer = tokenizer
    self.controls = chat.ControlTokens.from_tokenizer(tokenizer)
    self.metrics = Metrics(running.engine.stats)
    self.is_draining = False
    self.started = int(time.time())
    self._generations: set[Generation] = set()

  @property
  def max_tokens(self) -> int:
    return self.running.engine.max_tokens

  @property
  def num_generating(self) -> int:
    return len(self._generations)

  def room(
    self, prompt: Sequence[int], asked: int | None, *, field: str
  ) -> int:
    """New tokens for a prompt: as many as asked, or what is usual.

    Args:
      prompt: token ids.
      asked: by the request, or None.
      field: that the prompt came in.

    Raises:
      ApiError: 400, when they don't fit.
    """
    most = self.max_tokens
    new = asked or max(
      1, min(self.settings.default_max_tokens, most - len(prompt))
    )
    if len(prompt) + new > most:
      raise errors.invalid(
        field if asked is None else 'max_tokens',
        f"this model's context is {most} tokens; got {len(prompt)} of prompt "
        f'and {new} new ones',
        code='context_length_exceeded',
      )
    return new

  def generate(
    self, requests: Sequence[Request], *, begin: float
  ) -> 'Generation':
    """Submits all of them, or none.

    Args:
      requests: for the engine, on behalf of one client.
      begin: when the client asked, by `time.perf_counter`.

    Raises:
      ApiError: the queue is full (429), a request cannot be served (400), the
        service is shutting down (503) or the engine has failed (500).
    """
    if self.is_draining:
      raise errors.shutting_down()
    limit = self.running.engine.config.max_waiting
    if len(requests) > max(limit, 1):
      raise errors.invalid(
        'n',
        f'n: got {len(requests)} choices in all, expected at most {limit}, as '
        'many as may wait',
      )
    generation = Generation(self, begin)
    self._generations.add(generation)
    try:
      generation.submit(requests)
    except BaseException as error:
      generation.close()
      raise _api_error(error, self.running) from error
    return generation

  def forget(self, generation: 'Generation') -> None:
    self._generations.discard(generation)

  def begin_drain(self) -> None:
    """Takes no new work from now on."""
    self.is_draining = True

  def cancel_all(self) -> None:
    """Gives up what still runs; those who wait are told."""
    for generation in list(self._generations):
      generation.cancel()


class Generation:
  """Some requests to the engine on behalf of one client.

  The engine reports on its own thread; what it says is handed to the event loop
  that made this. `close` has to be called in the end: it cancels what has not
  ended, which frees the pages.
  """

  def __init__(self, service: Service, begin: float):
    self._service = service
    self._begin = begin
    self._loop = asyncio.get_running_loop()
    self._reports: asyncio.Queue[tuple[int, Progress]] = asyncio.Queue()
    self._tickets: list[Any] = []
    self._first: dict[int, float] = {}
    self._count: dict[int, int] = {}

  def submit(self, requests: Sequence[Request]) -> None:
    for index, request in enumerate(requests):
      self._tickets.append(
        self._service.running.submit(
          request, lambda progress, index=index: self._hand(index, progress)
        )
      )

  async def reports(self) -> AsyncIterator[list[tuple[int, Progress]]]:
    """What is new, each with the index of its request, until all have ended.

    What has gathered meanwhile comes together, to be sent together.

    Raises:
      ApiError: the engine has given up on one of them.
    """
    left = len(self._tickets)
    while left:
      gathered = [await self._reports.get()]
      while not self._reports.empty():
        gathered.append(self._reports.get_nowait())
      sound = []
      failure = None
      for index, progress in gathered:
        failure = failure or _failure(progress)
        if failure is None:
          self._measure(index, progress)
          sound.append((index, progress))
          left -= progress.finish_reason is not None
      if sound:
        yield sound
      if failure is not None:
        raise failure

  def cancel(self) -> None:
    for ticket in self._tickets:
      if not ticket.done:
        self._service.running.cancel(ticket)

  def close(self) -> None:
    """Ends what has not ended."""
    self.cancel()
    self._service.forget(self)

  def _hand(self, index: int, progress: Progress) -> None:
    """Called on the engine's thread."""
    try:
      self._loop.call_soon_threadsafe(
        self._reports.put_nowait, (index, progress)
      )
    except RuntimeError:
      # The loop has ended, and with it whoever waited.
      pass

  def _measure(self, index: int, progress: Progress) -> None:
    now = time.perf_counter()
    metrics = self._service.metrics
    if progress.tokens and index not in self._first:
      self._first[index] = now
      metrics.first_token_seconds.observe(now - self._begin)
    self._count[index] = self._count.get(index, 0) + len(progress.tokens)
    if progress.finish_reason is not None and self._count[index] > 1:
      seconds = now - self._first[index]
      metrics.token_seconds.observe(seconds / (self._count[index] - 1))


def _failure(progress: Progress) -> errors.ApiError | None:
  """What a client is told of a request that did not end by itself."""
  match progress.finish_reason:
    case 'error':
      return errors.internal(f'the engine failed: {progress.error}')
    case 'cancelled':
      # Nobody here asked for it.
      return errors.shutting_down()
  return None


def _api_error(error: BaseException, running: EngineThread) -> BaseException:
  """What a client is told of an error of `submit`."""
  match error:
    case QueueFull():
      return errors.queue_full(str(error))
    case RequestTooLong():
      return errors.invalid(None, str(error), code='context_length_exceeded')
    case ValueError():
      return errors.invalid(None, str(error))
    case RuntimeError() if not running.alive:
      return errors.internal(str(error))
  return error
