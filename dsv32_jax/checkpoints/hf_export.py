"""Writes a model and its variables as a Hugging Face checkpoint directory.

Everything is written to `<path>.partial` beside the directory that is wanted,
and that is renamed when all of it is on the disk: a directory of the wanted
name is whole. A shard has its own name there only once it is complete. When an
interrupted export is run again, such shards are compared with what would be
written and left alone if they are equal.
"""

import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from dsv32_jax.checkpoints import (
  hf_files,
  hf_gather,
  hf_layout,
  hf_pieces,
  integrity,
)
from dsv32_jax.checkpoints.hf_import import variable_shapes
from dsv32_jax.checkpoints.hf_layout import Entry, Quantize, Shard
from dsv32_jax.checkpoints.reading import CheckpointError
from dsv32_jax.checkpoints.transfer_progress import Progress
from dsv32_jax.functional.quantization import QuantizedArray
from dsv32_jax.modules.transformer import DeepSeekV32

# Bytes of a tensor that are written at a time.
_CHUNK = 16 << 20
_CONFIG = 'config.json'
_MODEL_FILES = ('.safetensors', '.bin', '.pt', '.index.json')


def save_hf(
  model: DeepSeekV32,
  variables: dict,
  path: str | os.PathLike,
  *,
  dtype: str | None = None,
  quantize: Quantize | None = None,
  max_shard_bytes: int = 5_000_000_000,
  tokenizer: str | os.PathLike | None = None,
  progress: Progress | None = None,
) -> None:
  """Exports a model to sharded safetensors that transformers loads.

  Example:
    >>> import tempfile
    >>> from dsv32_jax import checkpoints
    >>> model, variables = checkpoints.load_hf('tests/fixtures/hf_tiny_v32')
    >>> path = pathlib.Path(tempfile.mkdtemp()) / 'export'
    >>> checkpoints.save_hf(model, variables, path)
    >>> sorted(file.name for file in path.iterdir())
    ['config.json', 'model.safetensors']

  Args:
    model: the model.
    variables: its variables, scanned or not, quantised or not, on devices of
      this process.
    path: directory to make.
    dtype: 'published' for float32 norms and router biases and bfloat16 for the
      rest, 'float32', 'bfloat16' or 'float16' for all tensors, None for each
      parameter's own, which loses nothing.
    quantize: 'fp8' writes the matrices that are FP8 in the published checkpoint
      so, in blocks of 128 x 128 with ue8m0 scales; those kept quantised at
      import are written as they were.
    max_shard_bytes: of a file.
    tokenizer: directory whose files are put beside the weights.
    progress: called with bytes done, bytes in all, and the shard.

  Raises:
    ValueError: a dtype that there is not, variables of another model, or a path
      that exists.
    CheckpointError: the disk is full or cannot be written; what is written
      stays for the next attempt.
  """
  target = pathlib.Path(path).absolute()
  _check_options(dtype, quantize, max_shard_bytes)
  if target.exists():
    raise ValueError(f'{target}: exists, expected the path of a new directory')
  files_beside = tokenizer_files(tokenizer)
  variables = dict(nn.meta.unbox(variables))
  own_dtypes = _check_variables(model, variables)
  shards = hf_layout.shards(
    model.cfg,
    own_dtypes,
    dtype=dtype,
    quantize=quantize,
    max_shard_bytes=max_shard_bytes,
  )
  computes_in = dtype or model.cfg.precision.param
  config = hf_layout.config_json(
    model.cfg,
    dtype='bfloat16' if computes_in == 'published' else computes_in,
    quantize=quantize,
  )
  partial = target.with_name(f'{target.name}.partial')
  _Export(model, variables, shards, partial, progress).run()
  try:
    for file in files_beside:
      shutil.copyfile(file, partial / file.name)
      _sync(partial / file.name)
    if len(shards) > 1:
      integrity.write_atomically(
        partial / hf_files.INDEX, json.dumps(hf_layout.index(shards), indent=1)
      )
    integrity.write_atomically(partial / _CONFIG, json.dumps(config, indent=2))
    _sync(partial)
    os.rename(partial, target)
    _sync(target.parent)
  except OSError as error:
    raise _failure(pathlib.Path(error.filename or partial), error) from None


