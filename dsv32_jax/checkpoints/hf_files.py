"""The safetensors files of a Hugging Face checkpoint directory.

A file is eight bytes with the length of its header, the header (JSON: dtype,
shape and place of every tensor), and the tensors' bytes. Headers are read and
checked at once, bytes only when asked for and only those asked for, with plain
reads: pages of a mapped file would count as this process's memory.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
import types
from typing import Any

import ml_dtypes
import numpy as np

INDEX = 'model.safetensors.index.json'
# Those that a weight or its scale can have.
DTYPES = types.MappingProxyType(
  {
    'F32': np.dtype(np.float32),
    'F16': np.dtype(np.float16),
    'BF16': np.dtype(ml_dtypes.bfloat16),
    'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
    'F8_E8M0': np.dtype(ml_dtypes.float8_e8m0fnu),
  }
)
# Others of the format: known, so that a message can say what is wrong.
_OTHER_BYTES = {
  'BOOL': 1, 'U8': 1, 'I8': 1, 'F8_E5M2': 1, 'I16': 2, 'U16': 2, 'I32': 4,
  'U32': 4, 'I64': 8, 'U64': 8, 'F64': 8, 'C64': 8,
}  # fmt: skip
# The format's own limit.
_MAX_HEADER = 100_000_000


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
  """What a file's header says of one tensor.

  Attributes:
    file: the shard.
    name: full name.
    shape: dims.
    dtype: in the format's spelling, such as 'BF16'.
    offset: of its first byte in the file.
  """

  file: pathlib.Path
  name: str
  shape: tuple[int, ...]
  dtype: str
  offset: int

  @property
  def num_bytes(self) -> int:
    return math.prod(self.shape) * item_bytes(self.dtype)


def item_bytes(dtype: str) -> int:
  return DTYPES[dtype].itemsize if dtype in DTYPES else _OTHER_BYTES[dtype]


def read_json(path: pathlib.Path) -> dict:
  """Reads one of the JSON files of a checkpoint.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is no JSON object.
  """
  if not path.is_file():
    raise FileNotFoundError(
      f'{path}: no such file; expected a Hugging Face checkpoint directory'
    )
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{path}: not JSON ({error})') from None
  if not isinstance(value, dict):
    raise ValueError(f'{path}: got {type(value).__name__}, expected an object')
  return value


def scan(root: pathlib.Path) -> dict[str, Stored]:
  """Reads the header of every shard.

  Args:
    root: directory with an index, or with safetensors files and no index.

  Returns:
    {name: what the file says}, over all shards.

  Raises:
    FileNotFoundError: no shard, or one that the index names is missing.
    ValueError: a damaged file, or an index that the files contradict.
  """
  placed = None
  if (root / INDEX).is_file():
    placed = _weight_map(root / INDEX)
    files = [root / name for name in sorted(set(placed.values()))]
  else:
    files = sorted(root.glob('*.safetensors'))
    _check_all_there(root, files)
  if not files:
    raise FileNotFoundError(f'{root}: no safetensors file')
  stored: dict[str, Stored] = {}
  for file in files:
    if not file.is_file():
      assert placed is not None
      lost = [name for name, home in placed.items() if home == file.name]
      raise FileNotFoundError(
        f'{file}: shard named in {INDEX} is missing, with {lost[0]} and '
        f'{len(lost) - 1} other tensors'
      )
    for entry in read_header(file):
      if entry.name in stored:
        raise ValueError(
          f'{file}: {entry.name} is also in {stored[entry.name].file.name}, '
          'expected it once'
        )
      stored[entry.name] = entry
  if placed is not None:
    _check_index(root, placed, stored)
  return stored


def _weight_map(path: pathlib.Path) -> dict[str, str]:
  placed = read_json(path).get('weight_map')
  if not isinstance(placed, dict) or not placed:
    raise ValueError(f"{path}: no 'weight_map', expected tensor: file")
  for name, file in placed.items():
    if not isinstance(file, str) or pathlib.PurePath(file).name != file:
      raise ValueError(f'{path}: {name} is in {file!r}, expected a file name')
  return placed


def _check_all_there(root: pathlib.Path, files: list[pathlib.Path]) -> None:
  """Without an index the names alone tell whether a shard is missing."""
  for file in files:
    match = re.search(r'-(\d{5,})-of-(\d{5,})\.safetensors$', file.name)
    if match is None:
      continue
    stem = file.name[: match.start()]
    width, count = len(match[2]), int(match[2])
    for shard in range(1, count + 1):
      name = f'{stem}-{shard:0{len(match[1])}d}-of-{count:0{width}d}'
      if not (root / f'{name}.safetensors').is_file():
        raise FileNotFoundError(
          f'{root / name}.safetensors: shard {shard} of {count} is missing'
        )


def _check_index(
  root: pathlib.Path, placed: dict[str, str], stored: dict[str, Stored]
) -> None:
  for name, file in placed.items():
    if name not in stored or stored[name].file.name != file:
      raise ValueError(
        f'{root / file}: {name} is missing, {INDEX} says that it is there'
      )
  for name, entry in stored.items():
    if name not in placed:
      raise ValueError(f'{entry.file}: {name} is not named in {INDEX}')


def read_header(file: pathlib.Path) -> list[Stored]:
  """The tensors of one file, in the order of their bytes.

  Raises:
    ValueError: naming the file, and the tensor where there is one, for a header
      that cannot be read, does not agree with itself or with the file's size.
  """
  with open(file, 'rb') as reader:
    size = os.fstat(reader.fileno()).st_size
    first = reader.read(8)
    length = int.from_bytes(first, 'little')
    if len(first) < 8 or length > min(size - 8, _MAX_HEADER):
      raise _damaged(file, f'{size} bytes, with a header of {length} bytes')
    header = reader.read(length)
  try:
    entries = json.loads(header, object_pairs_hook=_without_repeats)
    if not isinstance(entries, dict):
      raise ValueError('no object')
  except (ValueError, RecursionError) as error:
    raise _damaged(file, f'its header is not JSON: {error}') from None
  entries.pop('__metadata__', None)
  start = 8 + length
  found = [_entry(file, start, name, value) for name, value in entries.items()]
  found.sort(key=lambda entry: (entry.offset, entry.num_bytes))
  position = start
  for entry in found:
    if entry.offset != position:
      raise _damaged(
        file,
        f'{entry.name} begins at byte {entry.offset}, expected {position}',
      )
    position += entry.num_bytes
    if position > size:
      raise _damaged(
        file,
        f'{entry.name} ends at byte {position}, the file has {size} '
        '(truncated?)',
      )
  if position != size:
    raise _damaged(file, f'{size} bytes, its header describes {position}')
  return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict:
  found = dict(pairs)
  if len(found) != len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f'{twice} stands in it twice')
  return found


def _entry(file: pathlib.Path, start: int, name: str, value: Any) -> Stored:
  """One entry of a header, checked by itself."""
  try:
    dtype, shape = value['dtype'], value['shape']
    begin, end = value['data_offsets']
    sizes = (*shape, begin, end)
    if any(type(item) is not int or item < 0 for item in sizes):
      raise ValueError
    entry = Stored(file, name, tuple(shape), str(dtype), start + begin)
    expected = entry.num_bytes
  except (KeyError, TypeError, ValueError):
    raise _damaged(file, f'{name} is described by {value!r:.120}') from None
  if end - begin != expected:
    raise _damaged(
      file,
      f'{name} {list(shape)} {dtype} has {end - begin} bytes, expected '
      f'{expected}',
    )
  return entry


def _damaged(file: pathlib.Path, what: str) -> ValueError:
  return ValueError(f'{file}: not a whole safetensors file: {what}')


class Reader:
  """Reads rows of tensors; keeps the files it has read from open."""

  def __init__(self):
    self._files: dict[pathlib.Path, Any] = {}

  def __enter__(self) -> 'Reader':
    return self

  def __exit__(self, *exception: Any) -> None:
    for file in self._files.values():
      file.close()
    self._files.clear()

  def read(
    self, stored: Stored, start: int = 0, stop: int | None = None
  ) -> np.ndarray:
    """Some of a tensor's rows, [start, stop) along its first axis.

    Raises:
      OSError: naming file and tensor, if the bytes cannot be read.
    """
    dtype = DTYPES[stored.dtype]
    shape = stored.shape
    if shape and (start or stop is not None):
      shape = ((shape[0] if stop is None else stop) - start, *shape[1:])
    row_bytes = math.prod(stored.shape[1:]) * dtype.itemsize
    data = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
    view = memoryview(data)
    position = stored.offset + start * row_bytes
    try:
      if stored.file not in self._files:
        self._files[stored.file] = open(stored.file, 'rb', buffering=0)
      descriptor = self._files[stored.file].fileno()
      while view.nbytes:
        count = os.preadv(descriptor, [view], position)
        if not count:
          raise OSError('the file ends before the tensor')
        view, position = view[count:], position + count
    except OSError as error:
      raise OSError(
        f'{stored.file}: {stored.name} cannot be read '
        f'({error.strerror or error})'
      ) from None
    return data.view(dtype).reshape(shape)

  def release(self, file: pathlib.Path) -> None:
    """Closes a file that will hardly be read again."""
    if (found := self._files.pop(file, None)) is not None:
      found.close()
