"""Progress of a long transfer: bytes done, rate and time left."""

import sys
import time
from collections.abc import Callable
from typing import Any

import rich.console
import rich.progress

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and what is worked on."""


class Display:
  """A bar where the stream is a terminal, a line every few seconds elsewhere.

  Example:
    >>> import io
    >>> stream = io.StringIO()
    >>> with Display('import', stream=stream) as display:
    ...   display(10**9, 10**9, 'model-00001-of-00001.safetensors')
    >>> stream.getvalue().split()[:3]
    ['import', '1.00/1.00', 'GB']
  """

  def __init__(
    self,
    title: str,
    *,
    stream: Any = None,
    every_s: float = 5.0,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Shows nothing until it is called.

    Args:
      title: what is done.
      stream: text stream; None is stderr.
      every_s: between two lines.
      clock: seconds.
    """
    self._title = title
    self._stream = sys.stderr if stream is None else stream
    self._every = every_s
    self._clock = clock
    self._begin: float | None = None
    self._total = 0
    self._first = 0
    self._last: float | None = None
    self._bar: rich.progress.Progress | None = None

  def __enter__(self) -> 'Display':
    return self

  def __exit__(self, *exception: Any) -> None:
    self.close()

  def close(self) -> None:
    if self._bar is not None:
      self._bar.stop()
      self._bar = None

  def __call__(self, done: int, total: int, what: str) -> None:
    """Shows a state; the first call counts as the start, as does a new total.

    Args:
      done: bytes.
      total: bytes.
      what: file or tensor that is worked on.
    """
    now = self._clock()
    if self._begin is None or total != self._total:
      self._begin, self._first, self._total = now, done, total
      self._last = None
      self.close()
    if self._stream.isatty():
      self._draw(done, total, what)
      return
    is_due = self._last is None or now - self._last >= self._every
    if is_due or done == total:
      self._last = now
      text = describe(done, total, done - self._first, now - self._begin)
      print(f'{self._title} {text}  {what}', file=self._stream, flush=True)

  def _draw(self, done: int, total: int, what: str) -> None:
    if self._bar is None:
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn('{task.description}'),
        rich.progress.BarColumn(bar_width=20),
        rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(),
        rich.progress.TextColumn('ETA'),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn('{task.fields[what]}'),
        console=rich.console.Console(file=self._stream),
      )
      self._bar.add_task(self._title, total=total, what=what)
      self._bar.start()
    self._bar.update(
      self._bar.task_ids[0], completed=done, total=total, what=what
    )


def describe(done: int, total: int, moved: int, seconds: float) -> str:
  """Bytes, rate and time left, as far as they are known.

  Args:
    done: bytes done, those of an earlier session too.
    total: bytes in all.
    moved: bytes done in this session.
    seconds: that it has taken.
  """
  text = f'{done / 1e9:.2f}/{total / 1e9:.2f} GB'
  if seconds > 0 and moved > 0:
    rate = moved / seconds
    minutes, seconds_left = divmod(round((total - done) / rate), 60)
    hours, minutes = divmod(minutes, 60)
    text += f'  {rate / 1e6:.0f} MB/s'
    text += f'  ETA {hours}:{minutes:02}:{seconds_left:02}'
  return text
