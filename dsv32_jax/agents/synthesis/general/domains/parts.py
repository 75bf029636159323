"""Short forms of what domains are written with."""

from dsv32_jax.agents.synthesis.general.constraints import Compare
from dsv32_jax.agents.synthesis.general.schema import Column


def number(name: str, says: str, low: int, high: int, step: int = 1) -> Column:
  """A number that it makes no sense to add up."""
  return Column(name=name, says=says, low=low, high=high, step=step)


def amount(name: str, says: str, low: int, high: int, step: int = 1) -> Column:
  """A number to add up; with others that are called the same."""
  return Column(
    name=name, says=says, low=low, high=high, step=step, is_summed=True
  )


def choice(name: str, *options: str) -> Column:
  """A text out of a few."""
  return Column(name=name, says=name.replace('_', ' '), options=options)


def within(field: str, place: str, table: str = '') -> Compare:
  """The entity of `field` belongs to that of `place`, a field of the row."""
  return Compare(
    first=field,
    first_column=table or place,
    op='==',
    second=place,
    second_column='name',
  )


def same(first: str, second: str, column: str, other: str = '') -> Compare:
  """Two fields' entities agree in a column."""
  return Compare(
    first=first,
    first_column=column,
    op='==',
    second=second,
    second_column=other or column,
  )


def least(first: str, column: str, second: str, other: str) -> Compare:
  """A column of the first is at least a column of the second."""
  return Compare(
    first=first,
    first_column=column,
    op='>=',
    second=second,
    second_column=other,
  )
