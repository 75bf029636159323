"""A thread that runs an engine, for programs that serve requests meanwhile."""

import threading
import traceback
from collections.abc import Callable
from typing import Any

from dsv32_jax.inference.engine import Engine
from dsv32_jax.inference.requests import Progress, Request
from dsv32_jax.inference.tickets import Ticket


class EngineThread:
  """Steps an engine while there is work, and sleeps else.

  Example:
    >>> with EngineThread(engine) as running:
    ...   print(running.submit(request).result().tokens)

  Attributes:
    engine: the engine; only its `stats` may be called beside this.
    error: what stopped the thread, or None.
  """

  def __init__(self, engine: Engine):
    self.engine = engine
    self.error: str | None = None
    self._work = threading.Event()
    self._gate = threading.Lock()
    self._closing = False
    self._thread = threading.Thread(
      target=self._run, name='engine', daemon=True
    )

  @property
  def alive(self) -> bool:
    """Whether requests are being served."""
    return self._thread.is_alive() and not self._closing

  def start(self) -> None:
    """Begins to serve."""
    self._thread.start()

  def submit(
    self,
    request: Request,
    on_progress: Callable[[Progress], None] | None = None,
  ) -> Ticket:
    """See `Engine.submit`.

    Raises:
      RuntimeError: the thread has ended, with the reason.
    """
    # What is submitted before the end begins is ended with the rest.
    with self._gate:
      if not self.alive:
        raise RuntimeError(
          f'the engine does not run: {self.error or "it was closed"}'
        )
      ticket = self.engine.submit(request, on_progress)
    self._work.set()
    return ticket

  def cancel(self, ticket: Ticket) -> None:
    """See `Engine.cancel`."""
    self.engine.cancel(ticket)
    self._work.set()

  def close(self, timeout: int | float | None = None) -> None:
    """Cancels what runs and ends the thread."""
    self._begin_end()
    if self._thread.is_alive():
      self._thread.join(timeout)

  def __enter__(self) -> 'EngineThread':
    self.start()
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  def _run(self) -> None:
    try:
      while not self._closing:
        # Cleared first: what is submitted while a round runs sets it again.
        self._work.clear()
        if not self.engine.step():
          self._work.wait()
    except Exception as error:
      # The device's memory may be lost: better no answer than a wrong one.
      traceback.print_exc()
      self.error = f'{type(error).__name__}: {error}'.splitlines()[0]
      self._begin_end()
      self.engine.fail(self.error)
    else:
      self.engine.close()

  def _begin_end(self) -> None:
    with self._gate:
      self._closing = True
    self._work.set()
