"""Live progress of an RL run: what it is doing now, and how it is going."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import rich.console
import rich.progress

_SHOWN = (
  ('reward', 'reward/mean', '.3f'),
  ('length', 'rollout/length', '.1f'),
  ('entropy', 'entropy', '.3f'),
  ('KL', 'kl/all', '.4f'),
  ('pass@1', 'eval/pass@1', '.3f'),
)
_LINE_EVERY_S = 5.0


class Board:
  """Steps of the whole run, and responses of the phase that it is in.

  A bar each on a terminal; elsewhere a line every few seconds. It is a
  `training.progress.Display`.
  """

  def __init__(
    self,
    *,
    title: str,
    step: int,
    total_steps: int,
    stream: Any = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Shows a run that continues after `step`.

    Args:
      title: of the run.
      step: steps done.
      total_steps: at which it ends.
      stream: where to; None is stdout.
      clock: tells seconds.
    """
    self._stream = sys.stdout if stream is None else stream
    self._title = title
    self._first, self._step, self._total = step, step, total_steps
    self._clock = clock
    self._began = clock()
    self._last: float | None = None
    self._values: dict[str, float] = {}
    self._bars = None
    if self._stream.isatty():
      self._bars = _Bars(title, step, total_steps, self._stream)

  def phase(self, name: str, done: int, total: int) -> None:
    """Shows what is being done: rollouts, evaluations."""
    if self._bars is not None:
      self._bars.phase(name, done, total)
    elif self._is_due():
      self._print(f'{name} {done}/{total}')

  def update(self, step: int, values: Mapping[str, Any]) -> None:
    """Shows a step that was taken; numbers that it lacks stay as they were."""
    self._step = step
    self._values.update(
      {key: values[key] for _, key, _ in _SHOWN if key in values}
    )
    if self._bars is not None:
      self._bars.step(step, self._described())
    elif self._is_due() or step == self._total:
      self._print(self._described())

  def close(self) -> None:
    if self._bars is not None:
      self._bars.close()

  def _is_due(self) -> bool:
    now = self._clock()
    if self._last is not None and now - self._last < _LINE_EVERY_S:
      return False
    self._last = now
    return True

  def _print(self, text: str) -> None:
    line = f'{self._title} {self._step}/{self._total} {text}'
    print(line.strip(), file=self._stream, flush=True)

  def _described(self) -> str:
    parts = [
      f'{label} {self._values[key]:{form}}'
      for label, key, form in _SHOWN
      if key in self._values
    ]
    done = self._step - self._first
    if done > 0:
      left = (self._clock() - self._began) / done * (self._total - self._step)
      minutes, seconds = divmod(round(left), 60)
      hours, minutes = divmod(minutes, 60)
      parts.append(f'ETA {hours}:{minutes:02}:{seconds:02}')
    return '  '.join(parts)


class _Bars:
  """Two lines that are drawn again and again."""

  def __init__(self, title: str, step: int, total: int, stream: Any):
    self._progress = rich.progress.Progress(
      rich.progress.TextColumn('{task.description}'),
      rich.progress.BarColumn(bar_width=20),
      rich.progress.MofNCompleteColumn(),
      rich.progress.TextColumn('{task.fields[shown]}'),
      console=rich.console.Console(file=stream),
    )
    self._steps = self._progress.add_task(
      title, total=total, completed=step, shown=''
    )
    self._phase = self._progress.add_task('', total=None, shown='')
    self._progress.start()

  def step(self, step: int, shown: str) -> None:
    self._progress.update(self._steps, completed=step, shown=shown)

  def phase(self, name: str, done: int, total: int) -> None:
    self._progress.update(
      self._phase, description=name, completed=done, total=total
    )

  def close(self) -> None:
    self._progress.stop()
