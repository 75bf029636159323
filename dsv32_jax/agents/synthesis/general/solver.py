"""Proves that a task of the general family has an answer, on its own.

Backtracking over single fields, with values in the order of the database or
shuffled. It reads whole tables and compiles each constraint into tests of the
fields it binds; nothing here is shared with the verifier or with reference
solutions.
"""

import dataclasses
import itertools
import operator
import random
import sqlite3
from collections.abc import Callable, Sequence
from typing import Any

from dsv32_jax.agents.synthesis.general import constraints as c
from dsv32_jax.agents.synthesis.general.schema import Domain

_OPS: dict[str, Callable[[Any, Any], bool]] = {
  '<=': operator.le,
  '>=': operator.ge,
  '==': operator.eq,
  '!=': operator.ne,
}

# Tells of the fields bound so far (None where not bound) whether they may stay.
_Test = Callable[[list[Any]], bool]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solved:
  """What a search found.

  Attributes:
    answer: one that meets every constraint, or None.
    is_proof: the search was not cut off: without an answer there is none.
    nodes: values that were tried.
  """

  answer: list[dict[str, str]] | None
  is_proof: bool
  nodes: int


class Solver:
  """Searches answers over one environment's database.

  Args:
    domain: of the environment.
    database: a connection that is only read.
  """

  def __init__(self, domain: Domain, database: sqlite3.Connection):
    self._domain = domain
    self._tables: dict[str, dict[str, dict[str, Any]]] = {}
    self._pairs: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for table in domain.tables:
      rows = _rows(database, table.name)
      self._tables[table.name] = {row['name']: row for row in rows}
    for relation in domain.relations:
      rows = _rows(database, relation.name)
      self._pairs[relation.name] = {
        (row['first'], row['second']): row for row in rows
      }
    self._names = [field.name for field in domain.fields]
    self._given = self._tables[domain.given.table]

  def solve(
    self,
    given: Sequence[str],
    constraints: Sequence[c.Constraint],
    *,
    shuffle: random.Random | None = None,
    max_nodes: int = 30_000,
  ) -> Solved:
    """Searches for an answer.

    Args:
      given: the given field of each row.
      constraints: of the task.
      shuffle: draws the order of values; None for the database's.
      max_nodes: values to try before it gives up.
    """
    width = len(self._names)
    size = width * len(given)
    values = [
      list(self._tables[self._domain.fields[v % width].table].values())
      for v in range(size)
    ]
    if shuffle:
      for one in values:
        shuffle.shuffle(one)
    tests: list[list[_Test]] = [[] for _ in range(size)]
    for constraint in constraints:
      for scope, test in self._compile(constraint, given, values):
        if len(scope) == 1:
          values[scope[0]] = _filtered(values[scope[0]], scope[0], size, test)
        else:
          tests[scope[-1]].append(test)
    # Only now, as the bounds on sums are those of the filtered values.
    for constraint in constraints:
      if isinstance(constraint, c.Sum):
        for v, test in self._bounds(constraint, len(given), values):
          tests[v].append(test)

    bound: list[Any] = [None] * size
    nodes = 0
    # For each depth, where in its values the search stands.
    at = [0] * (size + 1)
    depth = 0
    while 0 <= depth < size:
      found = False
      options = values[depth]
      while at[depth] < len(options):
        nodes += 1
        if nodes > max_nodes:
          return Solved(answer=None, is_proof=False, nodes=nodes)
        bound[depth] = options[at[depth]]
        at[depth] += 1
        if all(test(bound) for test in tests[depth]):
          found = True
          break
      if found:
        depth += 1
        at[depth] = 0
      else:
        bound[depth] = None
        depth -= 1
    if depth < 0:
      return Solved(answer=None, is_proof=True, nodes=nodes)
    answer = [
      {self._domain.given.name: value}
      | {
        name: bound[row * width + column]['name']
        for column, name in enumerate(self._names)
      }
      for row, value in enumerate(given)
    ]
    return Solved(answer=answer, is_proof=True, nodes=nodes)

  def _getter(
    self, row: int, field: str, column: str, given: Sequence[str]
  ) -> tuple[int | None, Callable[[list[Any]], Any]]:
    """The variable of a field (None: given), and how to read its column."""
    if field == self._domain.given.name:
      value = self._given[given[row]][column]
      return None, lambda bound: value
    v = row * len(self._names) + self._names.index(field)
    return v, lambda bound: bound[v][column]

  def _compile(
    self,
    constraint: c.Constraint,
    given: Sequence[str],
    values: list[list[Any]],
  ) -> list[tuple[list[int], _Test]]:
    """Tests with the variables that each needs; sums come in `_bounds`."""
    num = len(given)
    made: list[tuple[list[int], _Test]] = []

    def add(readers, test):
      scope = sorted({v for v, _ in readers if v is not None})
      if scope:
        gets = [get for _, get in readers]
        made.append((scope, lambda b: test(*[get(b) for get in gets])))

    def read(row, field, column):
      return self._getter(row, field, column, given)

    if isinstance(constraint, c.Compare):
      op = _OPS[constraint.op]
      for row in range(num):
        first = read(row, constraint.first, constraint.first_column)
        second = read(row, constraint.second, constraint.second_column)
        add([first, second], op)
    elif isinstance(constraint, c.Bound):
      op = _OPS[constraint.op]
      for row in range(num) if constraint.row < 0 else [constraint.row]:
        got = read(row, constraint.field, constraint.column)
        add([got], lambda x, op=op: op(x, constraint.value))
    elif isinstance(constraint, c.Branch):
      switch = read(constraint.row, constraint.field, constraint.column)
      edges = (float('-inf'), *constraint.limits, float('inf'))
      for case, low, high in zip(
        constraint.cases, edges, edges[1:], strict=False
      ):
        for bound in case:
          got = read(constraint.row, bound.field, bound.column)
          add(
            [switch, got],
            lambda s, x, low=low, high=high, b=bound: (
              not low <= s < high or _OPS[b.op](x, b.value)
            ),
          )
    elif isinstance(constraint, c.Listed):
      pairs, op = self._pairs[constraint.relation], _OPS[constraint.op]
      for row in range(num):
        ends = [
          read(row, field, 'name')
          for field in (constraint.first, constraint.second)
        ]
        add(
          ends,
          lambda a, b: op(pairs[a, b][constraint.column], constraint.value),
        )
    elif isinstance(constraint, c.Distinct):
      groups = [
        [read(row, field, 'name') for field in constraint.fields]
        for row in range(num)
      ]
      if constraint.together:
        width = len(constraint.fields)
        for i in range(num):
          for j in range(i):
            add(
              groups[j] + groups[i],
              lambda *x, n=width: x[:n] != x[n:],
            )
      else:
        flat = [one for group in groups for one in group]
        for i, one in enumerate(flat):
          for other in flat[:i]:
            add([other, one], operator.ne)
    elif isinstance(constraint, c.Order):
      cells = [
        read(row, constraint.field, constraint.column) for row in range(num)
      ]
      op = operator.le if constraint.direction == 'up' else operator.ge
      for i in range(1, num):
        add([cells[i - 1], cells[i]], op)
    elif isinstance(constraint, c.Spread):
      cells = [
        read(row, constraint.field, constraint.column) for row in range(num)
      ]
      for i in range(constraint.number, num):
        add(
          cells[: i + 1],
          lambda *x: x.count(x[-1]) <= constraint.number,
        )
    elif isinstance(constraint, c.Count):
      cells = [
        read(row, constraint.field, constraint.column) for row in range(num)
      ]
      op = _OPS[constraint.op]
      add(
        cells,
        lambda *x: op(x.count(constraint.value), constraint.number),
      )
      if constraint.op in ('<=', '=='):
        for i in range(constraint.number, num - 1):
          add(
            cells[: i + 1],
            lambda *x: x.count(constraint.value) <= constraint.number,
          )
    elif isinstance(constraint, c.Route):
      stops = [read(row, constraint.field, 'name') for row in range(num)]
      pairs, op = self._pairs[constraint.relation], _OPS[constraint.op]

      column = constraint.column

      def length(*names):
        return sum(pairs[pair][column] for pair in itertools.pairwise(names))

      if constraint.each:
        for i in range(1, num):
          add(stops[i - 1 : i + 1], lambda *x: op(length(*x), constraint.value))
      else:
        add(stops, lambda *x: op(length(*x), constraint.value))
        if constraint.op in ('<=', '=='):
          for i in range(1, num - 1):
            add(stops[: i + 1], lambda *x: length(*x) <= constraint.value)
    return made

  def _bounds(
    self, constraint: c.Sum, num: int, values: list[list[Any]]
  ) -> list[tuple[int, _Test]]:
    """Tests of a sum: what is bound plus the least and most of the rest."""
    width = len(self._names)
    rows = range(num) if constraint.row < 0 else [constraint.row]
    cells = sorted(
      (row * width + self._names.index(field), column)
      for row in rows
      for field, column in constraint.terms
    )
    least, most = 0, 0
    made: list[tuple[int, _Test]] = []
    op, value = constraint.op, constraint.value
    for i in range(len(cells) - 1, -1, -1):
      part = cells[: i + 1]

      def test(bound, part=part, least=least, most=most):
        total = sum(bound[v][column] for v, column in part)
        if op == '<=':
          return total + least <= value
        if op == '>=':
          return total + most >= value
        if op == '==':
          return total + least <= value <= total + most
        return least != most or total + least != value

      made.append((cells[i][0], test))
      numbers = [one[cells[i][1]] for one in values[cells[i][0]]] or [0]
      least, most = least + min(numbers), most + max(numbers)
    return made


def _filtered(values: list[Any], v: int, size: int, test: _Test) -> list[Any]:
  bound: list[Any] = [None] * size
  kept = []
  for one in values:
    bound[v] = one
    if test(bound):
      kept.append(one)
  return kept


def _rows(database: sqlite3.Connection, table: str) -> list[dict[str, Any]]:
  cursor = database.execute(f'SELECT * FROM "{table}"')
  columns = [one[0] for one in cursor.description]
  return [dict(zip(columns, row, strict=True)) for row in cursor]
