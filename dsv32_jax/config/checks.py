"""Checks that the config dataclasses share."""


def require(condition: bool, message: str) -> None:
  """Raises ValueError with the message unless the condition holds."""
  if not condition:
    raise ValueError(message)


def check_at_least(config: object, least: int | float, *names: str) -> None:
  """Refuses fields below `least`; None is no value to check.

  Raises:
    ValueError: naming the field, its value and the least.
  """
  for name in names:
    value = getattr(config, name)
    require(
      value is None or value >= least,
      f'{name}: got {value}, expected at least {least}',
    )
