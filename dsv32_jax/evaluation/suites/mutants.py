"""Wrong answers made of right ones, to test the tests that judge them.

Two kinds. `off_by_a_little` changes what a function returns, whatever it
computes, to another value of the same type: such a mutant is wrong on every
input. `mutants` changes one place of the code, as a slip would; whether that
changes any value is found out by comparing calls (`compare`).
"""

import ast
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

_COMPARISONS: dict[type, type] = {
  ast.Eq: ast.NotEq,
  ast.NotEq: ast.Eq,
  ast.Lt: ast.LtE,
  ast.LtE: ast.Lt,
  ast.Gt: ast.GtE,
  ast.GtE: ast.Gt,
  ast.In: ast.NotIn,
  ast.NotIn: ast.In,
}
_OPERATORS: dict[type, type] = {
  ast.Add: ast.Sub,
  ast.Sub: ast.Add,
  ast.Mult: ast.Add,
  ast.Div: ast.Mult,
  ast.FloorDiv: ast.Mult,
  ast.Mod: ast.FloorDiv,
  ast.Pow: ast.Mult,
}

_WRAPPER = """
def _off(value):
  if isinstance(value, bool):
    return not value
  if isinstance(value, (int, float)):
    return value + 1
  if isinstance(value, str):
    return value + 'x'
  if isinstance(value, (list, tuple)):
    return value + type(value)([None])
  if isinstance(value, dict):
    return {{**value, 'another key': None}}
  return 0 if value is None else None

def _wrapped(right):
  return lambda *arguments: _off(right(*arguments))

{name} = _wrapped({name})
"""

Difference = Literal['same', 'caught', 'missed', 'unfounded']
"""Of a mutant: it returned what the reference does, and passed; it did not, and
failed; it did not, and passed all the same; it did, and failed."""


def off_by_a_little(program: str, name: str) -> str:
  """The program with a function that returns something else every time.

  Numbers are one more, truths the opposite; text, lists and tuples are longer,
  dicts have one more key.

  Args:
    program: defines the function.
    name: of the function.
  """
  return program + _WRAPPER.format(name=name)


def mutants(program: str, name: str) -> list[str]:
  """Programs that differ from this one in one place of one function.

  The place is a comparison, an operator, `and` or `or`, a condition, a number,
  a truth or a text, in the order of the code. What a mutant then computes may
  be the same.

  Args:
    program: defines the function.
    name: of the function; the places are in the last definition of it.
  """
  found = []
  for index in range(len(list(_changes(_function(ast.parse(program), name))))):
    tree = ast.parse(program)
    change = list(_changes(_function(tree, name)))[index]
    change()
    found.append(ast.unparse(ast.fix_missing_locations(tree)))
  return found


def compare(
  right: Sequence[Any],
  other: Sequence[Any],
  *,
  passed: bool,
  has_ended: bool = False,
) -> Difference:
  """What a mutant's calls say of the verdict on it.

  Args:
    right: the reference's calls, each with its arguments and its value.
    other: the mutant's, up to the first test that failed.
    passed: the verdict on the mutant.
    has_ended: its process has, before it returned a value; that is a difference
      too.
  """
  differs = has_ended or any(a != b for a, b in zip(right, other, strict=False))
  if passed:
    return 'missed' if differs else 'same'
  return 'caught' if differs else 'unfounded'


def _function(tree: ast.Module, name: str) -> ast.FunctionDef:
  for node in reversed(tree.body):
    if isinstance(node, ast.FunctionDef) and node.name == name:
      return node
  raise ValueError(f'name: got {name!r}, expected a function of the program')


def _changes(function: ast.FunctionDef) -> Iterator[Callable[[], None]]:
  """What can be done to the tree, each not yet done."""
  body = function.body[1:] if ast.get_docstring(function) else function.body
  for statement in body:
    for node in ast.walk(statement):
      change = _change(node)
      if change is not None:
        yield change


def _change(node: ast.AST) -> Callable[[], None] | None:
  if isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARISONS:
    new: Any = _COMPARISONS[type(node.ops[0])]()
    return lambda: node.ops.__setitem__(0, new)
  if isinstance(node, ast.BinOp | ast.AugAssign):
    kind = _OPERATORS.get(type(node.op))
    return kind and (lambda: setattr(node, 'op', kind()))
  if isinstance(node, ast.BoolOp):
    other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    return lambda: setattr(node, 'op', other)
  if isinstance(node, ast.If | ast.While | ast.IfExp):
    test = ast.UnaryOp(op=ast.Not(), operand=copy.deepcopy(node.test))
    return lambda: setattr(node, 'test', test)
  if isinstance(node, ast.Constant):
    return _change_constant(node)
  return None


def _change_constant(node: ast.Constant) -> Callable[[], None] | None:
  value = node.value
  if isinstance(value, bool):
    return lambda: setattr(node, 'value', not value)
  if isinstance(value, int | float):
    return lambda: setattr(node, 'value', value + 1)
  if isinstance(value, str):
    return lambda: setattr(node, 'value', value + 'x')
  return None
