"""Parameters that are filled a piece at a time.

A large parameter is filled where it will live: one buffer a device, of what
that device holds, updated in place by donation. Neither the whole parameter nor
a second copy of a buffer is ever made. A small one is put together in numpy and
sent when its last piece has come, which takes no compilation.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dsv32_jax.checkpoints import hf_pieces
from dsv32_jax.checkpoints.hf_mapping import Tensor
from dsv32_jax.checkpoints.hf_pieces import Piece, Region

# Parameters up to this size are put together in numpy.
HOST_BYTES = 1 << 20
# Host memory of pieces that were sent and may not have arrived.
_MAX_SENT = 64 << 20


class Leaf:
  """One parameter, or the values or the scales of a quantised one."""

  def __init__(self, shape: jax.ShapeDtypeStruct):
    """Allocates it.

    Args:
      shape: with a sharding, or without one for the default device.
    """
    self._shape = shape
    size = math.prod(shape.shape)
    self._missing = size
    self._host: np.ndarray | None = None
    self._array: jax.Array | None = None
    self._parts: list[tuple[Any, Region]] = []
    if size * np.dtype(shape.dtype).itemsize <= HOST_BYTES:
      self._host = np.empty(shape.shape, shape.dtype)
    elif shape.sharding is None:
      self._parts = [(None, tuple((0, size) for size in shape.shape))]
    else:
      places = shape.sharding.addressable_devices_indices_map(shape.shape)
      self._parts = [
        (device, _bounds(index, shape.shape))
        for device, index in places.items()
      ]
    self._buffers = [
      jnp.zeros([b - a for a, b in region], shape.dtype, device=device)
      for device, region in self._parts
    ]

  def needs(self, piece: Piece, tensor: Tensor) -> bool:
    """Whether a device of this process holds any of it."""
    if self._host is not None:
      return True
    target = tensor.targets[piece.target]
    return any(
      hf_pieces.within(piece, target, region) is not None
      for _, region in self._parts
    )

  def put(
    self,
    tensor: Tensor,
    piece: Piece,
    chunk: np.ndarray,
    first_row: int,
    scale: np.ndarray | None,
  ) -> int:
    """Writes a piece of a tensor.

    Args:
      tensor: of the file.
      piece: the part to write.
      chunk: rows of the factored tensor from `first_row` on, with the piece.
      first_row: see `chunk`.
      scale: the whole tensor's block scales if its values are to be multiplied
        by them, float32.

    Returns:
      Bytes that were sent to devices.
    """
    target = tensor.targets[piece.target]
    if self._host is not None:
      value = _cut(chunk, piece.region, first_row)
      if scale is not None:
        value = _dequantised(tensor, piece.region, value, scale)
      place = tuple(slice(*bounds) for bounds in piece.place)
      lead = (1,) * len(target.index)
      value = value.transpose(target.order)
      self._host[place] = value.reshape(lead + value.shape)
      self._came(math.prod(piece.shape))
      return 0
    sent = 0
    for number, (_, region) in enumerate(self._parts):
      part = hf_pieces.within(piece, target, region)
      if part is None:
        continue
      value = np.ascontiguousarray(_cut(chunk, part.region, first_row))
      start = np.array([a for a, _ in part.place], np.int32)
      if scale is None:
        self._buffers[number] = _update(
          self._buffers[number], value, start, order=target.order
        )
      else:
        rows, columns = (
          hf_pieces.numbers(tensor, part.region, axis) // hf_pieces.BLOCK
          for axis in (0, 1)
        )
        self._buffers[number] = _update_dequantised(
          self._buffers[number],
          value.reshape(len(rows), len(columns)),
          scale,
          rows.astype(np.int32),
          columns.astype(np.int32),
          start,
          shape=part.shape,
          order=target.order,
        )
      sent += value.nbytes
    return sent

  def put_whole(self, index: tuple[int, ...], value: np.ndarray) -> int:
    """Writes all of the parameter that has these leading indices.

    Returns:
      Bytes that were sent to devices.
    """
    if self._host is not None:
      self._host[index] = value
      self._came(value.size)
      return 0
    place = tuple((i, i + 1) for i in index)
    place += tuple((0, size) for size in value.shape)
    sent = 0
    for number, (_, region) in enumerate(self._parts):
      low = [max(a[0], b[0]) for a, b in zip(place, region, strict=True)]
      high = [min(a[1], b[1]) for a, b in zip(place, region, strict=True)]
      if any(a >= b for a, b in zip(low, high, strict=True)):
        continue
      own = [slice(a, b) for a, b in zip(low, high, strict=True)][len(index) :]
      part = np.ascontiguousarray(value[tuple(own)])
      start = np.array(
        [a - bounds[0] for a, bounds in zip(low, region, strict=True)], np.int32
      )
      self._buffers[number] = _update(
        self._buffers[number], part, start, order=tuple(range(value.ndim))
      )
      sent += part.nbytes
    return sent

  def wait(self) -> None:
    """Returns when everything that was sent has arrived."""
    for buffer in self._buffers:
      buffer.block_until_ready()

  def array(self) -> jax.Array:
    """The parameter; call it once everything has been written."""
    if self._host is not None:
      self._send()
    if self._array is None:
      sharding = self._shape.sharding
      if sharding is None:
        (self._array,) = self._buffers
      else:
        self._array = jax.make_array_from_single_device_arrays(
          self._shape.shape, sharding, self._buffers
        )
      self._buffers = []
    return self._array

  def _came(self, count: int) -> None:
    self._missing -= count
    if not self._missing:
      self._send()

  def _send(self) -> None:
    host, self._host = self._host, None
    assert host is not None
    if self._shape.sharding is None:
      self._array = jnp.asarray(host)
    else:
      self._array = jax.make_array_from_callback(
        host.shape, self._shape.sharding, lambda index: host[index]
      )


class Sent:
  """Bounds the host memory of pieces on their way to devices."""

  def __init__(self):
    self._bytes = 0
    self._leaves: dict[int, Leaf] = {}

  def add(self, leaf: Leaf, count: int) -> None:
    """Notes what a leaf sent; waits for all of it when it is much."""
    if not count:
      return
    self._bytes += count
    self._leaves[id(leaf)] = leaf
    if self._bytes > _MAX_SENT:
      self.wait()

  def wait(self) -> None:
    for leaf in self._leaves.values():
      leaf.wait()
    self._bytes = 0
    self._leaves.clear()


def _bounds(index: Any, shape: tuple[int, ...]) -> Region:
  return tuple(
    (own.start or 0, size if own.stop is None else own.stop)
    for own, size in zip(index, shape, strict=True)
  )


def _cut(chunk: np.ndarray, region: Region, first_row: int) -> np.ndarray:
  (start, stop), *others = region
  rows = (start - first_row, stop - first_row)
  return chunk[tuple(slice(*bounds) for bounds in (rows, *others))]


def _dequantised(
  tensor: Tensor, region: Region, value: np.ndarray, scale: np.ndarray
) -> np.ndarray:
  """Values * scales, float32, of a piece; in numpy."""
  rows, columns = (
    hf_pieces.numbers(tensor, region, axis) // hf_pieces.BLOCK
    for axis in (0, 1)
  )
  wide = value.astype(np.float32).reshape(len(rows), len(columns))
  return (wide * scale[rows][:, columns]).reshape(value.shape)


@functools.partial(jax.jit, static_argnames=('order',), donate_argnums=0)
def _update(
  buffer: Array, value: Array, start: Array, *, order: tuple[int, ...]
) -> Array:
  """`buffer` with a transposed piece written from `start` on."""
  value = value.transpose(order).astype(buffer.dtype)
  value = value.reshape((1,) * (buffer.ndim - value.ndim) + value.shape)
  place = tuple(start[axis] for axis in range(buffer.ndim))
  if buffer.dtype != jnp.float8_e4m3fn:
    return jax.lax.dynamic_update_slice(buffer, value, place)
  # As bytes: XLA's CPU compiler would widen the whole buffer and narrow it
  # again at every update.
  buffer, value = (
    jax.lax.bitcast_convert_type(x, jnp.uint8) for x in (buffer, value)
  )
  whole = jax.lax.dynamic_update_slice(buffer, value, place)
  return jax.lax.bitcast_convert_type(whole, jnp.float8_e4m3fn)


@functools.partial(
  jax.jit, static_argnames=('shape', 'order'), donate_argnums=0
)
def _update_dequantised(
  buffer: Array,
  value: Array,
  scale: Array,
  rows: Array,
  columns: Array,
  start: Array,
  *,
  shape: tuple[int, ...],
  order: tuple[int, ...],
) -> Array:
  """Likewise, of float8 rows and columns times their blocks' scales."""
  wide = value.astype(jnp.float32) * scale[rows][:, columns]
  return _update(buffer, wide.reshape(shape), start, order=order)
