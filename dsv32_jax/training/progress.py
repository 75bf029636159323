"""Live progress on the terminal: a bar where there is one, lines elsewhere."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import rich.console
import rich.progress

_SHOWN = (
  ('loss', 'loss/lm'),
  ('KL', 'loss/indexer_kl'),
)


@runtime_checkable
class Display(Protocol):
  """Where a run's progress is shown."""

  def update(self, step: int, values: Mapping[str, Any]) -> None: ...

  def close(self) -> None: ...


def open_display(
  *,
  title: str,
  step: int,
  total_steps: int,
  stream: Any = None,
) -> Display:
  """A bar if the text stream (None: stdout) is a terminal, else lines."""
  stream = sys.stdout if stream is None else stream
  kind = Bar if stream.isatty() else Lines
  return kind(title=title, step=step, total_steps=total_steps, stream=stream)


class Bar:
  """One line that is drawn again and again."""

  def __init__(self, *, title: str, step: int, total_steps: int, stream: Any):
    self._progress = rich.progress.Progress(
      rich.progress.TextColumn('{task.description}'),
      rich.progress.BarColumn(bar_width=20),
      rich.progress.MofNCompleteColumn(),
      rich.progress.TextColumn('{task.fields[shown]}'),
      console=rich.console.Console(file=stream),
    )
    self._eta = _Eta(total_steps)
    self._task = self._progress.add_task(
      title, total=total_steps, completed=step, shown='compiling'
    )
    self._progress.start()

  def update(self, step: int, values: Mapping[str, Any]) -> None:
    self._progress.update(
      self._task,
      completed=step,
      shown=describe(values, self._eta(step, values)),
    )

  def close(self) -> None:
    self._progress.stop()


class Lines:
  """A line at the first step, every few seconds and at the last step."""

  def __init__(
    self,
    *,
    title: str,
    step: int,
    total_steps: int,
    stream: Any,
    every_s: float = 5.0,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._title = title
    self._total = total_steps
    self._stream = stream
    self._every = every_s
    self._clock = clock
    self._eta = _Eta(total_steps)
    self._last: float | None = None

  def update(self, step: int, values: Mapping[str, Any]) -> None:
    eta = self._eta(step, values)
    now = self._clock()
    is_due = self._last is None or now - self._last >= self._every
    if is_due or step == self._total:
      self._last = now
      print(
        f'{self._title} {step}/{self._total} {describe(values, eta)}'.strip(),
        file=self._stream,
        flush=True,
      )

  def close(self) -> None:
    pass


def describe(values: Mapping[str, Any], eta_s: float | None) -> str:
  """Loss, KL, tokens/s and time left, as far as they are known."""
  parts = [
    f'{label} {values[key]:.4f}' for label, key in _SHOWN if key in values
  ]
  if 'time/tokens_per_s' in values:
    parts.append(f'{values["time/tokens_per_s"]:,.0f} tokens/s')
  if eta_s is not None:
    minutes, seconds = divmod(round(eta_s), 60)
    hours, minutes = divmod(minutes, 60)
    parts.append(f'ETA {hours}:{minutes:02}:{seconds:02}')
  return '  '.join(parts)


class _Eta:
  """Time left, from a running mean of the steps' times."""

  def __init__(self, total_steps: int):
    self._total = total_steps
    self._mean: float | None = None

  def __call__(self, step: int, values: Mapping[str, Any]) -> float | None:
    taken = values.get('time/step_s')
    if taken is not None:
      self._mean = (
        taken if self._mean is None else 0.95 * self._mean + 0.05 * taken
      )
    if self._mean is None:
      return None
    return self._mean * max(self._total - step, 0)
