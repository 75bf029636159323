"""What lines of derivations mean, by Python and not by our own parser."""

import functools
import itertools
from fractions import Fraction

VALUES = (-3, -1, 0, 2, 5)


@functools.cache
def term_values(text: str, letters: str) -> list[int]:
  """A term at every point of a grid of variables.

  Two polynomials of degree below 5 in each variable are the same if they agree
  on it.
  """
  term = eval(f'lambda {",".join(letters)}: {text}', {'__builtins__': {}})
  return [term(*p) for p in itertools.product(VALUES, repeat=len(letters))]


@functools.cache
def root(text: str) -> Fraction | None:
  """The solution of an equation that is linear in x; None if it has not one."""
  left, right = text.split('=')
  term = eval(f'lambda x: ({left})-({right})', {'__builtins__': {}})
  difference = [Fraction(term(x)) for x in range(3)]
  slope = difference[1] - difference[0]
  assert difference[2] - difference[1] == slope, f'{text} is not linear'
  return None if slope == 0 else -difference[0] / slope


def mean_the_same(one: str, other: str) -> bool:
  """Whether two lines mean the same; of equations, have the same solution."""
  if ('=' in one) != ('=' in other):
    return False
  if '=' in one:
    return root(one) == root(other)
  letters = ''.join(name for name in 'abcx' if name in one + other)
  return term_values(one, letters) == term_values(other, letters)
