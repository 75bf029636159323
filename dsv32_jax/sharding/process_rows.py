"""Which rows of a batch a process holds, and how they become one array.

And back: how a process reads an array whose parts are with others.

Letters: B batch.
"""

import itertools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec


def of(
  sharding: NamedSharding,
  batch_size: int,
  *,
  devices: Collection[jax.Device] | None = None,
) -> tuple[int, int]:
  """The rows that a process's devices need.

  Processes that a context or tensor axis runs across need the same rows.

  Args:
    sharding: of a batch; its first dimension is that of the rows.
    batch_size: rows of the batch of all processes.
    devices: of the process; None takes this one's.

  Returns:
    First row and number of rows.

  Raises:
    ValueError: if the rows don't divide over the mesh, or the process's devices
      hold rows that do not follow on one another.
  """
  parts = _parts(sharding)
  if batch_size % parts:
    raise ValueError(
      f'batch_size: got {batch_size}, expected a multiple of the {parts} '
      f'devices along mesh axes {", ".join(_axes(sharding))}'
    )
  by_row = PartitionSpec(*sharding.spec[:1])
  indices = NamedSharding(sharding.mesh, by_row).devices_indices_map(
    (batch_size,)
  )
  if devices is None:
    devices = sharding.addressable_devices
  pieces = sorted(
    {indices[device][0].indices(batch_size)[:2] for device in devices}
  )
  for (_, end), (start, _) in itertools.pairwise(pieces):
    if end != start:
      raise ValueError(
        f'mesh: a process holds the rows up to {end} and from {start} on, '
        'expected consecutive rows; order the devices by process'
      )
  start, end = pieces[0][0], pieces[-1][1]
  return start, end - start


def place(
  rows: Mapping[str, np.ndarray], sharding: Callable[[int], NamedSharding]
) -> dict[str, jax.Array]:
  """Makes the arrays of all processes from the rows that this one has.

  Args:
    rows: arrays of [rows of this process, ...].
    sharding: of the whole arrays, by their number of dimensions; all cut the
      first one alike, and may cut others.

  Raises:
    ValueError: if this process's rows don't divide over its devices.
  """

  def array(name: str, value: np.ndarray) -> jax.Array:
    layout = sharding(value.ndim)
    parts = _parts(layout)
    first_part, count = of(layout, parts)
    if value.shape[0] % count:
      raise ValueError(
        f'batch_size: got {value.shape[0]} rows of {name!r} in this process, '
        f'expected a multiple of its {count} devices along mesh axes '
        f'{", ".join(_axes(layout))}'
      )
    share = value.shape[0] // count
    batch_size = share * parts

    def piece(index: Any) -> np.ndarray:
      start, end, _ = index[0].indices(batch_size)
      first = first_part * share
      return value[(slice(start - first, end - first), *index[1:])]

    shape = (batch_size, *value.shape[1:])
    # A transfer that is meant, though jax's guard would not know.
    with jax.transfer_guard('allow'):
      return jax.make_array_from_callback(shape, layout, piece)

  return {name: array(name, value) for name, value in rows.items()}


def gathered(array: jax.Array) -> np.ndarray:
  """All of a small array on every process, which all call this.

  Args:
    array: spread over the devices of all processes, or this one's own.
  """
  if array.is_fully_addressable or array.is_fully_replicated:
    return np.asarray(array)
  return multihost_utils.process_allgather(array, tiled=True)


def _axes(sharding: NamedSharding) -> tuple[str, ...]:
  """Mesh axes that cut the rows."""
  names = sharding.spec[0] if sharding.spec else None
  return (names,) if isinstance(names, str) else tuple(names or ())


def _parts(sharding: NamedSharding) -> int:
  return math.prod(sharding.mesh.shape[name] for name in _axes(sharding))
