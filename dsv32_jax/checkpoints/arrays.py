"""State trees as named arrays: what Orbax stores, and what a template expects.

A tree is stored as nested dicts of arrays whose keys are the parts of each
leaf's path. Dataclasses, optax's named tuples and its masked nodes then need
no support from the file format; the template brings them back.
"""

import base64
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# {name: (shape, dtype)}; kept beside the arrays.
Table = dict[str, tuple[tuple[int, ...], str]]
_LISTED = 3


def named_leaves(tree: Any) -> dict[tuple[str, ...], Any]:
  """The leaves of a tree by path.

  Args:
    tree: any pytree of jax or numpy arrays, or of `jax.ShapeDtypeStruct`.

  Returns:
    {path: leaf}; numpy scalars are 0-d arrays.

  Raises:
    ValueError: naming a leaf that is no array.
  """
  leaves = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    parts = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
    if isinstance(leaf, (np.generic, np.ndarray)):
      leaf = np.asarray(leaf)
    elif not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)) or (
      jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    ):
      raise ValueError(
        f'{name_of(parts)}: got {type(leaf).__name__}, expected a numeric array'
      )
    leaves[parts] = leaf
  return leaves


def name_of(path: tuple[str, ...]) -> str:
  return '/'.join(path)


def table(leaves: Mapping[tuple[str, ...], Any]) -> Table:
  """Shapes and dtypes by name."""
  return {
    name_of(path): (tuple(leaf.shape), np.dtype(leaf.dtype).name)
    for path, leaf in leaves.items()
  }


def num_bytes(tree: Any) -> int:
  """Size of all arrays of a tree, were they on one device."""
  return sum(
    int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize
    for leaf in named_leaves(tree).values()
  )


def nest(leaves: Mapping[tuple[str, ...], Any]) -> dict:
  """Nested dicts from a dict by path."""
  root: dict = {}
  for path, leaf in leaves.items():
    node = root
    for part in path[:-1]:
      node = node.setdefault(part, {})
    node[path[-1]] = leaf
  return root


def flatten(tree: Mapping, path: tuple[str, ...] = ()) -> dict:
  """Undoes `nest`."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat.update(flatten(value, (*path, key)))
    else:
      flat[(*path, key)] = value
  return flat


def refuse_mismatch(stored: Table, expected: Table, *, where: str) -> None:
  """Refuses a checkpoint whose arrays are not those that are expected.

  Args:
    stored: of the checkpoint.
    expected: of the template.
    where: the checkpoint, for the message.

  Raises:
    ValueError: naming arrays with both shapes, arrays that the checkpoint
      lacks and arrays that it has too many.
  """
  changed = [
    f'{name} is {describe(stored[name])}, expected {describe(value)}'
    for name, value in expected.items()
    if name in stored and stored[name] != value
  ]
  missing = [
    f'{name} is missing, expected {describe(value)}'
    for name, value in expected.items()
    if name not in stored
  ]
  unknown = [
    f'{name} {describe(value)} is not part of the model or optimizer'
    for name, value in stored.items()
    if name not in expected
  ]
  problems = changed + missing + unknown
  if problems:
    more = len(problems) - _LISTED
    listed = '; '.join(problems[:_LISTED]) + (
      f'; and {more} more' if more > 0 else ''
    )
    raise ValueError(f'checkpoint {where} does not fit: {listed}')


def describe(entry: tuple[tuple[int, ...], str]) -> str:
  shape, dtype = entry
  return f'{list(shape)} {dtype}'


def to_json(value: Any) -> Any:
  """JSON-able form of nested dicts, lists and bytes (iterator states)."""
  return _map_json(value, _encode)


def from_json(value: Any) -> Any:
  """Undoes `to_json`; tuples come back as lists."""
  return _map_json(value, _decode)


def _map_json(value: Any, convert: Callable) -> Any:
  converted = convert(value)
  if converted is not value:
    return converted
  if isinstance(value, Mapping):
    return {str(key): _map_json(item, convert) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_map_json(item, convert) for item in value]
  return value


def _encode(value: Any) -> Any:
  if isinstance(value, bytes):
    return {'base64': base64.b64encode(value).decode('ascii')}
  return value


def _decode(value: Any) -> Any:
  if isinstance(value, Mapping) and set(value) == {'base64'}:
    return base64.b64decode(value['base64'])
  return value
