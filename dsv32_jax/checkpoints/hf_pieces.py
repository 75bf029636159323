"""Which part of a tensor of the file lands where in a parameter.

A tensor is read in chunks of rows. Each chunk is cut into pieces, one for each
parameter that it feeds, and each piece further into what a device holds. A
piece has two places: in the file's tensor, and in the parameter. The geometry
is here; no array is read or made, but small ones of indices.

Words: a factored axis is one of `Tensor.factored`; a block is one of 128 x 128
entries of the file's matrix that share a scale.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from dsv32_jax.checkpoints.hf_mapping import Target, Tensor

BLOCK = 128

# [start, stop) of every dim.
Region = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
  """Part of a tensor that goes to one parameter.

  Attributes:
    target: its number in `Tensor.targets`.
    region: in the factored tensor.
    place: in the parameter, its leading indices included.
  """

  target: int
  region: Region
  place: Region

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the region."""
    return tuple(stop - start for start, stop in self.region)


def row_chunks(
  tensor: Tensor, *, row_bytes: int, max_bytes: int, multiple: int = 1
) -> Iterator[tuple[int, int]]:
  """Ranges of the first factored axis of at most so many bytes, or one row.

  Args:
    tensor: what is read.
    row_bytes: of one entry of that axis.
    max_bytes: of a chunk.
    multiple: of so many rows, but for the last chunk.
  """
  rows = tensor.factored[0]
  step = max(max_bytes // max(row_bytes, 1) // multiple, 1) * multiple
  for start in range(0, rows, step):
    yield start, min(start + step, rows)


def cut_offset(tensor: Tensor, target: int) -> int:
  """Where a target's part begins along `cut_axis`."""
  return sum(tensor.cut_sizes[:target])


def part_shape(tensor: Tensor, target: int) -> tuple[int, ...]:
  """The factored shape of what goes to one target."""
  shape = list(tensor.factored)
  if tensor.cut_sizes:
    shape[tensor.cut_axis] = tensor.cut_sizes[target]
  return tuple(shape)


def pieces(tensor: Tensor, start: int, stop: int) -> Iterator[Piece]:
  """The pieces of rows [start, stop) of the first factored axis."""
  for number, target in enumerate(tensor.targets):
    region = [(0, size) for size in tensor.factored]
    offset = [0] * len(region)
    if tensor.cut_sizes:
      first = cut_offset(tensor, number)
      offset[tensor.cut_axis] = first
      size = tensor.cut_sizes[number]
      region[tensor.cut_axis] = (first, first + size)
    region[0] = (max(region[0][0], start), min(region[0][1], stop))
    if region[0][0] >= region[0][1]:
      continue
    place = [(index, index + 1) for index in target.index]
    place += [
      (region[axis][0] - offset[axis], region[axis][1] - offset[axis])
      for axis in target.order
    ]
    yield Piece(number, tuple(region), tuple(place))


def within(piece: Piece, target: Target, region: Region) -> Piece | None:
  """The part of a piece that lies in a region of its parameter.

  Args:
    piece: of a chunk.
    target: the piece's.
    region: what a device holds of the parameter.

  Returns:
    The part with `place` counted from the region's start, or None if they do
    not meet.
  """
  lead = len(target.index)
  low = [max(a[0], b[0]) for a, b in zip(piece.place, region, strict=True)]
  high = [min(a[1], b[1]) for a, b in zip(piece.place, region, strict=True)]
  if any(a >= b for a, b in zip(low, high, strict=True)):
    return None
  inside = list(piece.region)
  for position, axis in enumerate(target.order, start=lead):
    moved = piece.region[axis][0] - piece.place[position][0]
    inside[axis] = (low[position] + moved, high[position] + moved)
  place = tuple(
    (a - bounds[0], b - bounds[0])
    for a, b, bounds in zip(low, high, region, strict=True)
  )
  return Piece(piece.target, tuple(inside), place)


def numbers(tensor: Tensor, region: Region, axis: int) -> np.ndarray:
  """The rows (axis 0) or columns (1) of the file's matrix in a region."""
  factors = [i for i, own in enumerate(tensor.axis_of) if own == axis]
  sizes = [tensor.factored[i] for i in factors]
  grid = np.arange(math.prod(sizes)).reshape(sizes)
  return grid[tuple(slice(*region[i]) for i in factors)].ravel()


def kept_block(tensor: Tensor, target: int) -> tuple[int, ...]:
  """Sizes of the blocks that share a scale in the parameter's own dims.

  128 along a dim whose blocks are those of the file: it is the innermost factor
  of its axis, the rest of the axis steps in whole blocks and so does the cut.
  1 along any other: the scales are repeated there, so that values and scales
  stay exactly those of the file whatever straddles what.
  """
  block = [1] * len(tensor.factored)
  for axis in set(tensor.axis_of):
    factors = [i for i, own in enumerate(tensor.axis_of) if own == axis]
    last = factors[-1]
    steps = len(factors) == 1 or tensor.factored[last] % BLOCK == 0
    first = cut_offset(tensor, target) if last == tensor.cut_axis else 0
    if steps and first % BLOCK == 0:
      block[last] = BLOCK
  return tuple(block[axis] for axis in tensor.targets[target].order)


def kept_scale(tensor: Tensor, target: int, scale: np.ndarray) -> np.ndarray:
  """The parameter's scales, for blocks of `kept_block`, of the file's scales.

  Args:
    tensor: the weight.
    target: number of the parameter.
    scale: [rows / 128, columns / 128], ends rounded up.

  Returns:
    One entry a block, in the order of the parameter's dims.
  """
  order = tensor.targets[target].order
  block = dict(zip(order, kept_block(tensor, target), strict=True))
  sizes = part_shape(tensor, target)
  # The first entry of every block, in the file's matrix.
  indices = [np.arange(0, size, block[i]) for i, size in enumerate(sizes)]
  if tensor.cut_sizes:
    indices[tensor.cut_axis] = indices[tensor.cut_axis] + cut_offset(
      tensor, target
    )
  found = []
  for axis in (0, 1):
    position = np.zeros((), np.int64)
    for factor in (i for i, own in enumerate(tensor.axis_of) if own == axis):
      position = position[..., None] * tensor.factored[factor] + indices[factor]
    found.append(position.ravel() // BLOCK)
  whole = scale[np.ix_(*found)].reshape([len(index) for index in indices])
  return whole.transpose(order)
