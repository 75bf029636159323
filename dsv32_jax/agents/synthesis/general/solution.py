"""Reference solutions: Python that may only call an environment's tools.

`write` makes the text of one. It lists entities through the tools, enumerates
each row with what binds it alone, and then puts rows together. `run` executes
such a text where nothing but the tools and a few harmless built-ins has a name,
after checking its syntax tree against an allow-list, and keeps a trace of the
calls.
"""

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from dsv32_jax.agents.synthesis.general import constraints as c
from dsv32_jax.agents.synthesis.general import tools as tools_lib
from dsv32_jax.agents.synthesis.general.schema import Domain
from dsv32_jax.agents.types import Tool

_BUILTINS = {
  'all': all,
  'any': any,
  'dict': dict,
  'json_text': json.dumps,
  'len': len,
  'list': list,
  'max': max,
  'min': min,
  'range': range,
  'set': set,
  'sorted': sorted,
  'sum': sum,
  'zip': zip,
}
_METHODS = {'append', 'count', 'items', 'values'}
_NODES = (
  ast.Module,
  ast.FunctionDef,
  ast.arguments,
  ast.arg,
  ast.Return,
  ast.Assign,
  ast.Expr,
  ast.If,
  ast.For,
  ast.Continue,
  ast.Call,
  ast.keyword,
  ast.Attribute,
  ast.Name,
  ast.Load,
  ast.Store,
  ast.Constant,
  ast.Subscript,
  ast.Slice,
  ast.List,
  ast.Tuple,
  ast.Dict,
  ast.ListComp,
  ast.GeneratorExp,
  ast.DictComp,
  ast.comprehension,
  ast.Compare,
  ast.Eq,
  ast.NotEq,
  ast.Lt,
  ast.LtE,
  ast.Gt,
  ast.GtE,
  ast.In,
  ast.NotIn,
  ast.Is,
  ast.IsNot,
  ast.BoolOp,
  ast.And,
  ast.Or,
  ast.UnaryOp,
  ast.Not,
  ast.USub,
  ast.BinOp,
  ast.Add,
  ast.Sub,
)


class SolutionError(Exception):
  """A solution that is outside of the allow-list, or that failed."""


def check(source: str, tools: Sequence[str]) -> None:
  """Refuses a program that could do more than call tools and compute.

  Args:
    source: Python.
    tools: names that it may call.

  Raises:
    SolutionError: naming the line and what stands there.
  """
  try:
    tree = ast.parse(source)
  except (SyntaxError, ValueError, RecursionError) as error:
    raise SolutionError(f'solution: {error}') from None
  own = {
    node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
  }
  callable_names = own | set(tools) | set(_BUILTINS)
  for node in ast.walk(tree):
    line = getattr(node, 'lineno', 0)
    if not isinstance(node, _NODES):
      raise SolutionError(f'line {line}: {type(node).__name__} is not allowed')
    if isinstance(node, ast.FunctionDef) and node.decorator_list:
      raise SolutionError(f'line {line}: decorators are not allowed')
    if isinstance(node, ast.Name) and node.id.startswith('_'):
      raise SolutionError(f'line {line}: the name {node.id} is not allowed')
    if isinstance(node, ast.Attribute) and node.attr not in _METHODS:
      raise SolutionError(f'line {line}: .{node.attr} is not allowed')
    if (
      isinstance(node, ast.Call)
      and isinstance(node.func, ast.Name)
      and node.func.id not in callable_names
    ):
      raise SolutionError(f'line {line}: {node.func.id} is no tool')


def run(source: str, tools: Mapping[str, Tool]) -> list[tuple[str, dict]]:
  """Runs a solution and returns the calls that it made, in order.

  Args:
    source: Python that passes `check`.
    tools: by name. Results are given to the program as the JSON they hold.

  Raises:
    SolutionError: it may not run, or it raised.
  """
  check(source, list(tools))
  trace: list[tuple[str, dict]] = []

  def bind(name: str, tool: Tool):
    def call(**arguments: Any) -> Any:
      trace.append((name, arguments))
      return json.loads(tool(arguments))

    return call

  names: dict[str, Any] = {'__builtins__': dict(_BUILTINS)}
  names |= {name: bind(name, tool) for name, tool in tools.items()}
  try:
    exec(compile(source, 'solution.py', 'exec'), names)
  except Exception as error:
    raise SolutionError(f'solution: {type(error).__name__}: {error}') from error
  return trace


