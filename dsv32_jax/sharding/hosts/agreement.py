"""What processes agree on: who goes first, what holds, when to stop.

Everything here goes through the coordination service that
`jax.distributed.initialize` starts, not through the devices, so that it neither
compiles anything nor takes part in the order of the devices' collectives. All
processes call these functions in the same order. With one process they do what
the name says, at once.
"""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

# The public functions of jax.experimental.multihost_utils sum over the devices
# instead; Orbax takes its barriers from the same place.
from jax._src import distributed
from jax.experimental import multihost_utils

_INTERRUPTS = (signal.SIGTERM, signal.SIGINT)
# A lost process ends the job by itself (see `hosts`), so that a wait for a slow
# one (reading a large corpus, writing a report) needs no limit of its own.
_FOREVER_MS = 7 * 24 * 3600 * 1000
_calls = 0
_sync_points = 0
_must_stop = False


class MainProcessError(RuntimeError):
  """Process 0 failed, with this message, at what the others wait for."""


def process() -> tuple[int, int]:
  """This process's number and how many there are; asks no device."""
  state = distributed.global_state
  return state.process_id, state.num_processes


def is_main() -> bool:
  """Whether this is the process that prints and writes: number 0."""
  return process()[0] == 0


def is_alone() -> bool:
  """Whether there is no other process."""
  return process()[1] == 1


def barrier(name: str) -> None:
  """Returns when every process has come here.

  Args:
    name: for error messages.
  """
  if not is_alone():
    _client().wait_at_barrier(_key(name), _FOREVER_MS)


def from_main(make: Callable[[], Any]) -> Any:
  """The result of a function that only process 0 calls.

  Args:
    make: takes nothing; returns what JSON can hold (tuples become lists).

  Returns:
    Its result, on every process; not before it is there.

  Raises:
    MainProcessError: on the other processes, if it raises on process 0.
  """
  if is_alone():
    return json.loads(json.dumps(make()))
  key = _key('from_main')
  if not is_main():
    answer = json.loads(_client().blocking_key_value_get(key, _FOREVER_MS))
    if 'error' in answer:
      raise MainProcessError(answer['error'])
    return answer['value']
  try:
    value = json.loads(json.dumps(make()))
  except BaseException as error:
    text = str(error) or type(error).__name__
    _client().key_value_set(key, json.dumps({'error': text}))
    raise
  _client().key_value_set(key, json.dumps({'value': value}))
  return value


def check_same(what: str, value: str) -> None:
  """Refuses processes that differ where they must not.

  Args:
    what: the value's name.
    value: of this process.

  Raises:
    ValueError: on a process whose value is not process 0's.
  """
  main = from_main(lambda: value)
  if value != main:
    raise ValueError(
      f'{what}: got {value!r} in process {process()[0]}, expected '
      f'{main!r} as in process 0 (all processes need the same command, files '
      'and versions)'
    )


def all_failed(text: str | None, *, wait_s: float) -> bool:
  """Whether every process fails, and process 0 with the same message.

  Args:
    text: what this process would say; None for "whatever process 0 says".
    wait_s: how long to wait for the others to fail too.
  """
  key = 'dsv32_jax/failed'
  try:
    if is_main():
      _client().key_value_set(key, text or '')
    _client().wait_at_barrier(key, int(1000 * wait_s))
    said = _client().blocking_key_value_get(key, 1000)
    if is_main():
      # The others' connection ends with this process; let them go first.
      time.sleep(0.5)
    return text is None or said == text
  except RuntimeError:
    return False


class Interrupts:
  """Tells the training loop that it is to save and stop.

  One process notes SIGTERM and SIGINT. Of several, any may get the signal
  (schedulers warn some or all of a job's processes before they end them), and
  jax's preemption service lets all agree on the same step, a few steps later.
  """

  def __init__(self):
    self._received: list[int] = []

  def check(self) -> int | None:
    """The signal to stop for; every process asks once a step."""
    global _sync_points, _must_stop
    if is_alone():
      return self._received[0] if self._received else None
    # Numbers must rise through all stages of a run. A sync point is announced
    # once; it may fall on the last step of a stage.
    _sync_points += 1
    if multihost_utils.reached_preemption_sync_point(_sync_points):
      _must_stop = True
    return signal.SIGTERM if _must_stop else None

  def note(self, number: int) -> None:
    if is_alone():
      self._received.append(number)
    else:
      # What the preemption service listens to.
      os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def interrupts() -> Iterator[Interrupts]:
  """Collects SIGTERM and SIGINT.

  With one process the second signal of a kind acts as usual. With several,
  SIGINT counts as SIGTERM.
  """
  found = Interrupts()
  if threading.current_thread() is not threading.main_thread():
    yield found
    return
  # With several processes SIGTERM belongs to jax's preemption service.
  several = not is_alone()
  numbers = (signal.SIGINT,) if several else _INTERRUPTS
  previous = {number: signal.getsignal(number) for number in numbers}

  def note(number: int, _: Any) -> None:
    found.note(number)
    if not several:
      signal.signal(number, previous[signal.Signals(number)])

  for number in numbers:
    signal.signal(number, note)
  try:
    yield found
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


def _client() -> Any:
  client = distributed.global_state.client
  if client is None:
    raise RuntimeError('jax.distributed has not been started')
  return client


def _key(name: str) -> str:
  """A name of its own for each call, the same on all processes."""
  global _calls
  _calls += 1
  return f'dsv32_jax/{_calls}/{name}'
