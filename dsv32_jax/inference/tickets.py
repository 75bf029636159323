"""The handle of a request that was given to an engine."""

import threading
from collections.abc import Callable

from dsv32_jax.inference.requests import Completion, Progress, Request


class Ticket:
  """One submitted request.

  Attributes:
    id: counts from 0.
    request: what was asked.
  """

  def __init__(
    self,
    number: int,
    request: Request,
    on_progress: Callable[[Progress], None] | None,
  ):
    self.id = number
    self.request = request
    self._on_progress = on_progress
    self._ended = threading.Event()
    self._completion: Completion | None = None

  @property
  def done(self) -> bool:
    return self._ended.is_set()

  def result(self, timeout: int | float | None = None) -> Completion:
    """Waits for the end; the engine must be run meanwhile, or have been.

    Raises:
      TimeoutError: it has not ended in so many seconds.
    """
    if not self._ended.wait(timeout):
      raise TimeoutError(f'request {self.id} has not ended in {timeout} s')
    assert self._completion is not None
    return self._completion

  def report(self, progress: Progress) -> None:
    """For the engine: passes on what is new."""
    if self._on_progress is not None:
      self._on_progress(progress)

  def end(self, completion: Completion) -> None:
    """For the engine: nothing follows."""
    self._completion = completion
    self._ended.set()
