"""Rows of a file's tensor, put together from parameters.

The inverse of `hf_fill`: some rows at a time, from whichever devices hold them.
"""

import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from dsv32_jax.checkpoints import hf_pieces
from dsv32_jax.checkpoints.hf_mapping import Target, Tensor
from dsv32_jax.checkpoints.hf_pieces import BLOCK, Piece, Region
from dsv32_jax.functional import quantization
from dsv32_jax.functional.quantization import QuantizedArray


def leaf_of(variables: Any, path: tuple[str, ...]) -> Any:
  for key in path:
    variables = variables[key]
  return variables


def rows(tensor: Tensor, variables: dict, start: int, stop: int) -> np.ndarray:
  """Rows of the factored tensor, in the parameters' dtype.

  Quantised parameters are multiplied by their scales, in float32.
  """
  return _joined(tensor, variables, start, stop, _values)


def quantised_rows(
  tensor: Tensor, variables: dict, start: int, stop: int
) -> tuple[np.ndarray, np.ndarray]:
  """Likewise in FP8 with block scales.

  Parameters that were kept quantised give back the file's own values and
  scales; others are quantised here (ue8m0 scales, spec section 3.6).

  Args:
    tensor: a matrix of the file.
    variables: of the model.
    start: first row of the factored tensor; begins a block.
    stop: one past the last; ends a block or the tensor.

  Returns:
    Values [rows, columns] in float8_e4m3fn, scales [rows / 128, columns / 128].
  """
  leaves = [leaf_of(variables, target.path) for target in tensor.targets]
  columns = tensor.shape[1]
  if all(isinstance(leaf, QuantizedArray) for leaf in leaves):
    scales = _joined(tensor, variables, start, stop, _scales)
    scales = scales.reshape(-1, columns)
    first = scales[::BLOCK, ::BLOCK]
    spread = np.repeat(np.repeat(first, BLOCK, 0), BLOCK, 1)
    if np.array_equal(spread[: len(scales), :columns], scales):
      values = _joined(tensor, variables, start, stop, _raw_values)
      return values.reshape(-1, columns), first
  wide = rows(tensor, variables, start, stop).astype(np.float32)
  found = _quantize(wide.reshape(-1, columns))
  return np.asarray(found.values), np.asarray(found.scale)


@jax.jit
def _quantize(matrix: Array) -> QuantizedArray:
  return quantization.quantize(matrix, block=(BLOCK, BLOCK))


def _joined(
  tensor: Tensor, variables: dict, start: int, stop: int, read: Any
) -> np.ndarray:
  """Puts the parts of all parameters in their places."""
  found = [
    (piece, read(leaf_of(variables, target.path), target, piece))
    for piece in hf_pieces.pieces(tensor, start, stop)
    for target in (tensor.targets[piece.target],)
  ]
  parts = []
  for piece, value in found:
    target = tensor.targets[piece.target]
    value = value.reshape(value.shape[len(target.index) :])
    parts.append((piece, value.transpose(np.argsort(target.order))))
  if len(parts) == 1:
    return parts[0][1]
  shape = (stop - start, *tensor.factored[1:])
  whole = np.empty(shape, np.result_type(*(value for _, value in parts)))
  for piece, value in parts:
    (a, b), *others = piece.region
    region = ((a - start, b - start), *others)
    whole[tuple(slice(*bounds) for bounds in region)] = value
  return whole


def _values(leaf: Any, target: Target, piece: Piece) -> np.ndarray:
  if isinstance(leaf, QuantizedArray):
    wide = fetch(leaf.values, piece.place).astype(np.float32)
    return wide * _scales(leaf, target, piece)
  return fetch(leaf, piece.place)


def _raw_values(leaf: Any, target: Target, piece: Piece) -> np.ndarray:
  return fetch(leaf.values, piece.place)


def _scales(leaf: Any, target: Target, piece: Piece) -> np.ndarray:
  """The scale of every entry of a piece of a quantised parameter."""
  lead = len(piece.place) - len(leaf.block)
  block = (1,) * lead + leaf.block
  place = tuple(
    (a // size, -(-b // size))
    for (a, b), size in zip(piece.place, block, strict=True)
  )
  scale = fetch(leaf.scale, place)
  indices = [
    np.arange(a, b) // size - a // size
    for (a, b), size in zip(piece.place, block, strict=True)
  ]
  return scale[np.ix_(*indices)]


def fetch(leaf: Any, place: Region) -> np.ndarray:
  """A region of an array, wherever its parts are.

  No more than the region is copied to the host, and not even that on a CPU with
  one device.

  Raises:
    ValueError: some of it is on devices of another process.
  """
  if not isinstance(leaf, jax.Array):
    return np.asarray(leaf)[tuple(slice(*bounds) for bounds in place)]
  shape = tuple(b - a for a, b in place)
  whole = None
  missing = int(np.prod(shape))
  seen = set()
  for shard in leaf.addressable_shards:
    bounds = tuple(
      (own.start or 0, size if own.stop is None else own.stop)
      for own, size in zip(shard.index, leaf.shape, strict=True)
    )
    low = [max(a[0], b[0]) for a, b in zip(place, bounds, strict=True)]
    high = [min(a[1], b[1]) for a, b in zip(place, bounds, strict=True)]
    if bounds in seen or any(a >= b for a, b in zip(low, high, strict=True)):
      continue
    seen.add(bounds)
    value = _part(
      shard.data,
      tuple(a - own[0] for a, own in zip(low, bounds, strict=True)),
      tuple(b - a for a, b in zip(low, high, strict=True)),
    )
    if value.shape == shape:
      return value
    if whole is None:
      whole = np.empty(shape, value.dtype)
    inside = tuple(
      slice(a - own[0], b - own[0])
      for a, b, own in zip(low, high, place, strict=True)
    )
    whole[inside] = value
    missing -= value.size
  if missing or whole is None:
    raise ValueError(
      'variables: some are on devices of other processes, expected all here; '
      'export from one process (docs/checkpoints.md)'
    )
  return whole


def _part(
  data: jax.Array, start: tuple[int, ...], sizes: tuple[int, ...]
) -> np.ndarray:
  if data.shape == sizes:
    return np.asarray(data)
  (device,) = data.devices()
  if device.platform == 'cpu':
    # A view of the array's own memory.
    whole = np.asarray(data)
    return whole[
      tuple(slice(a, a + size) for a, size in zip(start, sizes, strict=True))
    ]
  return np.asarray(_slice(data, np.array(start, np.int32), sizes=sizes))


@functools.partial(jax.jit, static_argnames=('sizes',))
def _slice(data: Array, start: Array, *, sizes: tuple[int, ...]) -> Array:
  return jax.lax.dynamic_slice(
    data, tuple(start[axis] for axis in range(data.ndim)), sizes
  )
