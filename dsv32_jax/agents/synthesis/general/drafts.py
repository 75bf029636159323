"""Checks conditions that somebody wrote against the domain they speak of."""

from collections.abc import Mapping, Sequence
from typing import Any

from dsv32_jax.agents.synthesis.general import constraints as c
from dsv32_jax.agents.synthesis.general.schema import KEY, Column, Domain

_OPS = ('<=', '>=', '==', '!=')


def read(
  domain: Domain, num_rows: int, draft: Sequence[Mapping[str, Any]]
) -> list[c.Constraint]:
  """The conditions of a draft.

  Args:
    domain: of the environment.
    num_rows: of an answer.
    draft: in JSON's form, from a model perhaps.

  Raises:
    ValueError: naming the condition and what is wrong with it.
  """
  found = []
  for number, value in enumerate(draft, start=1):
    try:
      one = c.from_json(value)
      _check(domain, num_rows, one)
    except (ValueError, KeyError, TypeError, StopIteration) as error:
      raise ValueError(
        f'condition {number}: {type(error).__name__}: {error}'
      ) from None
    found.append(one)
  return found


def _check(domain: Domain, num_rows: int, one: c.Constraint) -> None:
  op = getattr(one, 'op', '==')
  if op not in _OPS:
    raise ValueError(f'op: got {op!r}, expected one of {_OPS}')
  row = getattr(one, 'row', -1)
  if type(row) is not int or not -1 <= row < num_rows:
    raise ValueError(f'row: got {row!r}, expected -1 to {num_rows - 1}')
  match one:
    case c.Bound():
      _check_value(_column(domain, one.field, one.column), op, one.value)
    case c.Sum():
      if not one.terms:
        raise ValueError('terms: got none')
      for field, column in one.terms:
        _check_number(domain, field, column)
      if field_is_given(domain, [field for field, _ in one.terms]):
        raise ValueError('terms: the given field is not to be answered')
      _check_int('value', one.value)
    case c.Branch():
      _check_number(domain, one.field, one.column)
      for limit in one.limits:
        _check_int('limits', limit)
      if row < 0 or len(one.cases) != len(one.limits) + 1:
        raise ValueError('cases: expected one more than limits, and one row')
      if list(one.limits) != sorted(one.limits):
        raise ValueError(f'limits: got {one.limits}, expected rising ones')
      for bound in (bound for case in one.cases for bound in case):
        if bound.row != row:
          raise ValueError(f'cases: got row {bound.row!r}, expected {row}')
        _check(domain, num_rows, bound)
    case c.Count():
      _check_value(_column(domain, one.field, one.column), '==', one.value)
      _check_int('number', one.number)
    case c.Order():
      _check_number(domain, one.field, one.column)
      if one.direction not in ('up', 'down'):
        raise ValueError(f'direction: got {one.direction!r}')
    case c.Spread():
      _column(domain, one.field, one.column)
      _check_int('number', one.number)
      if one.number < 1:
        raise ValueError(f'number: got {one.number}, expected 1 up')
    case c.Distinct():
      if not one.fields or field_is_given(domain, one.fields):
        raise ValueError(f'fields: got {one.fields}')
      for field in one.fields:
        domain.field(field)
    case c.Compare():
      kinds = [
        _is_text(domain, field, column)
        for field, column in (
          (one.first, one.first_column),
          (one.second, one.second_column),
        )
      ]
      if kinds[0] != kinds[1] or (kinds[0] and op in ('<=', '>=')):
        raise ValueError('compare: the two columns do not compare')
    case c.Listed() | c.Route():
      relation = domain.relation(one.relation)
      ends = (
        (one.first, one.second)
        if isinstance(one, c.Listed)
        else (one.field, one.field)
      )
      tables = tuple(domain.field(field).table for field in ends)
      if tables != (relation.first, relation.second):
        raise ValueError(f'{relation.name}: not about {tables}')
      column = next(x for x in relation.columns if x.name == one.column)
      _check_value(column, op, one.value)
      if isinstance(one, c.Route) and not column.is_number:
        raise ValueError(f'{one.column}: not a number')


def field_is_given(domain: Domain, fields: Sequence[str]) -> bool:
  """Whether the given field is among them."""
  return domain.given.name in fields


def _is_text(domain: Domain, field: str, column: str) -> bool:
  table = domain.table_of(field)
  return column in (KEY, table.parent) or not table.column(column).is_number


def _column(domain: Domain, field: str, column: str) -> Column:
  return domain.table_of(field).column(column)


def _check_number(domain: Domain, field: str, column: str) -> None:
  if not _column(domain, field, column).is_number:
    raise ValueError(f'{column}: not a number')


def _check_int(name: str, value: Any) -> None:
  if type(value) is not int:
    raise ValueError(f'{name}: got {value!r}, expected a whole number')


def _check_value(column: Column, op: str, value: Any) -> None:
  if column.is_number:
    _check_int(column.name, value)
  elif value not in column.options or op not in ('==', '!='):
    raise ValueError(
      f'{column.name}: got {op} {value!r}, expected == or != and one of '
      f'{list(column.options)}'
    )
