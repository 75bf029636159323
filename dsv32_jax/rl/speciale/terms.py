"""Terms of integers and variables under + and *, and equations of them.

Sums and products have any number of parts and never nest in their own kind, so
that brackets which say nothing are gone once a text is read. There is no minus:
`a-b` is the sum of a and of the product (-1)*b, and `-2*b` the product of -2
and b. What is written with a minus is read as that, and the other way round.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction

# Long enough for every text that a model may write in earnest, short enough
# that reading one costs nothing.
MAX_CHARACTERS = 400
MAX_DEPTH = 20
MAX_DIGITS = 9
MAX_MONOMIALS = 500
_TOKEN = re.compile(r'\s*([0-9]+|[a-z]|[-+*()=])')


class TermError(ValueError):
  """A text is no term; the message says where and what was expected."""


@dataclasses.dataclass(frozen=True, slots=True)
class Number:
  """An integer of either sign."""

  value: int

  def __str__(self) -> str:
    return str(self.value)


@dataclasses.dataclass(frozen=True, slots=True)
class Variable:
  """One lower-case letter."""

  name: str

  def __str__(self) -> str:
    return self.name


@dataclasses.dataclass(frozen=True, slots=True)
class Sum:
  """Two or more parts, none of them a sum; made by `add`."""

  parts: tuple['Term', ...]

  def __str__(self) -> str:
    texts = [str(part) for part in self.parts]
    return texts[0] + ''.join(
      text if text.startswith('-') else f'+{text}' for text in texts[1:]
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Product:
  """Two or more parts, none of them a product; made by `multiply`."""

  parts: tuple['Term', ...]

  def __str__(self) -> str:
    first, *rest = self.parts
    if first == Number(-1) and not isinstance(rest[0], Number):
      # `-b`; but `-1*3`, since `-3` is a number.
      return '-' + '*'.join(map(_factor, rest))
    # In front a minus needs no brackets.
    head = str(first) if isinstance(first, Number) else _factor(first)
    return '*'.join([head, *map(_factor, rest)])


Term = Number | Variable | Sum | Product


@dataclasses.dataclass(frozen=True, slots=True)
class Equation:
  """Two terms that are to be equal."""

  left: Term
  right: Term

  def __str__(self) -> str:
    return f'{self.left}={self.right}'


Line = Term | Equation
"""What a derivation rewrites."""


def _factor(term: Term) -> str:
  text = str(term)
  return f'({text})' if isinstance(term, Sum) or text[0] == '-' else text


def add(parts: Iterable[Term]) -> Term:
  """The sum of parts in this order; 0 of none."""
  return _join(Sum, parts, Number(0))


def multiply(parts: Iterable[Term]) -> Term:
  """The product of parts in this order; 1 of none."""
  return _join(Product, parts, Number(1))


def _join(kind: type, parts: Iterable[Term], empty: Term) -> Term:
  flat: list[Term] = []
  for part in parts:
    flat += part.parts if isinstance(part, kind) else [part]
  if len(flat) < 2:
    return flat[0] if flat else empty
  return kind(tuple(flat))


def negate(term: Term) -> Term:
  """What a minus before a term makes of it.

  >>> str(negate(parse('2*b'))), str(negate(parse('a+b')))
  ('-2*b', '-(a+b)')
  """
  if isinstance(term, Number):
    return Number(-term.value)
  if isinstance(term, Product):
    first, *rest = term.parts
    if first == Number(-1) and not isinstance(rest[0], Number):
      return multiply(rest)
    if isinstance(first, Number):
      return multiply([Number(-first.value), *rest])
  return multiply([Number(-1), term])


def parse_line(text: str) -> Line:
  """Reads a term, or an equation.

  Raises:
    TermError: at the first mistake.

  >>> parse_line('2*x=6').right
  Number(value=6)
  """
  sides = text.split('=')
  if len(sides) > 2:
    raise TermError(f"got {len(sides) - 1} signs '=', expected at most one")
  terms = [parse(side) for side in sides]
  return terms[0] if len(terms) == 1 else Equation(*terms)


def parse(text: str) -> Term:
  """Reads a term.

  Raises:
    TermError: at the first mistake.

  >>> str(parse('a - (b + 3) * 2'))
  'a-(b+3)*2'
  """
  if len(text) > MAX_CHARACTERS:
    raise TermError(
      f'got {len(text)} characters, expected at most {MAX_CHARACTERS}'
    )
  return _Reader(text).read()


class _Reader:
  """Reads a term by descent: sum, product, part."""

  def __init__(self, text: str):
    self.tokens: list[str] = []
    place, end = 0, len(text.rstrip())
    while place < end:
      match = _TOKEN.match(text, place)
      if match is None:
        raise TermError(f'got {text[place:].strip()[0]!r}, expected a term')
      if len(match[1]) > MAX_DIGITS:
        raise TermError(
          f'got a number of {len(match[1])} digits, expected at most '
          f'{MAX_DIGITS}'
        )
      self.tokens.append(match[1])
      place = match.end()
    self.place = 0

  def read(self) -> Term:
    term = self.sum(0)
    if self.next is not None:
      raise TermError(f'got {self.next!r} behind a term')
    return term

  @property
  def next(self) -> str | None:
    return self.tokens[self.place] if self.place < len(self.tokens) else None

  def take(self) -> str:
    token = self.next
    if token is None:
      raise TermError('got the end, expected a term')
    self.place += 1
    return token

  def sum(self, depth: int) -> Term:
    if depth > MAX_DEPTH:
      raise TermError(f'got more than {MAX_DEPTH} brackets in each other')
    # In front a minus may stand, between parts one sign has to: `a--b` and `+a`
    # are no terms.
    sign = self.take() if self.next == '-' else '+'
    parts = []
    while True:
      part = self.product(depth)
      parts.append(negate(part) if sign == '-' else part)
      if self.next not in ('-', '+'):
        return add(parts)
      sign = self.take()

  def product(self, depth: int) -> Term:
    parts = [self.part(depth)]
    while self.next == '*':
      self.take()
      parts.append(self.part(depth))
    return multiply(parts)

  def part(self, depth: int) -> Term:
    token = self.take()
    if token.isdigit():
      return Number(int(token))
    if token.isalpha():
      return Variable(token)
    if token != '(':
      raise TermError(
        f'got {token!r}, expected a number, a letter or a bracket'
      )
    term = self.sum(depth + 1)
    if self.next != ')':
      raise TermError(f'got {self.next or "the end"!r}, expected a bracket')
    self.take()
    return term


def subterms(term: Term) -> Iterator[Term]:
  """The term and every term in it."""
  yield term
  if isinstance(term, Sum | Product):
    for part in term.parts:
      yield from subterms(part)


Polynomial = Mapping[tuple[str, ...], Fraction]
"""Coefficient, never 0, of each product of variables (its letters, sorted)."""


def polynomial(term: Term) -> Polynomial:
  """The one polynomial that a term is.

  Two terms have the same value for all values of their variables if and only if
  they are the same polynomial.

  Raises:
    TermError: if it has too many parts; a short text can have millions.

  >>> polynomial(parse('(a+1)*(a-1)'))
  {('a', 'a'): Fraction(1, 1), (): Fraction(-1, 1)}
  """
  if isinstance(term, Number):
    return _without_zeros({(): Fraction(term.value)})
  if isinstance(term, Variable):
    return {(term.name,): Fraction(1)}
  found = [polynomial(part) for part in term.parts]
  total = dict(found[0])
  for other in found[1:]:
    if isinstance(term, Sum):
      for letters, factor in other.items():
        total[letters] = total.get(letters, Fraction(0)) + factor
    else:
      product: dict[tuple[str, ...], Fraction] = {}
      for mine, a in total.items():
        for letters, b in other.items():
          key = tuple(sorted(mine + letters))
          product[key] = product.get(key, Fraction(0)) + a * b
        if len(product) > MAX_MONOMIALS:
          raise TermError(
            f'got more than {MAX_MONOMIALS} products of variables in one term'
          )
      total = product
  return _without_zeros(total)


def _without_zeros(values: Mapping[tuple[str, ...], Fraction]) -> Polynomial:
  return {letters: value for letters, value in values.items() if value}


def means_the_same(one: Line, other: Line) -> bool:
  """Whether two lines say the same.

  Terms: equal for all values of their variables. Equations: their differences
  of both sides are equal up to a factor that is a number, so they have the same
  solutions; of linear equations in one variable that have one solution this
  finds all.

  Raises:
    TermError: as `polynomial`.

  >>> means_the_same(parse_line('2*x+3=7'), parse_line('x=2'))
  True
  """
  if isinstance(one, Equation) or isinstance(other, Equation):
    if not (isinstance(one, Equation) and isinstance(other, Equation)):
      return False
    return _are_proportional(_difference(one), _difference(other))
  return polynomial(one) == polynomial(other)


def _difference(equation: Equation) -> Polynomial:
  return polynomial(add([equation.left, negate(equation.right)]))


def _are_proportional(one: Polynomial, other: Polynomial) -> bool:
  if one.keys() != other.keys():
    return False
  ratios = {one[letters] / other[letters] for letters in one}
  return len(ratios) <= 1
