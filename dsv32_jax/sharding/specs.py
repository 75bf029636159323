"""Shardings of whole trees: parameters, optimizer state, batches, caches.

Everything follows from logical axes: parameters carry theirs in flax's boxes,
an optimizer's moments have those of the parameter that they belong to, batches
and caches have BATCH first. What does not divide is refused here, from shapes
alone, before anything is compiled or read.

Letters: B batch, T tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dsv32_jax.sharding import axes, rules
from dsv32_jax.sharding.parallel import Parallel, active


def with_shardings(boxed: Any, parallel: Parallel | None) -> Any:
  """Shapes and shardings of variables, from the boxes of `model.init`.

  Args:
    boxed: `jax.eval_shape(model.init, ...)`; leaves in boxes that name their
      logical axes. Leaves without a box are whole.
    parallel: None leaves the shardings out.

  Returns:
    The tree without boxes, of `jax.ShapeDtypeStruct`.

  Raises:
    ValueError: naming a parameter that its mesh axes cannot divide.
  """
  if parallel is None:
    return nn.meta.unbox(boxed)

  def place(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
    shape = leaf.value if _is_box(leaf) else leaf
    names = leaf.names if _is_box(leaf) else (None,) * len(shape.shape)
    rules.check_divides(
      parallel.rules,
      parallel.mesh,
      shape.shape,
      names,
      what=jax.tree_util.keystr(path, simple=True, separator='/'),
    )
    return jax.ShapeDtypeStruct(
      shape.shape, shape.dtype, sharding=parallel.sharding(*names)
    )

  return jax.tree_util.tree_map_with_path(place, boxed, is_leaf=_is_box)


def _is_box(leaf: Any) -> bool:
  return isinstance(leaf, nn.LogicallyPartitioned)


def of_leaves(tree: Any) -> Any:
  """The shardings of placed arrays or shapes, as a tree like theirs."""
  return jax.tree.map(lambda leaf: leaf.sharding, tree)


def mirrored(tree: Any, placed: Any, parallel: Parallel | None) -> Any:
  """Shardings of a tree that holds arrays of another one, as moments do.

  Args:
    tree: shapes of an optimizer state.
    placed: the parameters that it was made for, or their shapes, with
      shardings.
    parallel: None gives None for every leaf.

  Returns:
    For every leaf of `tree` the sharding of the leaf of `placed` whose path its
    own path ends with, if the shapes agree; else it is whole (counts).
  """
  if parallel is None:
    return jax.tree.map(lambda leaf: None, tree)
  known = {
    _parts(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(placed)
  }
  whole = NamedSharding(parallel.mesh, PartitionSpec())

  def find(path: tuple, leaf: Any) -> Any:
    parts = _parts(path)
    for start in range(len(parts)):
      found = known.get(parts[start:])
      if found is not None and found.shape == leaf.shape:
        return found.sharding
    return whole

  return jax.tree_util.tree_map_with_path(find, tree)


def _parts(path: tuple) -> tuple[str, ...]:
  return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def constrain(tree: Any, shardings: Any) -> Any:
  """A tree inside jit, laid out as a tree of shardings says; None for as is."""
  if shardings is None:
    return tree
  return jax.tree.map(jax.lax.with_sharding_constraint, tree, shardings)


def rows(parallel: Parallel, ndim: int) -> NamedSharding:
  """Of an input whose first axis is the rows of a batch.

  Tokens of a row are together: the step puts them in another order before it
  cuts them over `context`.
  """
  return parallel.sharding(axes.BATCH, *([None] * (ndim - 1)))


def padded_rows(arrays: Mapping[str, Any]) -> dict[str, Any]:
  """Rows of an evaluation on the devices of the active layout.

  Args:
    arrays: by name, [B, ...], the same on every process.

  Returns:
    Them, with rows of zeros (padding: segment 0) at the end up to a multiple of
    the devices that share rows; as they are without an active layout.
  """
  layout = active()
  if layout is None:
    return dict(arrays)
  shards = layout.shards(axes.BATCH)

  def place(value: Any) -> Any:
    value = np.asarray(value)
    missing = -value.shape[0] % shards
    value = np.pad(value, [(0, missing)] + [(0, 0)] * (value.ndim - 1))
    return jax.device_put(value, rows(layout, value.ndim))

  return {name: place(value) for name, value in arrays.items()}


def cache(parallel: Parallel, tree: Any) -> Any:
  """Of decoding caches, [B, ...] each; B need not divide over its axes."""

  def place(leaf: Any) -> NamedSharding:
    names = (axes.BATCH, *([None] * (len(leaf.shape) - 1)))
    return NamedSharding(
      parallel.mesh, parallel.fitting_spec(leaf.shape, *names)
    )

  return jax.tree.map(place, tree)


def check_batch(
  parallel: Parallel | None,
  *,
  batch_size: int,
  seq_len: int,
  micro_batches: int = 1,
  where: str = '',
) -> None:
  """Refuses a batch that the devices cannot share equally.

  Args:
    parallel: None takes everything.
    batch_size: rows of the global batch.
    seq_len: tokens a row.
    micro_batches: parts that a batch is cut into; each is spread over all
      devices.
    where: prefix of the fields in the message.

  Raises:
    ValueError: naming the field, the mesh axes and the numbers.
  """
  if parallel is None:
    return
  for field, value, per, logical, chunks in (
    ('batch_size', batch_size, micro_batches, axes.BATCH, 1),
    # Zigzag order: two chunks a device.
    ('seq_len', seq_len, 1, axes.SEQUENCE, 2),
  ):
    shards = parallel.shards(logical)
    if shards == 1:
      continue
    if value % (per * shards * chunks):
      parts = f'{shards} devices of mesh axes {_listed(parallel, logical)}'
      if per > 1:
        parts = f'{per} micro_batches x {parts}'
      if chunks > 1:
        parts = f'{chunks} chunks x {parts}'
      raise ValueError(
        f'{where}{field}: got {value}, expected a multiple of '
        f'{per * shards * chunks} ({parts}, rules {parallel.rules.name!r})'
      )


def _listed(parallel: Parallel, logical: str) -> str:
  return ' x '.join(
    f'{name} {parallel.mesh.shape[name]}' for name in parallel.axes_of(logical)
  )


def bytes_a_device(tree: Any) -> int:
  """Bytes that one device holds of placed arrays or shapes."""
  return sum(
    _product(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def _product(sizes: Sequence[int] | Iterable[int]) -> int:
  total = 1
  for size in sizes:
    total *= size
  return total
