"""Constraints of tasks of the general family, as data.

Each is a frozen value that turns into JSON and back. What they mean is written
three times, on purpose: in SQL's terms by the verifier, as a search by the
solver, and as Python that only calls tools by the reference solution. A mistake
in one does not hide in another.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

Op = Literal['<=', '>=', '==', '!=']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
  """In each row, a column of one field's entity against another's."""

  first: str
  first_column: str
  op: Op
  second: str
  second_column: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distinct:
  """No repetition: of any entity in `fields`, or of them taken together."""

  fields: tuple[str, ...]
  together: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
  """A column of a field's entity against a value, in one row (or all: -1)."""

  row: int
  field: str
  column: str
  op: Op
  value: int | str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sum:
  """A column, added up over fields of one row, or of all rows (-1)."""

  row: int
  terms: tuple[tuple[str, str], ...]
  op: Op
  value: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branch:
  """Further bounds of a row, by the band that a number of it falls in.

  Attributes:
    row: index.
    field: whose entity decides.
    column: the number that decides.
    limits: ascending; band i holds numbers from limits[i - 1] up to below
      limits[i].
    cases: for each band, one more than limits: bounds of the same row.
  """

  row: int
  field: str
  column: str
  limits: tuple[int, ...]
  cases: tuple[tuple[Bound, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Count:
  """In how many rows a column of a field's entity has a value."""

  field: str
  column: str
  value: str
  op: Op
  number: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
  """A number never falls ('up') or never rises ('down') from row to row."""

  field: str
  column: str
  direction: Literal['up', 'down']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
  """At most `number` rows share one value of a column."""

  field: str
  column: str
  number: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listed:
  """A fact about two fields' entities of the same row, in all rows."""

  relation: str
  first: str
  second: str
  column: str
  op: Op
  value: int | str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Route:
  """A fact about one field's entities in successive rows: each, or the sum."""

  relation: str
  field: str
  column: str
  each: bool
  op: Op
  value: int


Constraint = (
  Compare
  | Distinct
  | Bound
  | Sum
  | Branch
  | Count
  | Order
  | Spread
  | Listed
  | Route
)

FAMILIES: dict[str, type] = {
  'compare': Compare,
  'distinct': Distinct,
  'bound': Bound,
  'sum': Sum,
  'branch': Branch,
  'count': Count,
  'order': Order,
  'spread': Spread,
  'listed': Listed,
  'route': Route,
}
"""Every kind of constraint by its name in JSON."""

_NAMES = {kind: name for name, kind in FAMILIES.items()}


def family(constraint: Constraint) -> str:
  """The name of a constraint's kind."""
  return _NAMES[type(constraint)]


def to_json(constraint: Constraint) -> dict[str, Any]:
  """A constraint as JSON."""
  return {'family': family(constraint), **dataclasses.asdict(constraint)}


def from_json(value: Mapping[str, Any]) -> Constraint:
  """A constraint from `to_json`'s form, or from what a model wrote.

  Raises:
    ValueError: of no known kind, or with other fields than its kind has.
  """
  kind = FAMILIES.get(str(value.get('family')))
  if kind is None:
    raise ValueError(
      f'family: got {value.get("family")!r}, expected one of {list(FAMILIES)}'
    )
  _check_op(value)
  known = {field.name: field for field in dataclasses.fields(kind)}
  given = {
    name: _frozen(one) for name, one in value.items() if name != 'family'
  }
  needed = {
    name
    for name, field in known.items()
    if field.default is dataclasses.MISSING
  }
  if not needed <= set(given) <= set(known):
    raise ValueError(
      f'{value["family"]}: got fields {sorted(given)}, expected {sorted(known)}'
    )
  if kind is Branch:
    given['cases'] = tuple(
      tuple(_bound(one) for one in case) for case in value['cases']
    )
  return kind(**given)


def _check_op(value: Mapping[str, Any]) -> None:
  if value.get('op', '==') not in get_args(Op):
    raise ValueError(
      f'op: got {value["op"]!r}, expected one of {list(get_args(Op))}'
    )


def _bound(value: Mapping[str, Any]) -> Bound:
  _check_op(value)
  return Bound(**{name: value[name] for name in _BOUND_FIELDS})


_BOUND_FIELDS = tuple(field.name for field in dataclasses.fields(Bound))


def _frozen(value: Any) -> Any:
  if isinstance(value, list | tuple):
    return tuple(_frozen(one) for one in value)
  return value
