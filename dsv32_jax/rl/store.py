"""Rollout batches on disk: a run that was killed finds them as they were.

A batch is written under another name, sealed with the digests of its files
(`checkpoints.integrity`) and renamed: it is there whole or not at all.

    <directory>/batch_00000012/           a whole batch
      groups.json                         problems, rewards, texts of no one
      arrays.npz                          tokens and what sampling recorded
    <directory>/batch_00000012_part_003/  prompts of a batch that is not whole
"""

import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsv32_jax.checkpoints import integrity
from dsv32_jax.rl.types import Group, Response, Scored

_GROUPS = 'groups.json'
_ARRAYS = 'arrays.npz'
_ALL = -1  # Length of a kept set that is the whole vocabulary.


class RolloutStore:
  """Sealed rollout batches of one run."""

  def __init__(self, directory: str | os.PathLike):
    self.directory = pathlib.Path(directory)

  def save(
    self, name: str, groups: Sequence[Group], extra: Mapping[str, Any]
  ) -> None:
    """Writes groups with facts about them; replaces nothing that is whole.

    Args:
      name: of the batch or part.
      groups: as they were scored.
      extra: JSON values.
    """
    path = self.directory / name
    if self.is_whole(name):
      return
    temporary = path.with_name(f'{name}.tmp')
    for old in (temporary, path):
      shutil.rmtree(old, ignore_errors=True)
    temporary.mkdir(parents=True)
    record, arrays = _flat(groups)
    content = {'groups': record, 'extra': dict(extra)}
    (temporary / _GROUPS).write_text(json.dumps(content), encoding='utf-8')
    with open(temporary / _ARRAYS, 'wb') as file:
      np.savez(file, **arrays)  # pyrefly: ignore
    for file_path in temporary.iterdir():
      _sync(file_path)
    integrity.seal(temporary)
    os.replace(temporary, path)
    _sync(self.directory)

  def load(self, name: str) -> tuple[list[Group], dict] | None:
    """What `save` was given; None if it is not there whole."""
    path = self.directory / name
    if not self.is_whole(name):
      return None
    content = json.loads((path / _GROUPS).read_text(encoding='utf-8'))
    with np.load(path / _ARRAYS) as arrays:
      groups = _nested(content['groups'], dict(arrays))
    return groups, content['extra']

  def is_whole(self, name: str) -> bool:
    """Whether `save` came to its end and nothing has changed since."""
    path = self.directory / name
    return integrity.is_sealed(path) and integrity.damage(path) is None

  def remove(self, name: str) -> None:
    """Removes a batch or part; half removed it does not look whole."""
    path = self.directory / name
    (path / integrity.MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)

  def prune(self, *, before: int) -> None:
    """Removes batches with lower numbers, their parts, and what was cut short.

    Args:
      before: the first batch that may still be needed.
    """
    if not self.directory.is_dir():
      return
    for path in self.directory.glob('batch_*'):
      number = path.name.removeprefix('batch_')[:8]
      if path.name.endswith('.tmp') or int(number) < before:
        self.remove(path.name)


def batch_name(number: int) -> str:
  """Name of a whole batch, counted from 0."""
  return f'batch_{number:08d}'


def part_name(number: int, part: int) -> str:
  """Name of a part of a batch."""
  return f'{batch_name(number)}_part_{part:03d}'


