"""Reads a Hugging Face checkpoint directory into a model and its variables.

Shards are read one after the other, a few megabytes of a tensor at a time, and
every piece is written at once into the parameter it belongs to, on the device
that holds it. Beyond the parameters themselves an import therefore needs the
host memory of some pieces only, whatever the size of a shard.
"""

import math
import os
import pathlib
from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dsv32_jax.checkpoints import (
  hf_check,
  hf_files,
  hf_indexers,
  hf_mapping,
  hf_pieces,
  hf_table,
)
from dsv32_jax.checkpoints.hf_check import Indexer, Plan
from dsv32_jax.checkpoints.hf_fill import Leaf, Sent
from dsv32_jax.checkpoints.transfer_progress import Progress
from dsv32_jax.config.model import Precision
from dsv32_jax.functional.quantization import QuantizedArray
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.sharding import parallel as parallel_lib
from dsv32_jax.sharding import specs
from dsv32_jax.sharding.parallel import Parallel

Quantized = Literal['dequantize', 'keep']

# Bytes of a tensor that are read at a time.
_CHUNK = 16 << 20


def load_hf(
  path: str | os.PathLike,
  *,
  scan_layers: bool = True,
  mtp: bool | None = None,
  parallel: Parallel | None = None,
  quantized: Quantized = 'dequantize',
  indexer: Indexer = 'load',
  seed: int = 0,
  overrides: Mapping[str, Any] | None = None,
  precision: Precision | None = None,
  progress: Progress | None = None,
  report: Callable[[str], None] | None = None,
) -> tuple[DeepSeekV32, dict]:
  """Loads a DeepSeek-V3.2 checkpoint, or a DeepSeek-V3 one to start from.

  Experts may be stored one tensor each (the published layout) or fused, in one
  file or in shards with an index; matrices in float32, bfloat16, float16 or as
  FP8 with block scales (`weight_scale_inv`).

  Example:
    >>> from dsv32_jax import checkpoints
    >>> model, variables = checkpoints.load_hf('tests/fixtures/hf_tiny_v32')
    >>> tokens_BT = np.zeros((1, 4), np.int32)
    >>> model.apply(variables, tokens_BT).logits_BTV.shape
    (1, 4, 128)

  Args:
    path: directory with config.json and safetensors files.
    scan_layers: layout of the variables; False for decoding with a cache.
    mtp: load the multi-token prediction layer; None loads it if both the
      config and the files have one. Its tensors are skipped otherwise.
    parallel: lays the variables out; each device gets its own part of each,
      and each process reads what its devices hold.
    quantized: what becomes of FP8 matrices: 'dequantize' multiplies them by
      their scales, 'keep' makes each a `QuantizedArray` with the file's values
      and scales, for inference.
    indexer: 'load', or 'init' for a checkpoint without indexers (DeepSeek-V3,
      V3.1): they start as in a fresh model of `seed`.
    seed: of those.
    overrides: config fields in place of config.json's, as the indexer's sizes
      with 'init' (V3.2's if nobody says).
    precision: in place of the file's dtype, as for training.
    progress: called with bytes done, bytes in all, and the shard.
    report: receives lines on what was found, as scales that are not powers of
      two where config.json says ue8m0.

  Returns:
    The model, computing in the checkpoint's dtype, and {'params': ...,
    'router_bias': ...} without partitioning boxes.

  Raises:
    FileNotFoundError: no such directory, config.json or shard.
    ValueError: an unreadable file, tensors that are missing, not known or of
      another shape or dtype than the model's (with both), scales that are not
      positive numbers, or copies of shared tensors that differ from them.
  """
  if quantized not in ('dequantize', 'keep'):
    raise ValueError(
      f"quantized: got {quantized!r}, expected 'dequantize' or 'keep'"
    )
  plan = hf_check.check(
    path,
    scan_layers=scan_layers,
    mtp=mtp,
    indexer=indexer,
    overrides=overrides,
    precision=precision,
  )
  model = DeepSeekV32(plan.cfg)
  kept = _kept(plan) if quantized == 'keep' else {}
  shapes = _with_quantized(variable_shapes(model, parallel), kept)
  if plan.new_indexers:
    shapes = hf_indexers.without(shapes)
  with hf_files.Reader() as reader:
    _check_copies(plan, reader)
    variables = _Import(plan, shapes, reader, progress, report).run()
  if plan.new_indexers:
    whole = variable_shapes(model, parallel)['params']
    hf_indexers.add(
      variables, model, seed, whole if parallel is not None else None
    )
  return model, variables


