"""Between nested dicts (JSON, overrides) and config dataclasses."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any


def to_dict(config: Any) -> dict:
  """Returns the nested dict of a config dataclass; tuples stay tuples."""
  return {
    field.name: plain(getattr(config, field.name))
    for field in dataclasses.fields(config)
  }


def plain(value: Any) -> Any:
  """A value of a config without dataclasses and lists in it."""
  if dataclasses.is_dataclass(value):
    return to_dict(value)
  if isinstance(value, Mapping):
    return {key: plain(item) for key, item in value.items()}
  if isinstance(value, (tuple, list)):
    return tuple(plain(item) for item in value)
  return value


def from_dict(cls: type, values: Mapping, *, path: str = '') -> Any:
  """Builds a config dataclass from a nested dict.

  Args:
    cls: the dataclass to build.
    values: nested mapping; missing fields take their defaults, JSON lists
      become tuples.
    path: name of this place in the whole config, for messages.

  Returns:
    An instance of `cls`.

  Raises:
    ValueError: naming the field by its path, for an unknown or missing field
      and for whatever the dataclass itself refuses.
  """
  if not isinstance(values, Mapping):
    raise ValueError(
      f'{path or cls.__name__}: got {values!r}, expected the fields of '
      f'{cls.__name__}'
    )
  fields = {field.name: field for field in dataclasses.fields(cls)}
  unknown = [name for name in values if name not in fields]
  if unknown:
    raise ValueError(
      f'{_join(path, unknown[0])}: unknown field; {cls.__name__} has '
      f'{", ".join(sorted(fields))}'
    )
  missing = [
    name
    for name, field in fields.items()
    if name not in values
    and field.default is dataclasses.MISSING
    and field.default_factory is dataclasses.MISSING
  ]
  if missing:
    raise ValueError(f'{_join(path, missing[0])}: missing; expected a value')
  built = {
    name: _build(fields[name].type, value, _join(path, name))
    for name, value in values.items()
  }
  try:
    return cls(**built)
  except ValueError as error:
    raise ValueError(f'{path}: {error}' if path else str(error)) from None


def _join(path: str, name: str) -> str:
  return f'{path}.{name}' if path else name


def _build(kind: Any, value: Any, path: str) -> Any:
  origin = typing.get_origin(kind)
  arguments = typing.get_args(kind)
  if origin in (typing.Union, types.UnionType):
    if value is None:
      return None
    inner = [option for option in arguments if option is not type(None)]
    return _build(inner[0], value, path) if len(inner) == 1 else value
  if dataclasses.is_dataclass(kind):
    if dataclasses.is_dataclass(value):
      return value
    return from_dict(typing.cast(type, kind), value, path=path)
  if origin is tuple and isinstance(value, (tuple, list)):
    return tuple(
      _build(arguments[0], item, f'{path}[{index}]')
      for index, item in enumerate(value)
    )
  if origin is dict and isinstance(value, Mapping):
    return {
      key: _build(arguments[1], item, _join(path, key))
      for key, item in value.items()
    }
  return value