def write(
  domain: Domain, given: Sequence[str], constraints: Sequence[c.Constraint]
) -> str:
  """The text of a solution."""
  lines = _load(domain)
  names = [field.name for field in domain.fields]
  for index, value in enumerate(given):
    lines += _row_function(domain, index, value, names, constraints)
  lines += _together(domain, len(given), names, constraints)
  return '\n'.join(lines) + '\n'


def _load(domain: Domain) -> list[str]:
  """Reads what the tables hold, and pairs on demand."""
  lines: list[str] = []
  for table in domain.tables:
    listed, var = tools_lib.list_tool(table), f'{table.name}_info'
    columns = [column.name for column in table.columns]
    call = (
      f'get_infos_by_{table.name}(info_keywords={columns!r}, {table.name}=name)'
      if columns
      else '{}'
    )
    lines.append(f'{var} = {{}}')
    indent = ''
    if table.parent:
      lines.append(f'for parent in {table.parent}_info:')
      indent = '  '
      listed += f'({table.parent}=parent)'
    else:
      listed += '()'
    lines += [
      f'{indent}for name in {listed}:',
      f'{indent}  {var}[name] = {call}',
      f'{indent}  {var}[name]["name"] = name',
    ]
    if table.parent:
      lines.append(f'{indent}  {var}[name]["{table.parent}"] = parent')
  for relation in domain.relations:
    first, second = tools_lib.pair_parameters(relation)
    lines += [
      f'{relation.name}_known = {{}}',
      f'def {relation.name}(a, b):',
      f'  if (a, b) not in {relation.name}_known:',
      f'    {relation.name}_known[a, b] = '
      f'get_{relation.name}({first}=a, {second}=b)',
      f'  return {relation.name}_known[a, b]',
    ]
  return lines


def _row_function(
  domain: Domain,
  index: int,
  value: str,
  names: list[str],
  constraints: Sequence[c.Constraint],
) -> list[str]:
  """A function that lists the rows which meet what binds this row alone."""
  table = domain.table_of(domain.given.name).name
  lines = [
    f'def rows_{index}():',
    '  found = []',
    f'  {domain.given.name} = {table}_info[{value!r}]',
  ]
  tests = [
    one for constraint in constraints for one in _row_tests(constraint, index)
  ]
  indent = '  '
  known = {domain.given.name}
  for name in names:
    source = f'{domain.table_of(name).name}_info'
    lines.append(f'{indent}for {name} in {source}.values():')
    indent += '  '
    known.add(name)
    ready = [test for fields, test in tests if fields <= known]
    tests = [(fields, test) for fields, test in tests if not fields <= known]
    for test in ready:
      lines += [f'{indent}if not ({test}):', f'{indent}  continue']
  shown = ', '.join([domain.given.name, *names])
  lines += [f'{indent}found.append(({shown},))', '  return found']
  return lines


def _row_tests(
  constraint: c.Constraint, index: int
) -> list[tuple[set[str], str]]:
  """What a constraint says of a row by itself: fields needed, expression."""

  def bound(one: c.Bound) -> tuple[set[str], str]:
    return {one.field}, f'{one.field}["{one.column}"] {one.op} {one.value!r}'

  match constraint:
    case c.Compare():
      return [
        (
          {constraint.first, constraint.second},
          f'{constraint.first}["{constraint.first_column}"] {constraint.op} '
          f'{constraint.second}["{constraint.second_column}"]',
        )
      ]
    case c.Bound() if constraint.row in (-1, index):
      return [bound(constraint)]
    case c.Sum() if constraint.row == index:
      total = ' + '.join(f'{f}["{column}"]' for f, column in constraint.terms)
      return [
        (
          {field for field, _ in constraint.terms},
          f'{total} {constraint.op} {constraint.value}',
        )
      ]
    case c.Branch() if constraint.row == index:
      switch = f'{constraint.field}["{constraint.column}"]'
      found = []
      for band, case in enumerate(constraint.cases):
        outside = []
        if band:
          outside.append(f'{switch} < {constraint.limits[band - 1]}')
        if band < len(constraint.limits):
          outside.append(f'{switch} >= {constraint.limits[band]}')
        for fields, test in map(bound, case):
          found.append(
            (fields | {constraint.field}, ' or '.join([*outside, test]))
          )
      return found
    case c.Listed():
      return [
        (
          {constraint.first, constraint.second},
          f'{constraint.relation}({constraint.first}["name"], '
          f'{constraint.second}["name"])["{constraint.column}"] '
          f'{constraint.op} {constraint.value!r}',
        )
      ]
    case c.Distinct(together=False) if len(constraint.fields) > 1:
      return [
        ({first, second}, f'{first}["name"] != {second}["name"]')
        for i, first in enumerate(constraint.fields)
        for second in constraint.fields[:i]
      ]
  return []


