"""Integer expressions in x, evaluated without running them as code.

Most answers to the easy programming problems are such expressions. They are
worked out here, in the process that scores, in microseconds; what is anything
else is a program, and goes to the sandbox.
"""

import ast
import operator
import re
import warnings
from collections.abc import Callable

# Everything that may stand in one; ** is left out, since its results have no
# bound.
_LONGEST = 200
_ALLOWED = re.compile(rf'[0-9x+*/%() -]{{1,{_LONGEST}}}')
_LONGEST_NUMBER = re.compile(r'[0-9]{19}')

_OPERATIONS: dict[type, Callable[[int, int], int]] = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.FloorDiv: operator.floordiv,
  ast.Mod: operator.mod,
}


def values(text: str, inputs: list[int]) -> list[int] | None:
  """The expression's value at each input.

  Args:
    text: of at most 200 characters.
    inputs: values of x.

  Returns:
    Integers, or None for a text that is not such an expression or has no value
    at an input.

  >>> values('(x + 3) * 2', [1, 2]), values('open(x)', [1]), values('1//x', [0])
  ([8, 10], None, None)
  """
  if not _ALLOWED.fullmatch(text) or '**' in text or '0x' in text:
    return None
  if _LONGEST_NUMBER.search(text):
    return None
  try:
    tree = ast.parse(text.strip(), mode='eval').body
    return [_value(tree, x) for x in inputs]
  except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
    return None


def is_nonsense(text: str) -> bool:
  """Whether a short text is no Python expression at all.

  >>> is_nonsense('x +'), is_nonsense('open(x)'), is_nonsense('(' * 999)
  (True, False, False)
  """
  if len(text) > _LONGEST:
    return False  # A parser is not given more than this here.
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # Such as for '1if x else 2'.
      ast.parse(text.strip(), mode='eval')
  except (SyntaxError, ValueError):
    return True
  except (MemoryError, RecursionError):
    return False
  return False


def _value(node: ast.expr, x: int) -> int:
  """Raises ValueError for anything but integers, x and their operations."""
  if isinstance(node, ast.Constant) and type(node.value) is int:
    return node.value
  if isinstance(node, ast.Name) and node.id == 'x':
    return x
  if isinstance(node, ast.UnaryOp):
    if isinstance(node.op, ast.USub):
      return -_value(node.operand, x)
    if isinstance(node.op, ast.UAdd):
      return _value(node.operand, x)
  if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
    return _OPERATIONS[type(node.op)](
      _value(node.left, x), _value(node.right, x)
    )
  raise ValueError('no integer expression')