def _check_options(
  dtype: str | None, quantize: str | None, max_shard_bytes: int
) -> None:
  if dtype is not None and dtype not in hf_layout.DTYPES:
    raise ValueError(
      f'dtype: got {dtype!r}, expected None or one of {hf_layout.DTYPES}'
    )
  if quantize not in (None, 'fp8'):
    raise ValueError(f"quantize: got {quantize!r}, expected None or 'fp8'")
  if max_shard_bytes < 1:
    raise ValueError(
      f'max_shard_bytes: got {max_shard_bytes}, expected at least 1'
    )


def tokenizer_files(
  directory: str | os.PathLike | None,
) -> list[pathlib.Path]:
  """Files of a tokenizer's or a checkpoint's directory but the model's."""
  if directory is None:
    return []
  root = pathlib.Path(directory)
  if not root.is_dir():
    raise ValueError(f'tokenizer: {root} is no directory')
  return sorted(
    file
    for file in root.iterdir()
    if file.is_file()
    and file.name != _CONFIG
    and not file.name.endswith(_MODEL_FILES)
  )


def _check_variables(
  model: DeepSeekV32, variables: dict
) -> dict[tuple[str, ...], np.dtype]:
  """dtypes of the parameters by path; refuses those of another model."""

  def by_path(tree: Any) -> dict[tuple[str, ...], Any]:
    leaves = jax.tree_util.tree_leaves_with_path(
      tree, is_leaf=lambda leaf: isinstance(leaf, QuantizedArray)
    )
    return {tuple(key.key for key in path): leaf for path, leaf in leaves}

  expected, found = by_path(variable_shapes(model)), by_path(variables)
  for path in expected.keys() | found.keys():
    shapes = [
      tuple(tree[path].shape) if path in tree else None
      for tree in (found, expected)
    ]
    if shapes[0] != shapes[1]:
      raise ValueError(
        f'variables: {"/".join(path)} has shape {shapes[0]}, expected '
        f'{shapes[1]}'
      )
  wide = np.dtype(model.cfg.precision.param)
  return {
    path: wide if isinstance(leaf, QuantizedArray) else np.dtype(leaf.dtype)
    for path, leaf in found.items()
  }