def _together(
  domain: Domain,
  num: int,
  names: list[str],
  constraints: Sequence[c.Constraint],
) -> list[str]:
  """Chooses a row for each given entity, with what binds several rows."""
  at = {name: i for i, name in enumerate([domain.given.name, *names])}
  tests: list[str] = []
  lines: list[str] = [
    f'options = [{", ".join(f"rows_{i}()" for i in range(num))}]'
  ]
  for number, one in enumerate(constraints):
    match one:
      case c.Sum(row=-1):
        row = ' + '.join(f'r[{at[f]}]["{column}"]' for f, column in one.terms)
        # The least and the most that rows from i on can still add.
        lines += [
          f'each_{number} = [[{row} for r in rows] for rows in options]',
          f'low_{number} = [sum([min(n, default=0) for n in each_{number}[i:]])'
          f' for i in range({num + 1})]',
          f'high_{number} = '
          f'[sum([max(n, default=0) for n in each_{number}[i:]])'
          f' for i in range({num + 1})]',
        ]
        total = f'sum([{row} for r in chosen])'
        if one.op in ('<=', '=='):
          tests.append(f'{total} + low_{number}[len(chosen)] <= {one.value}')
        if one.op in ('>=', '=='):
          tests.append(f'{total} + high_{number}[len(chosen)] >= {one.value}')
        if one.op == '!=':
          tests.append(f'len(chosen) < {num} or {total} != {one.value}')
      case c.Distinct():
        # The last row against those before it.
        for field in () if one.together else one.fields:
          before = ' + '.join(
            f'[r[{at[f]}]["name"] for r in chosen[:-1]]' for f in one.fields
          )
          tests.append(f'chosen[-1][{at[field]}]["name"] not in {before}')
        if one.together:
          key = ', '.join(f'r[{at[f]}]["name"]' for f in one.fields)
          keys = f'[({key},) for r in chosen]'
          tests.append(f'{keys}.count({keys}[-1]) == 1')
      case c.Count():
        number_now = (
          f'[r[{at[one.field]}]["{one.column}"] for r in chosen]'
          f'.count({one.value!r})'
        )
        if one.op in ('<=', '=='):
          tests.append(f'{number_now} <= {one.number}')
        if one.op != '<=':
          tests.append(
            f'len(chosen) < {num} or {number_now} {one.op} {one.number}'
          )
      case c.Order():
        cell = f'[{at[one.field]}]["{one.column}"]'
        sign = '<=' if one.direction == 'up' else '>='
        tests.append(
          f'len(chosen) < 2 or chosen[-2]{cell} {sign} chosen[-1]{cell}'
        )
      case c.Spread():
        cells = f'[r[{at[one.field]}]["{one.column}"] for r in chosen]'
        tests.append(f'{cells}.count({cells}[-1]) <= {one.number}')
      case c.Route():
        name = f'[{at[one.field]}]["name"]'
        leg = f'{one.relation}(a{name}, b{name})["{one.column}"]'
        pairs = 'for a, b in zip(chosen, chosen[1:])'
        if one.each:
          tests.append(f'all([{leg} {one.op} {one.value} {pairs}])')
        else:
          total = f'sum([{leg} {pairs}])'
          if one.op in ('<=', '=='):
            tests.append(f'{total} <= {one.value}')
          if one.op != '<=':
            tests.append(f'len(chosen) < {num} or {total} {one.op} {one.value}')
  lines += ['def fits(chosen):']
  for test in tests:
    lines += [f'  if not ({test}):', '    return False']
  lines += [
    '  return True',
    'def choose(chosen):',
    f'  if len(chosen) == {num}:',
    '    return chosen',
    '  for row in options[len(chosen)]:',
    '    if fits(chosen + [row]):',
    '      done = choose(chosen + [row])',
    '      if done is not None:',
    '        return done',
    '  return None',
    'best = choose([])',
    f'fields = {[domain.given.name, *names]!r}',
    'answer = [{f: e["name"] for f, e in zip(fields, row)} for row in best]',
    'submit_result(answer_text=json_text(answer))',
  ]
  return lines
