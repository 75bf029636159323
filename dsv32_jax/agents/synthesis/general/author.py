"""The procedural author of general tasks: a seeded program, no model.

It draws conditions that one hidden answer meets, so that they can hold
together; that they do is proved by the solver, which does not know that answer.
"""

import itertools
import random
from collections.abc import Sequence
from typing import Any

from dsv32_jax.agents.synthesis.general import constraints as c
from dsv32_jax.agents.synthesis.general.baselines import Answer
from dsv32_jax.agents.synthesis.general.data import Rows
from dsv32_jax.agents.synthesis.general.schema import KEY, Domain
from dsv32_jax.agents.synthesis.roles import AuthorError, Draft

# Kinds of conditions by the level that brings them in.
_LEVELS = (
  ('bound',),
  ('row_sum', 'count', 'bound'),
  ('listed', 'order', 'spread', 'row_sum'),
  ('branch', 'total', 'route'),
)
_TRIES = 12


class ProceduralAuthor:
  """Draws conditions around a hidden answer.

  Args:
    domain: of the environment.
    rows: its data.
    given: the given field of each row.
    hidden: the answer that every condition leaves standing.
    rng: of all draws.
  """

  def __init__(
    self,
    domain: Domain,
    rows: Rows,
    given: Sequence[str],
    hidden: Answer,
    rng: random.Random,
  ):
    self._domain = domain
    self._given = given
    self._rng = rng
    entities = {
      table.name: {row[KEY]: row for row in rows[table.name]}
      for table in domain.tables
    }
    self._facts = {
      relation.name: {
        (row['first'], row['second']): row for row in rows[relation.name]
      }
      for relation in domain.relations
    }
    self._rows = rows
    # For each row of the answer, its entities by field.
    self._cells = [
      {
        field.name: entities[field.table][row[field.name]]
        for field in (domain.given, *domain.fields)
      }
      for row in hidden
    ]

  @property
  def name(self) -> str:
    return 'procedural'

  def propose(self) -> Draft:
    return self.harden([], 1)

  def repair(self, draft: Draft, complaint: str) -> Draft:
    """Takes the last condition back."""
    if len(draft) < 2:
      raise AuthorError(f'nothing is left to take back: {complaint}')
    return draft[:-1]

  def harden(self, draft: Draft, level: int) -> Draft:
    kinds = _LEVELS[min(level, len(_LEVELS)) - 1]
    for _ in range(_TRIES):
      kind = self._rng.choice(kinds)
      found: c.Constraint | None = getattr(self, f'_{kind}')()
      if found is not None and not _repeats(draft, c.to_json(found)):
        return [*draft, c.to_json(found)]
    raise AuthorError(f'level {level}: no condition of {kinds} found')

  def pinning(self, row: int, field: str) -> list[c.Constraint]:
    """Conditions that few answers near the hidden one meet, gentlest first.

    Args:
      row: where a neighbour differs from it.
      field: in which field.
    """
    found = [x for _ in range(5) if (x := self._row_sum()) is not None]
    found += [x for _ in range(3) if (x := self._total(exact=True))]
    for column in self._domain.table_of(field).columns:
      value = self._cells[row][field][column.name]
      for op in ('<=', '>=') if column.is_number else ('==',):
        found.append(
          c.Bound(row=row, field=field, column=column.name, op=op, value=value)
        )
    return found

  def _columns(self, field: str, *, number: bool, summed: bool = False):
    return [
      column
      for column in self._domain.table_of(field).columns
      if column.is_number == number and (column.is_summed or not summed)
    ]

  def _cell(self, *, number: bool) -> tuple[str, Any] | None:
    """A field to be answered and one of its columns."""
    options = [
      (field.name, column)
      for field in self._domain.fields
      for column in self._columns(field.name, number=number)
    ]
    return self._rng.choice(options) if options else None

  def _slack(self, value: int, scale: int) -> int:
    """A little of the scale, rounded to what people say."""
    amount = self._rng.random() * 0.12 * max(scale, 1)
    unit = 50 if scale > 1500 else 10 if scale > 150 else 1
    return round(amount / unit) * unit

  def _limited(self, value: int, scale: int) -> tuple[c.Op, int]:
    slack = self._slack(value, scale)
    if self._rng.random() < 0.65:
      return '<=', value + slack
    return '>=', value - slack

  def _bound(self) -> c.Constraint | None:
    is_number = self._rng.random() < 0.7
    cell = self._cell(number=is_number)
    if cell is None:
      return None
    field, column = cell
    row = self._rng.randrange(len(self._cells))
    value = self._cells[row][field][column.name]
    if is_number:
      op, limit = self._limited(value, column.high - column.low)
      return c.Bound(
        row=row, field=field, column=column.name, op=op, value=limit
      )
    if self._rng.random() < 0.6:
      return c.Bound(
        row=row, field=field, column=column.name, op='==', value=value
      )
    other = self._rng.choice([x for x in column.options if x != value])
    return c.Bound(
      row=row, field=field, column=column.name, op='!=', value=other
    )

  def _terms(self) -> tuple[tuple[str, str], ...]:
    """Fields whose columns of one meaning may be added up."""
    options: dict[str, list[tuple[str, str]]] = {}
    for field in self._domain.fields:
      for column in self._columns(field.name, number=True, summed=True):
        options.setdefault(column.says, []).append((field.name, column.name))
    if not options:
      return ()
    terms = options[self._rng.choice(sorted(options))]
    size = self._rng.randint(min(2, len(terms)), len(terms))
    chosen = self._rng.sample(terms, size)
    return tuple(term for term in terms if term in chosen)

  def _sum(self, rows: Sequence[dict], terms) -> int:
    return sum(row[field][column] for row in rows for field, column in terms)

  def _row_sum(self) -> c.Constraint | None:
    terms = self._terms()
    if len(terms) < 2:
      return None
    row = self._rng.randrange(len(self._cells))
    total = self._sum([self._cells[row]], terms)
    op, limit = self._limited(total, total)
    return c.Sum(row=row, terms=terms, op=op, value=limit)

  def _total(self, *, exact: bool = False) -> c.Constraint | None:
    terms = self._terms()
    if not terms:
      return None
    total = self._sum(self._cells, terms)
    if exact:
      return c.Sum(row=-1, terms=terms, op='==', value=total)
    op, limit = self._limited(total, total // 2)
    return c.Sum(row=-1, terms=terms, op=op, value=limit)

  def _branch(self) -> c.Constraint | None:
    if self._domain.branch is None:
      return None
    field, name = self._domain.branch
    column = self._domain.table_of(field).column(name)
    span = column.high - column.low
    limits = tuple(
      column.low + round(span * part / column.step) * column.step
      for part in (0.35, 0.7)
    )
    row = self._rng.randrange(len(self._cells))
    band = sum(self._cells[row][field][name] >= x for x in limits)
    cases = []
    for number in range(3):
      # Bands that the hidden answer is not in may ask what they like.
      at = row if number == band else self._rng.randrange(len(self._cells))
      bounds: dict[tuple[str, str], c.Bound] = {}
      wanted = self._rng.randint(1, 2)
      for _ in range(_TRIES):
        cell = self._cell(number=True)
        if cell is None or cell[0] == field or len(bounds) == wanted:
          continue
        other, what = cell
        value = self._cells[at][other][what.name]
        op, limit = self._limited(value, what.high - what.low)
        bounds[other, what.name] = c.Bound(
          row=row, field=other, column=what.name, op=op, value=limit
        )
      cases.append(tuple(bounds.values()))
    if not cases[band]:
      return None
    return c.Branch(
      row=row, field=field, column=name, limits=limits, cases=tuple(cases)
    )

  def _count(self) -> c.Constraint | None:
    cell = self._cell(number=False)
    if cell is None:
      return None
    field, column = cell
    value = self._rng.choice(column.options)
    number = sum(row[field][column.name] == value for row in self._cells)
    ops: list[c.Op] = ['==', '<=', '>=' if number else '==']
    op = self._rng.choice(ops)
    return c.Count(
      field=field, column=column.name, value=value, op=op, number=number
    )

  def _order(self) -> c.Constraint | None:
    cell = self._cell(number=True)
    if cell is None:
      return None
    field, column = cell
    values = [row[field][column.name] for row in self._cells]
    if values == sorted(values):
      return c.Order(field=field, column=column.name, direction='up')
    if values == sorted(values, reverse=True):
      return c.Order(field=field, column=column.name, direction='down')
    return None

  def _spread(self) -> c.Constraint | None:
    cell = self._cell(number=False)
    if cell is None:
      return None
    field, column = cell
    values = [row[field][column.name] for row in self._cells]
    most = max(map(values.count, values))
    if most == len(values):
      return None
    return c.Spread(field=field, column=column.name, number=most)

  def _listed(self) -> c.Constraint | None:
    options = [
      (relation, first.name, second.name)
      for relation in self._domain.relations
      for first in (self._domain.given, *self._domain.fields)
      for second in (self._domain.given, *self._domain.fields)
      if (first.table, second.table) == (relation.first, relation.second)
      and first.name != second.name
    ]
    if not options:
      return None
    relation, first, second = self._rng.choice(options)
    column = self._rng.choice(relation.columns)
    facts = [
      self._facts[relation.name][row[first][KEY], row[second][KEY]][column.name]
      for row in self._cells
    ]
    if relation.kind == 'distance' or column.is_number:
      up = self._rng.random() < 0.5
      op, value = ('<=', max(facts)) if up else ('>=', min(facts))
    else:
      unused = [x for x in column.options if x not in facts]
      if not unused:
        return None
      op, value = '!=', self._rng.choice(unused)
    return c.Listed(
      relation=relation.name,
      first=first,
      second=second,
      column=column.name,
      op=op,
      value=value,
    )

  def _route(self) -> c.Constraint | None:
    options = [
      (relation, field.name)
      for relation in self._domain.relations
      for field in self._domain.fields
      if relation.first == relation.second == field.table
    ]
    if not options:
      return None
    relation, field = self._rng.choice(options)
    column = self._rng.choice(relation.columns)
    names = [row[field][KEY] for row in self._cells]
    legs = [
      self._facts[relation.name][pair][column.name]
      for pair in itertools.pairwise(names)
    ]
    each = self._rng.random() < 0.4
    value = max(legs) if each else sum(legs)
    return c.Route(
      relation=relation.name,
      field=field,
      column=column.name,
      each=each,
      op='<=',
      value=value + self._slack(value, value),
    )


def _repeats(draft: Draft, new: dict[str, Any]) -> bool:
  """Whether it speaks of the same thing as one that is there."""
  ignored = ('op', 'value', 'number', 'limits', 'cases')

  def about(one: dict[str, Any]) -> str:
    return str({k: v for k, v in one.items() if k not in ignored})

  return about(new) in map(about, draft)