def variable_shapes(
  model: DeepSeekV32, parallel: Parallel | None = None
) -> dict[str, Any]:
  """Shape, dtype and sharding of every variable, without making one."""
  with parallel_lib.use(None):
    boxed = jax.eval_shape(
      model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    )
  variables = dict(specs.with_shardings(boxed, parallel))
  variables.setdefault(hf_table.ROUTER_BIAS, {})
  return variables


def _kept(plan: Plan) -> dict[tuple[str, ...], tuple[int, ...]]:
  """Block sizes of the parameters that stay FP8, by path."""
  blocks: dict[tuple[str, ...], tuple[int, ...]] = {}
  wide: set[tuple[str, ...]] = set()
  for tensor in plan.wanted:
    for number, target in enumerate(tensor.targets):
      if plan.is_fp8(tensor):
        blocks[target.path] = hf_pieces.kept_block(tensor, number)
      else:
        wide.add(target.path)
  # A stack of which one layer is not FP8 cannot be.
  return {path: block for path, block in blocks.items() if path not in wide}


def _with_quantized(
  shapes: dict, kept: Mapping[tuple[str, ...], tuple[int, ...]]
) -> dict:
  """Shapes with a `QuantizedArray` of shapes for each kept parameter."""

  def convert(path: tuple, leaf: jax.ShapeDtypeStruct) -> Any:
    block = kept.get(tuple(key.key for key in path))
    if block is None:
      return leaf
    lead = len(leaf.shape) - len(block)
    scales = leaf.shape[:lead] + tuple(
      -(-size // own)
      for size, own in zip(leaf.shape[lead:], block, strict=True)
    )
    return QuantizedArray(
      values=jax.ShapeDtypeStruct(
        leaf.shape, jnp.float8_e4m3fn, sharding=leaf.sharding
      ),
      scale=jax.ShapeDtypeStruct(
        scales, jnp.float32, sharding=_fitted(leaf.sharding, scales)
      ),
      block=block,
    )

  return jax.tree_util.tree_map_with_path(convert, shapes)


def _fitted(sharding: Any, shape: tuple[int, ...]) -> Any:
  """A weight's sharding for its scales; whole where these do not divide."""
  if sharding is None:
    return None
  entries = []
  for size, names in zip_longest(shape, sharding.spec):
    names = (names,) if isinstance(names, str) else (names or ())
    parts = math.prod(sharding.mesh.shape[name] for name in names)
    entries.append(names if names and size % parts == 0 else None)
  return NamedSharding(sharding.mesh, PartitionSpec(*entries))


class _Import:
  """One pass over the shards."""

  def __init__(
    self,
    plan: Plan,
    shapes: dict,
    reader: hf_files.Reader,
    progress: Progress | None,
    report: Callable[[str], None] | None,
  ):
    self._plan = plan
    self._reader = reader
    self._progress = progress or (lambda done, total, what: None)
    self._report = report
    self._sent = Sent()
    self._leaves = jax.tree.map(Leaf, shapes)
    self._total = sum(plan.stored[t.name].num_bytes for t in plan.wanted)
    self._done = 0
    self._scales = _ScaleCheck(plan)

  def run(self) -> dict:
    by_file: dict[pathlib.Path, list[hf_mapping.Tensor]] = {}
    for tensor in self._plan.wanted:
      file = self._plan.stored[tensor.name].file
      by_file.setdefault(file, []).append(tensor)
    for file in sorted(by_file):
      tensors = by_file[file]
      tensors.sort(key=lambda tensor: self._plan.stored[tensor.name].offset)
      for tensor in tensors:
        self._tensor(tensor, file.name)
      self._reader.release(file)
    self._sent.wait()
    if self._report is not None and (line := self._scales.line()):
      self._report(line)
    return jax.tree.map(lambda leaf: leaf.array(), self._leaves)

  def _leaf(self, path: tuple[str, ...]) -> Any:
    leaf: Any = self._leaves
    for key in path:
      leaf = leaf[key]
    return leaf

  def _tensor(self, tensor: hf_mapping.Tensor, file: str) -> None:
    stored = self._plan.stored[tensor.name]
    leaves = [self._leaf(target.path) for target in tensor.targets]
    scale = None
    if self._plan.is_fp8(tensor):
      scale = self._scales.read(tensor, self._reader)
      for number, (leaf, target) in enumerate(
        zip(leaves, tensor.targets, strict=True)
      ):
        if isinstance(leaf, QuantizedArray):
          value = hf_pieces.kept_scale(tensor, number, scale)
          self._sent.add(leaf.scale, leaf.scale.put_whole(target.index, value))
    # Rows of the file's first axis that one entry of the factored one spans.
    inner = stored.shape[0] // tensor.factored[0] if stored.shape else 1
    row_bytes = stored.num_bytes // tensor.factored[0]
    for start, stop in hf_pieces.row_chunks(
      tensor, row_bytes=row_bytes, max_bytes=_CHUNK
    ):
      pieces = [
        piece
        for piece in hf_pieces.pieces(tensor, start, stop)
        if _values(leaves[piece.target]).needs(piece, tensor)
      ]
      if pieces:
        chunk = self._reader.read(stored, start * inner, stop * inner)
        chunk = chunk.reshape(stop - start, *tensor.factored[1:])
        for piece in pieces:
          leaf = leaves[piece.target]
          keeps = isinstance(leaf, QuantizedArray)
          values = _values(leaf)
          count = values.put(
            tensor, piece, chunk, start, None if keeps else scale
          )
          self._sent.add(values, count)
      self._done += (stop - start) * row_bytes
      self._progress(self._done, self._total, file)


def _values(leaf: Any) -> Leaf:
  return leaf.values if isinstance(leaf, QuantizedArray) else leaf


class _ScaleCheck:
  """Reads block scales and looks at what they are."""

  def __init__(self, plan: Plan):
    self._plan = plan
    self._count = 0
    self._odd = 0
    self._first: str | None = None

  def read(
    self, tensor: hf_mapping.Tensor, reader: hf_files.Reader
  ) -> np.ndarray:
    """A tensor's scales in float32, from whichever shard holds them."""
    stored = self._plan.stored[hf_mapping.scale_name(tensor)]
    scale = reader.read(stored).astype(np.float32)
    if not (np.isfinite(scale).all() and (scale > 0).all()):
      raise ValueError(
        f'{stored.file}: {stored.name} holds values that are no scales '
        '(expected positive numbers)'
      )
    mantissa, _ = np.frexp(scale)
    odd = int((mantissa != 0.5).sum())
    self._count += scale.size
    self._odd += odd
    if odd and self._first is None:
      self._first = f'{stored.file}: {stored.name}'
    return scale

  def line(self) -> str | None:
    """What was found, in words; None without scales."""
    if not self._count:
      return None
    said = 'says ue8m0' if self._plan.ue8m0 else 'does not say ue8m0'
    if not self._odd:
      return (
        f'{self._count:,} block scales, all powers of two (config.json {said})'
      )
    return (
      f'{self._odd:,} of {self._count:,} block scales are not powers of two, '
      f'the first in {self._first} (config.json {said})'
    )


def _check_copies(plan: Plan, reader: hf_files.Reader) -> None:
  """Refuses copies of shared tensors that are not copies.

  The model shares embedding and head with its MTP module (spec section 3.8), so
  a module that had its own would be computed wrongly.
  """
  for copy, original in plan.copies:
    one, other = plan.stored[copy], plan.stored[original]
    row_bytes = max(one.num_bytes // max(one.shape[0], 1), 1)
    step = max(_CHUNK // row_bytes, 1)
    for start in range(0, one.shape[0], step):
      stop = min(start + step, one.shape[0])
      a, b = (reader.read(entry, start, stop) for entry in (one, other))
      same = (
        np.array_equal(a.view(np.uint8), b.view(np.uint8))
        if a.dtype == b.dtype
        else np.array_equal(a.astype(np.float32), b.astype(np.float32))
      )
      if not same:
        raise ValueError(
          f'{one.file}: {copy} differs from {original} in rows {start} to '
          f'{stop - 1}, expected a copy: the MTP module shares it (mtp=False '
          'loads the rest)'
        )
