"""Judges answers of the general family: a pure function of answer and database.

Reads one entity or pair at a time out of SQLite. Shares no code with the solver
or with reference solutions.
"""

import itertools
import json
import sqlite3
from collections.abc import Sequence
from typing import Any

from dsv32_jax.agents.synthesis.general.constraints import (
  Bound,
  Branch,
  Compare,
  Constraint,
  Count,
  Distinct,
  Listed,
  Order,
  Route,
  Spread,
  Sum,
  family,
)
from dsv32_jax.agents.synthesis.general.schema import KEY, Domain
from dsv32_jax.agents.types import Score

Answer = list[dict[str, str]]


class Verifier:
  """Judges answers over one environment's database.

  Args:
    domain: of the environment.
    database: a connection that is only read.
  """

  def __init__(self, domain: Domain, database: sqlite3.Connection):
    self._domain = domain
    self._database = database
    # A read-only database: what was read once stays true.
    self._entities: dict[tuple[str, str], dict[str, Any] | None] = {}
    self._facts: dict[tuple[str, str, str], dict[str, Any] | None] = {}

  def score(
    self,
    text: str,
    given: Sequence[str],
    constraints: Sequence[Constraint],
  ) -> Score:
    """1 for an answer that meets every constraint, else 0 with the reasons.

    Args:
      text: JSON, a list of one object a row.
      given: what the given field of each row must be.
      constraints: of the task.
    """
    try:
      answer = json.loads(text)
    except (ValueError, RecursionError):
      return Score(reward=0.0, reasons=('answer: not JSON',))
    wrong = self.misfit(answer, given)
    if wrong:
      return Score(reward=0.0, reasons=(wrong,))
    reasons = self.violations(answer, constraints)
    met = 1 - len(reasons) / max(len(constraints), 1)
    return Score(
      reward=float(not reasons), reasons=tuple(reasons), parts={'met': met}
    )

  def misfit(self, answer: Any, given: Sequence[str]) -> str:
    """Why a value is outside of the typed answer space; '' if it is inside."""
    if not isinstance(answer, list) or len(answer) != len(given):
      return f'answer: expected a list of {len(given)} objects'
    names = {self._domain.given.name, *(f.name for f in self._domain.fields)}
    for index, (row, value) in enumerate(zip(answer, given, strict=True)):
      if not isinstance(row, dict) or set(row) != names:
        return f'row {index + 1}: expected the fields {sorted(names)}'
      if row[self._domain.given.name] != value:
        return f'row {index + 1}: {self._domain.given.name} is not {value!r}'
      for field in self._domain.fields:
        name = row[field.name]
        if not isinstance(name, str) or not self._entity(field.table, name):
          return f'row {index + 1}: {field.name}: no {field.table} {name!r}'
    return ''

  def violations(
    self, answer: Answer, constraints: Sequence[Constraint]
  ) -> list[str]:
    """A line for each constraint that an answer in the space breaks."""
    return [
      f'{family(one)} {number} is not met'
      for number, one in enumerate(constraints, start=1)
      if not self.holds(one, answer)
    ]

  def holds(self, constraint: Constraint, answer: Answer) -> bool:
    """Whether an answer in the space meets a constraint."""
    match constraint:
      case Bound(row=-1):
        return all(self._bound(constraint, row) for row in answer)
      case Bound():
        return self._bound(constraint, answer[constraint.row])
      case Compare():
        return all(
          _meets(
            self._value(row, constraint.first, constraint.first_column),
            constraint.op,
            self._value(row, constraint.second, constraint.second_column),
          )
          for row in answer
        )
      case Distinct(together=True):
        rows = [
          tuple(row[name] for name in constraint.fields) for row in answer
        ]
        return len(set(rows)) == len(rows)
      case Distinct():
        names = [row[name] for row in answer for name in constraint.fields]
        return len(set(names)) == len(names)
      case Sum():
        rows = answer if constraint.row < 0 else [answer[constraint.row]]
        total = sum(
          self._value(row, field, column)
          for row in rows
          for field, column in constraint.terms
        )
        return _meets(total, constraint.op, constraint.value)
      case Branch():
        row = answer[constraint.row]
        value = self._value(row, constraint.field, constraint.column)
        band = sum(value >= limit for limit in constraint.limits)
        return all(self._bound(one, row) for one in constraint.cases[band])
      case Count():
        number = sum(
          self._value(row, constraint.field, constraint.column)
          == constraint.value
          for row in answer
        )
        return _meets(number, constraint.op, constraint.number)
      case Order():
        values = [
          self._value(row, constraint.field, constraint.column)
          for row in answer
        ]
        return values == sorted(values, reverse=constraint.direction == 'down')
      case Spread():
        values = [
          self._value(row, constraint.field, constraint.column)
          for row in answer
        ]
        return max(map(values.count, values)) <= constraint.number
      case Listed():
        return all(
          _meets(
            self._fact(
              constraint.relation, row[constraint.first], row[constraint.second]
            )[constraint.column],
            constraint.op,
            constraint.value,
          )
          for row in answer
        )
      case Route():
        names = [row[constraint.field] for row in answer]
        legs = [
          self._fact(constraint.relation, *pair)[constraint.column]
          for pair in itertools.pairwise(names)
        ]
        found = legs if constraint.each else [sum(legs)]
        return all(_meets(x, constraint.op, constraint.value) for x in found)

  def _bound(self, bound: Bound, row: dict[str, str]) -> bool:
    value = self._value(row, bound.field, bound.column)
    return _meets(value, bound.op, bound.value)

  def _value(self, row: dict[str, str], field: str, column: str) -> Any:
    entity = self._entity(self._domain.field(field).table, row[field])
    assert entity is not None, (field, row[field])
    return entity[column]

  def _entity(self, table: str, name: str) -> dict[str, Any] | None:
    if (table, name) not in self._entities:
      self._entities[table, name] = self._read(table, {KEY: name})
    return self._entities[table, name]

  def _fact(self, relation: str, first: str, second: str) -> dict[str, Any]:
    if (relation, first, second) not in self._facts:
      self._facts[relation, first, second] = self._read(
        relation, {'first': first, 'second': second}
      )
    fact = self._facts[relation, first, second]
    assert fact is not None, (relation, first, second)
    return fact

  def _read(self, table: str, keys: dict[str, str]) -> dict[str, Any] | None:
    where = ' AND '.join(f'"{key}" = ?' for key in keys)
    cursor = self._database.execute(
      f'SELECT * FROM "{table}" WHERE {where}', tuple(keys.values())
    )
    row = cursor.fetchone()
    if row is None:
      return None
    return {
      column[0]: value
      for column, value in zip(cursor.description, row, strict=True)
    }


def _meets(found: Any, op: str, value: Any) -> bool:
  if op == '<=':
    return found <= value
  if op == '>=':
    return found >= value
  return (found == value) == (op == '==')
