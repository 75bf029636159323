"""Finds the checkpoint to read, checks it, and reads all or part of it."""

import dataclasses
import json
import logging
import os
import pathlib
import re
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dsv32_jax.checkpoints import arrays, integrity
from dsv32_jax.sharding.hosts import agreement

Report = Callable[[str], None]

_NAME = re.compile(r'step_(\d{8,})')


class CheckpointError(RuntimeError):
  """A checkpoint could not be written or read; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Restored:
  """What a checkpoint held.

  Attributes:
    step: optimizer steps done when it was saved.
    state: the tree, arrays placed as in the template.
    extra: the dict given to `save`; tuples in it are lists now.
    kept: names of template arrays that the checkpoint does not have and that
      `load_params` was allowed to keep.
  """

  step: int
  state: Any
  extra: dict
  kept: tuple[str, ...] = ()

  def __iter__(self):
    return iter((self.step, self.state, self.extra))


def to_stderr(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def load_params(
  path: str | os.PathLike,
  template: Mapping[str, Any],
  *,
  partial: Collection[str] = (),
  report: Report = to_stderr,
) -> Restored:
  """Reads some of a checkpoint's trees, to start another stage from.

  Args:
    path: a stage's directory or its checkpoints' (the newest sound one is
      taken), or one checkpoint.
    template: {name in the saved state: tree}, for example `params` and
      `router_bias`; leaves as in `CheckpointManager.restore_latest`.
    partial: names whose arrays may differ in number, for optimizer states of
      stages that train other groups: an array that the checkpoint does not have
      keeps the template's value (so give arrays there, not shapes) and is
      listed in `Restored.kept`; one that the template does not have is left.
    report: receives one line for each checkpoint that could not be used.

  Returns:
    A `Restored` whose `state` is a dict like `template`.

  Raises:
    CheckpointError: if there is no checkpoint, or none that is undamaged.
    ValueError: if an array has another shape, is missing or is unknown; nothing
      is read then.
  """
  found = _find(pathlib.Path(path).absolute(), report)
  checkpointer = make_checkpointer()
  try:
    return restore(
      checkpointer, found, template, partial=partial, only=tuple(template)
    )
  finally:
    checkpointer.close()


def read_extra(
  path: str | os.PathLike, *, report: Report = to_stderr
) -> tuple[int, dict]:
  """Step and `extra` of the checkpoint that `load_params` would read.

  Raises:
    CheckpointError: if there is no checkpoint, or none that is undamaged.
  """
  record = _read_record(_find(pathlib.Path(path).absolute(), report))
  return record['step'], arrays.from_json(record['extra'])


def make_checkpointer() -> ocp.AsyncCheckpointer:
  """For checkpoints of two parts: the arrays, and a JSON file about them."""
  # Orbax logs the tracebacks of errors that it also raises.
  logging.getLogger('absl').addFilter(_is_no_orbax_traceback)
  return ocp.AsyncCheckpointer(
    ocp.CompositeCheckpointHandler(
      state=ocp.PyTreeCheckpointHandler(), record=ocp.JsonCheckpointHandler()
    )
  )


def _is_no_orbax_traceback(record: logging.LogRecord) -> bool:
  return record.exc_info is None or 'orbax' not in record.pathname


def restore(
  checkpointer: ocp.AsyncCheckpointer,
  path: pathlib.Path,
  template: Any,
  *,
  partial: Collection[str],
  only: Collection[str] | None = None,
) -> Restored:
  """Checks the names and shapes of a sound checkpoint, then reads it."""
  record = _read_record(path)
  stored: arrays.Table = {
    name: (tuple(shape), dtype)
    for name, (shape, dtype) in record['arrays'].items()
    if only is None or name.split('/')[0] in only
  }
  leaves = arrays.named_leaves(template)
  expected = arrays.table(leaves)
  kept = tuple(
    name
    for name in expected
    if name not in stored and name.split('/')[0] in partial
  )
  arrays.refuse_mismatch(
    {
      name: entry
      for name, entry in stored.items()
      if name in expected or name.split('/')[0] not in partial
    },
    {name: entry for name, entry in expected.items() if name not in kept},
    where=str(path),
  )
  wanted = {
    place: leaf
    for place, leaf in leaves.items()
    if leaf.size and arrays.name_of(place) not in kept
  }
  restored: dict = {}
  if wanted:
    tree = arrays.nest(wanted)
    # Arrays that the template does not name stay unread.
    found = checkpointer.restore(
      path,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeRestore(
          tree,
          restore_args=jax.tree.map(_restore_args, tree),
          partial_restore=True,
        )
      ),
    )
    restored = arrays.flatten(found['state'])
  return Restored(
    step=record['step'],
    state=jax.tree.unflatten(
      jax.tree.structure(template),
      [restored.get(place, leaf) for place, leaf in leaves.items()],
    ),
    extra=arrays.from_json(record['extra']),
    kept=kept,
  )


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
  if isinstance(leaf, np.ndarray):
    return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
  sharding = leaf.sharding
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return ocp.ArrayRestoreArgs(
    restore_type=jax.Array,
    sharding=sharding,
    global_shape=leaf.shape,
    dtype=leaf.dtype,
  )


def _read_record(path: pathlib.Path) -> dict:
  return json.loads((path / 'record' / 'metadata').read_text(encoding='utf-8'))


def path_of(directory: pathlib.Path, step: int) -> pathlib.Path:
  """Where the checkpoint of a step is."""
  return directory / f'step_{step:08d}'


def steps(directory: pathlib.Path) -> list[tuple[int, pathlib.Path]]:
  """All committed checkpoints, sealed or not, oldest first."""
  if not directory.is_dir():
    return []
  return sorted(
    (int(match[1]), path)
    for path in directory.iterdir()
    if (match := _NAME.fullmatch(path.name)) and path.is_dir()
  )


def _find(path: pathlib.Path, report: Report) -> pathlib.Path:
  """The checkpoint meant by a path that a user gives."""
  if _NAME.fullmatch(path.name):
    if not path.is_dir():
      raise CheckpointError(f'{path}: not found, expected a checkpoint')
    bad = agreement.from_main(lambda: _problem(path))
    if bad is not None:
      raise CheckpointError(f'{path}: {bad}')
    return path
  directory = path if steps(path) else path / 'checkpoints'
  found, _ = newest_sound(directory, report, without='there is no earlier one')
  if found is None:
    raise CheckpointError(f'{path}: no finished checkpoint there, expected one')
  return found


def _problem(path: pathlib.Path) -> str | None:
  if not integrity.is_sealed(path):
    return 'unfinished (its save was interrupted)'
  bad = integrity.damage(path)
  return None if bad is None else f'damaged: {bad}'


def newest_sound(
  directory: pathlib.Path, report: Report, *, without: str
) -> tuple[pathlib.Path | None, set[int]]:
  """The newest undamaged checkpoint, and the damaged steps after it.

  Process 0 reads the files, and tells the others what it found: all restore the
  same step. `without` says in the report what follows if there is none.
  """

  def find() -> tuple[str | None, list[int]]:
    found, damaged = _newest_sound(directory, report, without)
    return None if found is None else str(found), sorted(damaged)

  path, damaged = agreement.from_main(find)
  return None if path is None else pathlib.Path(path), set(damaged)


def _newest_sound(
  directory: pathlib.Path, report: Report, without: str
) -> tuple[pathlib.Path | None, set[int]]:
  problems: list[tuple[pathlib.Path, str]] = []
  damaged: set[int] = set()
  found = None
  for step, path in reversed(steps(directory)):
    bad = _problem(path)
    if bad is None:
      found = path
      break
    problems.append((path, bad))
    if integrity.is_sealed(path):
      damaged.add(step)
  if found is None and damaged:
    listed = '; '.join(f'{path.name} {bad}' for path, bad in problems)
    raise CheckpointError(
      f'{directory}: no checkpoint can be used: {listed}. Remove the directory '
      'to start this stage again'
    )
  instead = without if found is None else f'{found.name} is used instead'
  for path, bad in problems:
    report(f'checkpoint {path} is {bad}; {instead}')
  return found, damaged
