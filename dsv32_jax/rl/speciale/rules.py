"""The rules that a step of a derivation may cite.

A rule turns a line into other lines. Rules of terms may be applied at any place
of a line, one place a step; rules of equations to the whole.
"""

import dataclasses
from collections.abc import Callable, Iterator

from dsv32_jax.rl.speciale.terms import (
  Equation,
  Line,
  Number,
  Product,
  Sum,
  Term,
  add,
  multiply,
  negate,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
  """One way to go on.

  Attributes:
    name: what a step cites.
    meaning: one line, for a reader and for the prompt of a model that has not
      been trained on these.
    of_term: what may stand in place of a term, for a rule of terms.
    of_equation: what may follow an equation, for a rule of equations.
  """

  name: str
  meaning: str
  of_term: Callable[[Term], Iterator[Term]] | None = None
  of_equation: Callable[[Equation], Iterator[Equation]] | None = None

  def results(self, line: Line) -> Iterator[Line]:
    """Every line that one application can give; some come more than once.

    >>> from dsv32_jax.rl.speciale.terms import parse_line
    >>> [str(line) for line in RULES['add'].results(parse_line('1+2+3'))]
    ['3+3', '1+5']
    """
    if isinstance(line, Equation):
      if self.of_equation is not None:
        yield from self.of_equation(line)
      if self.of_term is not None:
        for left in _anywhere(self.of_term, line.left):
          yield Equation(left, line.right)
        for right in _anywhere(self.of_term, line.right):
          yield Equation(line.left, right)
    elif self.of_term is not None:
      yield from _anywhere(self.of_term, line)

  def gives(self, line: Line, following: Line) -> bool:
    """Whether one application leads from a line to the following one."""
    return any(result == following for result in self.results(line))


def _anywhere(
  rewrite: Callable[[Term], Iterator[Term]], term: Term
) -> Iterator[Term]:
  """Terms with one of their subterms, or the whole, rewritten."""
  yield from rewrite(term)
  if isinstance(term, Sum | Product):
    join = add if isinstance(term, Sum) else multiply
    for index, part in enumerate(term.parts):
      for new in _anywhere(rewrite, part):
        yield join(_put(term.parts, index, 1, new))


def _put(
  parts: tuple[Term, ...], index: int, count: int, *new: Term
) -> tuple[Term, ...]:
  """Parts with `count` of them from `index` on replaced."""
  return (*parts[:index], *new, *parts[index + count :])


def _add_numbers(term: Term) -> Iterator[Term]:
  if isinstance(term, Sum):
    for i, (a, b) in enumerate(_neighbours(term)):
      if isinstance(a, Number) and isinstance(b, Number):
        yield add(_put(term.parts, i, 2, Number(a.value + b.value)))


def _multiply_numbers(term: Term) -> Iterator[Term]:
  if isinstance(term, Product):
    for i, (a, b) in enumerate(_neighbours(term)):
      if isinstance(a, Number) and isinstance(b, Number):
        yield multiply(_put(term.parts, i, 2, Number(a.value * b.value)))


def _swap(term: Term) -> Iterator[Term]:
  if isinstance(term, Sum | Product):
    join = add if isinstance(term, Sum) else multiply
    for i, (a, b) in enumerate(_neighbours(term)):
      yield join(_put(term.parts, i, 2, b, a))


def _distribute(term: Term) -> Iterator[Term]:
  if isinstance(term, Product):
    for i, (a, b) in enumerate(_neighbours(term)):
      if isinstance(b, Sum):
        # A minus before a bracket turns the signs in it.
        parts = [
          negate(part) if a == Number(-1) else multiply([a, part])
          for part in b.parts
        ]
        yield multiply(_put(term.parts, i, 2, add(parts)))
      if isinstance(a, Sum):
        parts = [multiply([part, b]) for part in a.parts]
        yield multiply(_put(term.parts, i, 2, add(parts)))


def _factor_out(term: Term) -> Iterator[Term]:
  if isinstance(term, Sum):
    for i, (a, b) in enumerate(_neighbours(term)):
      mine, other = _factors(a), _factors(b)
      if mine[-1] == other[-1]:
        rest = add([multiply(mine[:-1]), multiply(other[:-1])])
        yield add(_put(term.parts, i, 2, multiply([rest, mine[-1]])))
      if mine[0] == other[0]:
        rest = add([multiply(mine[1:]), multiply(other[1:])])
        yield add(_put(term.parts, i, 2, multiply([mine[0], rest])))


def _drop_zero(term: Term) -> Iterator[Term]:
  if isinstance(term, Sum):
    for i, part in enumerate(term.parts):
      if part == Number(0):
        yield add(_put(term.parts, i, 1))
  if isinstance(term, Product) and Number(0) in term.parts:
    yield Number(0)


def _drop_one(term: Term) -> Iterator[Term]:
  if isinstance(term, Product):
    for i, part in enumerate(term.parts):
      if part == Number(1):
        yield multiply(_put(term.parts, i, 1))


def _move(equation: Equation) -> Iterator[Equation]:
  left, right = equation.left, equation.right
  for i, part in enumerate(_summands(left)):
    rest = add(_put(_summands(left), i, 1))
    yield Equation(rest, _plus(right, negate(part)))
  for i, part in enumerate(_summands(right)):
    rest = add(_put(_summands(right), i, 1))
    yield Equation(_plus(left, negate(part)), rest)


def _plus(side: Term, part: Term) -> Term:
  return part if side == Number(0) else add([side, part])


def _divide(equation: Equation) -> Iterator[Equation]:
  left, right = equation.left, equation.right
  if not isinstance(left, Product) or not isinstance(right, Number):
    return
  first = left.parts[0]
  if isinstance(first, Number) and first.value:
    quotient, remainder = divmod(right.value, first.value)
    if not remainder:
      yield Equation(multiply(left.parts[1:]), Number(quotient))


def _flip(equation: Equation) -> Iterator[Equation]:
  yield Equation(equation.right, equation.left)


def _neighbours(term: Sum | Product) -> list[tuple[Term, Term]]:
  return list(zip(term.parts, term.parts[1:], strict=False))


def _factors(term: Term) -> tuple[Term, ...]:
  return term.parts if isinstance(term, Product) else (term,)


def _summands(term: Term) -> tuple[Term, ...]:
  return term.parts if isinstance(term, Sum) else (term,)


RULES: dict[str, Rule] = {
  rule.name: rule
  for rule in (
    Rule(
      name='add',
      meaning='two numbers beside each other in a sum become their sum',
      of_term=_add_numbers,
    ),
    Rule(
      name='mul',
      meaning='two numbers beside each other in a product become their product',
      of_term=_multiply_numbers,
    ),
    Rule(
      name='swap',
      meaning='two parts beside each other in a sum or product change places',
      of_term=_swap,
    ),
    Rule(
      name='dist',
      meaning='a*(b+c) becomes a*b+a*c, (a+b)*c becomes a*c+b*c, -(a+b) '
      'becomes -a-b',
      of_term=_distribute,
    ),
    Rule(
      name='fact',
      meaning='a*c+b*c becomes (a+b)*c, c*a+c*b becomes c*(a+b); c counts as '
      '1*c and c*1',
      of_term=_factor_out,
    ),
    Rule(
      name='zero',
      meaning='a+0 becomes a, a product with the factor 0 becomes 0',
      of_term=_drop_zero,
    ),
    Rule(name='one', meaning='a factor 1 of a product goes', of_term=_drop_one),
    Rule(
      name='move',
      meaning='a part of one side of an equation goes to the end of the other '
      'with its sign turned',
      of_equation=_move,
    ),
    Rule(
      name='div',
      meaning='a*b=c becomes b=c/a for numbers a and c where that is a whole '
      'number',
      of_equation=_divide,
    ),
    Rule(
      name='flip',
      meaning='the sides of an equation change places',
      of_equation=_flip,
    ),
  )
}
