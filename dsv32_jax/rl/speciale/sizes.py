"""Counts in configurations."""

import dataclasses
from typing import Any


def check_positive(config: Any, *names: str) -> None:
  """Refuses a field that is not a positive integer.

  Args:
    config: a dataclass.
    *names: of its fields; all if none is given.

  Raises:
    ValueError: naming the field.
  """
  for name in names or [field.name for field in dataclasses.fields(config)]:
    value = getattr(config, name)
    if type(value) is not int or value < 1:
      raise ValueError(f'{name}: got {value!r}, expected an integer >= 1')