class _Export:
  """Writes the shards."""

  def __init__(
    self,
    model: DeepSeekV32,
    variables: dict,
    shards: list[Shard],
    directory: pathlib.Path,
    progress: Progress | None,
  ):
    self._cfg = model.cfg
    self._variables = variables
    self._shards = shards
    self._directory = directory
    self._progress = progress or (lambda done, total, what: None)
    self._total = sum(shard.num_bytes for shard in shards)
    self._done = 0

  def run(self) -> None:
    try:
      self._directory.mkdir(parents=True, exist_ok=True)
      self._clear()
      self._check_space()
    except OSError as error:
      raise _failure(self._directory, error) from None
    for shard in self._shards:
      before = self._done
      if not self._is_written(shard):
        self._done = before
        self._write(shard)
      self._done = before + shard.num_bytes
      self._progress(self._done, self._total, shard.name)

  def _clear(self) -> None:
    """Removes what is not of this export, or was not finished."""
    names = {shard.name for shard in self._shards}
    for file in self._directory.iterdir():
      if file.name not in names:
        file.unlink()

  def _check_space(self) -> None:
    there = sum(
      (self._directory / shard.name).stat().st_size
      for shard in self._shards
      if (self._directory / shard.name).exists()
    )
    free = shutil.disk_usage(self._directory).free
    if free < self._total - there:
      raise CheckpointError(
        f'{self._directory}: {free / 1e6:,.1f} MB free, expected at least '
        f'{(self._total - there) / 1e6:,.1f} MB for {len(self._shards)} shards'
      )

  def _is_written(self, shard: Shard) -> bool:
    """Whether a shard of an earlier attempt holds exactly this content."""
    file = self._directory / shard.name
    try:
      if file.stat().st_size != shard.num_bytes:
        return False
      with open(file, 'rb', buffering=0) as reader:
        if reader.read(len(shard.header)) != shard.header:
          return False
        for _, offset, data in self._content(shard):
          if os.pread(reader.fileno(), len(data), offset) != bytes(data):
            return False
    except FileNotFoundError:
      return False
    return True

  def _write(self, shard: Shard) -> None:
    file = self._directory / shard.name
    part = file.with_name(f'{file.name}.part')
    name = 'the header'
    try:
      file.unlink(missing_ok=True)
      with open(part, 'wb', buffering=0) as writer:
        descriptor = writer.fileno()
        _write_all(descriptor, memoryview(shard.header), 0)
        for entry, offset, data in self._content(shard):
          name = entry.name
          _write_all(descriptor, data, offset)
        os.fsync(descriptor)
      os.rename(part, file)
    except OSError as error:
      part.unlink(missing_ok=True)
      raise _failure(file, error, name) from None

  def _content(self, shard: Shard) -> Iterator[tuple[Entry, int, memoryview]]:
    """Stretches of bytes with their offsets in the file."""
    entries = list(zip(shard.entries, shard.offsets, strict=True))
    for number, (entry, offset) in enumerate(entries):
      if entry.dtype == 'F8_E4M3':
        yield from self._quantised(entry, offset, *entries[number + 1])
      elif not entry.is_scale:
        yield from self._plain(entry, offset)

  def _plain(
    self, entry: Entry, offset: int
  ) -> Iterator[tuple[Entry, int, memoryview]]:
    tensor = hf_layout.original(self._cfg, entry.tensor)
    dtype = hf_files.DTYPES[entry.dtype]
    row_bytes = entry.num_bytes // tensor.factored[0]
    for start, stop in hf_pieces.row_chunks(
      tensor, row_bytes=row_bytes, max_bytes=_CHUNK
    ):
      value = hf_gather.rows(tensor, self._variables, start, stop)
      yield entry, offset + start * row_bytes, _bytes(value, dtype)
      self._count(row_bytes * (stop - start), entry)

  def _quantised(
    self, entry: Entry, offset: int, scale_entry: Entry, scale_offset: int
  ) -> Iterator[tuple[Entry, int, memoryview]]:
    """Values in chunks of whole blocks, then the scales of all."""
    tensor = entry.tensor
    inner = tensor.shape[0] // tensor.factored[0]
    row_bytes = entry.num_bytes // tensor.factored[0]
    scales = []
    for start, stop in hf_pieces.row_chunks(
      tensor,
      row_bytes=row_bytes,
      max_bytes=_CHUNK // 4,
      multiple=math.lcm(hf_pieces.BLOCK, inner) // inner,
    ):
      values, scale = hf_gather.quantised_rows(
        tensor, self._variables, start, stop
      )
      scales.append(scale)
      yield entry, offset + start * row_bytes, _bytes(values, values.dtype)
      self._count(row_bytes * (stop - start), entry)
    whole = np.concatenate(scales)
    yield scale_entry, scale_offset, _bytes(whole, np.dtype(np.float32))

  def _count(self, num_bytes: int, entry: Entry) -> None:
    self._done += num_bytes
    self._progress(min(self._done, self._total), self._total, entry.name)


def _bytes(value: np.ndarray, dtype: np.dtype) -> memoryview:
  value = np.ascontiguousarray(value.astype(dtype, copy=False))
  return memoryview(value.reshape(-1).view(np.uint8))


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
  while data.nbytes:
    count = os.pwrite(descriptor, data, offset)
    data, offset = data[count:], offset + count


def _sync(path: pathlib.Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _failure(
  file: pathlib.Path, error: OSError, tensor: str | None = None
) -> CheckpointError:
  where = f'{file}: {tensor}' if tensor else str(file)
  return CheckpointError(
    f'{where} could not be written ({error.strerror or error}); complete '
    'shards stay there and the same export goes on from them'
  )