def _sync(path: pathlib.Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _flat(
  groups: Sequence[Group],
) -> tuple[list[dict], dict[str, np.ndarray]]:
  """JSON values, and arrays of all responses end to end."""
  record, arrays = [], {}
  number = 0
  for group in groups:
    scored_record = []
    for scored in group.responses:
      response = scored.response
      scored_record.append(
        {
          'reward': float(scored.reward),
          'components': {k: float(v) for k, v in scored.components.items()},
          'finish_reason': response.finish_reason,
          'temperature': response.temperature,
          'weight_version': response.weight_version,
        }
      )
      for name, array in _arrays_of(response).items():
        arrays[f'{number}/{name}'] = array
      number += 1
    record.append(
      {
        'problem': group.problem,
        'domain': group.domain,
        'mode': group.mode,
        'responses': scored_record,
      }
    )
  return record, _joined(arrays, number)


_PLAIN = ('tokens', 'is_policy', 'sampling_logprobs')
_RECORDED = ('experts', 'selected')


def _arrays_of(response: Response) -> dict[str, np.ndarray]:
  found = {name: getattr(response, name) for name in _PLAIN}
  for name in _RECORDED:
    array = getattr(response, name)
    if array is not None:
      found[name] = _narrow(array)
  if response.kept is not None:
    found['kept_length'] = np.array(
      [_ALL if ids is None else len(ids) for ids in response.kept], np.int32
    )
    ids = [ids for ids in response.kept if ids is not None]
    found['kept'] = np.concatenate([np.zeros(0, np.int32), *ids])
  return found


def _narrow(array: np.ndarray) -> np.ndarray:
  """Experts and places in the smallest type that holds them."""
  low, high = (array.min(), array.max()) if array.size else (0, 0)
  for dtype in (np.int8, np.int16):
    info = np.iinfo(dtype)
    if info.min <= low and high <= info.max:
      return array.astype(dtype)
  return array.astype(np.int32)


def _joined(arrays: dict[str, np.ndarray], count: int) -> dict:
  """One array a name: thousands of small ones would make the file slow."""
  joined: dict[str, np.ndarray] = {}
  for name in sorted({key.split('/', 1)[1] for key in arrays}):
    parts = [arrays.get(f'{i}/{name}') for i in range(count)]
    there = [part for part in parts if part is not None]
    # Trailing dims differ where tables were of different widths.
    shapes = [[-1 if p is None else p.shape[0], *_tail(p)] for p in parts]
    joined[f'{name}/shape'] = np.array(shapes, np.int32)
    joined[name] = np.concatenate([part.reshape(-1) for part in there])
  return joined


def _tail(part: np.ndarray | None) -> list[int]:
  """The dims behind the first, as two numbers."""
  dims = [] if part is None else list(part.shape[1:])
  return [*dims, 0, 0][:2]


def _split(arrays: Mapping[str, np.ndarray], name: str) -> list:
  parts, start = [], 0
  for first, *tail in arrays[f'{name}/shape'].tolist():
    dims = [size for size in tail if size]
    if first < 0:
      parts.append(None)
      continue
    size = first
    for dim in dims:
      size *= dim
    parts.append(arrays[name][start : start + size].reshape(first, *dims))
    start += size
  return parts


def _nested(record: list[dict], arrays: dict) -> list[Group]:
  """Undoes `_flat`."""
  count = sum(len(group['responses']) for group in record)
  columns = {
    name: _split(arrays, name)
    for name in (*_PLAIN, *_RECORDED, 'kept', 'kept_length')
    if name in arrays
  }
  responses = iter(
    _response({name: column[i] for name, column in columns.items()})
    for i in range(count)
  )
  return [
    Group(
      problem=group['problem'],
      domain=group['domain'],
      mode=group['mode'],
      responses=tuple(
        Scored(
          response=Response(
            finish_reason=one['finish_reason'],
            temperature=one['temperature'],
            weight_version=one['weight_version'],
            **next(responses),
          ),
          reward=one['reward'],
          components=one['components'],
        )
        for one in group['responses']
      ),
    )
    for group in record
  ]


def _response(columns: dict) -> dict:
  found = {name: columns[name] for name in _PLAIN}
  for name in _RECORDED:
    array = columns.get(name)
    found[name] = None if array is None else array.astype(np.int32)
  lengths, ids = columns.get('kept_length'), columns.get('kept')
  if lengths is not None and ids is not None:
    kept, start = [], 0
    for length in lengths.tolist():
      kept.append(None if length == _ALL else ids[start : start + length])
      start += max(length, 0)
    found['kept'] = tuple(kept)
  return found
