"""What a domain of the general family is made of.

A domain is data: tables, relations between two entities, and the fields of an
answer. A task of it asks for one row for each given entity (a date, a course,
an order), each field naming an entity of a table.
"""

import dataclasses
from typing import Literal

from dsv32_jax.agents.synthesis.general.constraints import Constraint

KEY = 'name'
"""The column that names an entity."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
  """A column and what it is filled with.

  Attributes:
    name: of the column.
    says: how a prompt calls it.
    low: least number.
    high: greatest number.
    step: numbers are multiples of it above `low`.
    options: the texts to draw from instead of numbers.
    is_summed: adding it up over fields makes sense (a price, not a rating).
  """

  name: str
  says: str
  low: int = 0
  high: int = 0
  step: int = 1
  options: tuple[str, ...] = ()
  is_summed: bool = False

  @property
  def is_number(self) -> bool:
    return not self.options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
  """Entities of one kind.

  Attributes:
    name: of the table, singular; also of the column that refers to it.
    plural: as in the name of its tool.
    columns: besides the name and the parent.
    parent: the table that each entity belongs to, or ''.
    count: least and most entities, for each entity of the parent.
    names: first and last parts to make names of; with only first parts, those
      are the names. The word 'places' stands for real cities.
  """

  name: str
  plural: str
  columns: tuple[Column, ...]
  parent: str = ''
  count: tuple[int, int] = (6, 9)
  names: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

  def column(self, name: str) -> Column:
    """A column by its name.

    Raises:
      KeyError: there is none.
    """
    for column in self.columns:
      if column.name == name:
        return column
    raise KeyError(f'{self.name} has no column {name}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relation:
  """Facts about pairs of entities.

  Attributes:
    name: of the table and, after 'get_', of its tool.
    first: table of the first entity.
    second: table of the second; with the same one, the facts are symmetric.
    columns: of a pair.
    says: how a prompt names it.
    kind: 'drawn' at random, or 'distance' by the places' coordinates.
  """

  name: str
  first: str
  second: str
  columns: tuple[Column, ...]
  says: str
  kind: Literal['drawn', 'distance'] = 'drawn'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Field:
  """A field of a row of an answer: the name of an entity of `table`."""

  name: str
  table: str
  says: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Domain:
  """A kind of environment.

  Attributes:
    name: of the domain.
    tables: parents before what belongs to them.
    relations: of pairs.
    given: the field that the task fills in; one entity a row.
    fields: those to be answered, in the order in which a person would.
    rows: least and most rows.
    base: what every task of it asks; each entity is in its place.
    openings: the first sentences of a prompt; `{rows}` is how many.
    branch: field and column of the conditions that branch, or None.
  """

  name: str
  tables: tuple[Table, ...]
  relations: tuple[Relation, ...] = ()
  given: Field
  fields: tuple[Field, ...]
  rows: tuple[int, int] = (3, 4)
  base: tuple[Constraint, ...]
  openings: tuple[str, ...]
  branch: tuple[str, str] | None = None

  def table(self, name: str) -> Table:
    """A table by its name."""
    return next(table for table in self.tables if table.name == name)

  def relation(self, name: str) -> Relation:
    """A relation by its name."""
    return next(one for one in self.relations if one.name == name)

  def field(self, name: str) -> Field:
    """A field by its name, the given one among them."""
    return next(
      field for field in (self.given, *self.fields) if field.name == name
    )

  def table_of(self, field: str) -> Table:
    """The table that a field's entities are of."""
    return self.table(self.field(field).table)
