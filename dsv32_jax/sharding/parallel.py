"""What the code that is being traced is laid out over: a mesh and its rules.

Modules are written for one device. Where they must know more (an activation's
layout, a region that talks to other devices), they ask `active()`; without an
active layout every function here does nothing. A jitted function must be traced
under one layout only, as with `flax.linen.logical_axis_rules`.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from dsv32_jax.sharding.rules import RuleSet


@dataclasses.dataclass(frozen=True)
class Parallel:
  """A mesh and the rules that lay arrays out over it.

  Attributes:
    mesh: with the axes of `rules.MESH_AXES`, all Auto.
    rules: a named rule set.
    exchange: how tokens travel to their experts, see `MeshConfig`.
  """

  mesh: Mesh | AbstractMesh
  rules: RuleSet
  exchange: Literal['dense', 'ragged'] = 'dense'

  def size(self, *names: str) -> int:
    """Devices along some mesh axes."""
    return math.prod(self.mesh.shape[name] for name in names)

  def axes_of(self, logical: str) -> tuple[str, ...]:
    """Mesh axes of more than one device that a logical axis is cut over."""
    names = self.rules.mesh_axes.get(logical, ())
    return tuple(name for name in names if self.mesh.shape[name] > 1)

  def shards(self, logical: str) -> int:
    """Parts that a logical axis is cut into."""
    return self.size(*self.axes_of(logical))

  def fitting_axes(self, logical: str, size: int) -> tuple[str, ...]:
    """The leading ones of `axes_of` that together divide a dim of this size.

    For dims that may not divide (few rows of an evaluation, a first trace with
    one token): what is not cut further is whole on the remaining axes.
    """
    return self._fitting(self.axes_of(logical), size)

  def fitting_spec(
    self, shape: Sequence[int], *logical_axes: str | None
  ) -> PartitionSpec:
    """Like `spec`, each dim cut over leading axes that divide it."""
    entries: list[Any] = []
    for size, names in zip(shape, self.spec(*logical_axes), strict=True):
      names = (names,) if isinstance(names, str) else (names or ())
      names = tuple(name for name in names if self.mesh.shape[name] > 1)
      entries.append(self._fitting(names, size) or None)
    return PartitionSpec(*entries)

  def _fitting(self, names: tuple[str, ...], size: int) -> tuple[str, ...]:
    count = 0
    while count < len(names) and size % self.size(*names[: count + 1]) == 0:
      count += 1
    return names[:count]

  def spec(self, *logical_axes: str | None) -> PartitionSpec:
    """The partition of an array whose dims have these logical axes."""
    return self.rules.spec(logical_axes)

  def sharding(self, *logical_axes: str | None) -> NamedSharding:
    """Likewise, with the mesh."""
    return NamedSharding(self.mesh, self.spec(*logical_axes))


_active: contextvars.ContextVar[Parallel | None] = contextvars.ContextVar(
  'dsv32_jax_parallel', default=None
)


def active() -> Parallel | None:
  """The layout that is being traced for; None on one device."""
  return _active.get()


@contextlib.contextmanager
def use(parallel: Parallel | None) -> Iterator[None]:
  """Makes a layout the active one, and its mesh jax's."""
  token = _active.set(parallel)
  try:
    if parallel is None or isinstance(parallel.mesh, AbstractMesh):
      yield
    else:
      with jax.set_mesh(parallel.mesh):
        yield
  finally:
    _active.reset(token)


def constrain(x: Array, *logical_axes: str | None) -> Array:
  """`x`, laid out as its logical axes say; itself without an active layout.

  A dim that its mesh axes do not divide is cut over those that do.
  """
  parallel = active()
  if parallel is None:
    return x
  spec = parallel.fitting_spec(x.shape, *logical_axes)
  return jax.lax.with_sharding_constraint(x, NamedSharding(parallel.mesh, spec))
