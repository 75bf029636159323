"""Saves training state while training goes on; finds it again after a crash.

One directory a stage holds `step_00000100/`, `step_00000200/` and so on. Each
is written by Orbax in the background, then sealed (see `integrity`). Training
continues from the newest one that is sealed and undamaged.

With several processes all write their parts; what concerns a directory as a
whole (room, seals, removals, which one is sound) is process 0's.
"""

import concurrent.futures
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp

from dsv32_jax.checkpoints import arrays, integrity, reading
from dsv32_jax.sharding.hosts import agreement

# Orbax's own files and the manifest, beside the arrays.
_OVERHEAD = 1 << 20


class CheckpointManager:
  """The checkpoints of one stage.

  Example:
    >>> import jax.numpy as jnp, tempfile
    >>> state = {'w': jnp.arange(3.0)}
    >>> with CheckpointManager(tempfile.mkdtemp()) as manager:
    ...   manager.save(10, state, {'stage': 'pretrain'})
    ...   manager.wait()
    ...   step, restored, extra = manager.restore_latest(state)
    >>> step, extra
    (10, {'stage': 'pretrain'})
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    *,
    keep: int = 2,
    report: reading.Report = reading.to_stderr,
  ):
    """Opens a directory of checkpoints; makes it at the first save.

    Args:
      directory: of this stage alone.
      keep: newest checkpoints to keep; at least two are, so that one is left
        when the newest turns out to be damaged.
      report: receives one line for each checkpoint that could not be used.
    """
    self.directory = pathlib.Path(directory).absolute()
    self._keep = max(keep, 2)
    self._report = report
    self._checkpointer = reading.make_checkpointer()
    # Waits for Orbax and seals: hashing a large checkpoint takes seconds.
    self._worker = concurrent.futures.ThreadPoolExecutor(1, 'seal_checkpoint')
    self._sealing: concurrent.futures.Future | None = None
    self._damaged: set[int] = set()

  def __enter__(self) -> 'CheckpointManager':
    return self

  def __exit__(self, kind: Any, *exception: Any) -> None:
    # A failed save must not hide the error that is already on its way.
    self.close(quiet=kind is not None)

  def sealed_steps(self) -> list[int]:
    """Steps of the finished checkpoints, oldest first; not verified."""
    return [
      step
      for step, path in reading.steps(self.directory)
      if integrity.is_sealed(path)
    ]

  def check_space(self, state: Any) -> None:
    """Refuses a disk that cannot hold the checkpoints to come.

    While one is written, `keep` older ones are there: a new run needs room for
    keep + 1, a resumed one for what is not there yet. Call it before compiling.

    Args:
      state: tree of arrays or shapes that will be saved.

    Raises:
      CheckpointError: with the free and the needed space.
    """
    size = arrays.num_bytes(state) + _OVERHEAD
    agreement.from_main(lambda: self._check_space(size))

  def _check_space(self, size: int) -> None:
    count = max(self._keep + 1 - len(self.sealed_steps()), 1)
    free = shutil.disk_usage(_existing_parent(self.directory)).free
    if free < count * size:
      raise reading.CheckpointError(
        f'{self.directory}: {_mb(free)} free, expected at least '
        f'{_mb(count * size)} for {count} checkpoints of {_mb(size)}'
      )

  def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
    """Starts saving; returns once the arrays may change or be donated.

    Waits for the save before it, if that is still being written.

    Args:
      step: optimizer steps done.
      state: tree of jax and numpy arrays.
      extra: what else to keep: iterator state, stage, config. Dicts, lists,
        bytes and what JSON has.

    Raises:
      CheckpointError: if the step is saved already, or this or the previous
        save fails.
    """
    self.wait()
    path = reading.path_of(self.directory, step)
    agreement.from_main(lambda: self._make_way(step))
    self._damaged.discard(step)
    leaves = arrays.named_leaves(state)
    record = {
      'step': step,
      'arrays': arrays.table(leaves),
      'extra': arrays.to_json(extra),
    }
    stored = {path: leaf for path, leaf in leaves.items() if leaf.size}
    try:
      self._checkpointer.save(
        path,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(arrays.nest(stored)),
          record=ocp.args.JsonSave(record),
        ),
      )
    except Exception as error:
      raise self._failure(step, error) from error
    self._sealing = self._worker.submit(self._finish, step)

  def _make_way(self, step: int) -> None:
    """Removes what is in the way of a save."""
    path = reading.path_of(self.directory, step)
    if path.exists():
      if integrity.is_sealed(path) and step not in self._damaged:
        raise reading.CheckpointError(
          f'{path}: exists, expected no checkpoint there'
        )
      _remove(path)
    try:
      self.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise self._failure(step, error) from error
    _remove_unfinished(self.directory)

  def poll(self) -> None:
    """Raises the error of a save that failed meanwhile; returns at once."""
    if self._sealing is not None and self._sealing.done():
      self.wait()

  def wait(self) -> None:
    """Returns when the last save is sealed.

    Raises:
      CheckpointError: if it failed.
    """
    sealing, self._sealing = self._sealing, None
    if sealing is not None:
      sealing.result()

  def close(self, *, quiet: bool = False) -> None:
    """Finishes the last save and frees the threads."""
    try:
      self.wait()
    except reading.CheckpointError as error:
      if not quiet:
        raise
      self._report(str(error))
    finally:
      self._worker.shutdown()
      self._checkpointer.close()

  def restore_latest(self, template: Any) -> reading.Restored | None:
    """Reads the newest checkpoint that is whole.

    One that was not finished, or whose files have changed, is reported and the
    one before it is read.

    Args:
      template: tree of arrays or of shapes with shardings; a jax leaf is
        restored with its sharding, a numpy leaf as numpy.

    Returns:
      The checkpoint, or None if there is none: no save of this stage ever came
      to its end.

    Raises:
      CheckpointError: if there are finished checkpoints but all are damaged.
      ValueError: if it does not fit the template; nothing is read then.
    """
    path, damaged = reading.newest_sound(
      self.directory,
      self._report,
      without='there is no earlier one, the stage starts at step 0',
    )
    self._damaged |= damaged
    if path is None:
      return None
    return reading.restore(self._checkpointer, path, template, partial=())

  def _finish(self, step: int) -> None:
    """Waits for Orbax' commit, seals, and removes what is no longer needed."""
    path = reading.path_of(self.directory, step)
    try:
      self._checkpointer.wait_until_finished()
      if agreement.is_main():
        integrity.seal(path)
    except Exception as error:
      raise self._failure(step, error) from error
    if agreement.is_main():
      self._prune()

  def _prune(self) -> None:
    sound = [s for s in self.sealed_steps() if s not in self._damaged]
    for step, path in reading.steps(self.directory):
      if step < sound[-1] and step not in sound[-self._keep :]:
        _remove(path)
        self._damaged.discard(step)
    _remove_unfinished(self.directory)

  def _failure(self, step: int, error: Exception) -> reading.CheckpointError:
    """One line on a failed save; makes room by removing what it left."""
    path = reading.path_of(self.directory, step)
    free = shutil.disk_usage(_existing_parent(self.directory)).free
    if agreement.is_main():
      if not integrity.is_sealed(path):
        shutil.rmtree(path, ignore_errors=True)
      _remove_unfinished(self.directory)
    steps = self.sealed_steps()
    left = f'step {steps[-1]} is intact' if steps else 'there is no earlier one'
    return reading.CheckpointError(
      f'{path}: could not be saved ({_reason(error)}; {_mb(free)} free); {left}'
    )


def _remove(path: pathlib.Path) -> None:
  """Removes a checkpoint; one half removed does not look sealed."""
  (path / integrity.MANIFEST).unlink(missing_ok=True)
  shutil.rmtree(path)


def _remove_unfinished(directory: pathlib.Path) -> None:
  """Removes what Orbax left of interrupted saves; call it between saves."""
  for path in directory.glob('step_*.orbax-checkpoint-tmp*'):
    shutil.rmtree(path, ignore_errors=True)


def _existing_parent(path: pathlib.Path) -> pathlib.Path:
  return next(p for p in (path, *path.parents) if p.exists())


def _reason(error: BaseException) -> str:
  """One line on an error of Orbax, tensorstore or the system."""
  text = ' '.join(str(error).split()) or type(error).__name__
  # The cause stands at the end, after the names of all layers above it.
  return text if len(text) <= 160 else f'... {text[-160:]}'


def _mb(size: int) -> str:
  return f'{size / 1e6:,.1f} MB'
