"""Tasks of every kind at a chosen size, and right derivations of them."""

import dataclasses
import random
from collections.abc import Callable, Iterator

from dsv32_jax.rl.speciale.derivations import (
  Derivation,
  Step,
  Task,
  TaskKind,
  check,
  is_simple,
)
from dsv32_jax.rl.speciale.rules import RULES
from dsv32_jax.rl.speciale.terms import (
  Equation,
  Line,
  Number,
  Product,
  Sum,
  Term,
  Variable,
  add,
  multiply,
  negate,
  parse_line,
  subterms,
)

_TRIES = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSize:
  """How hard tasks are.

  Attributes:
    numbers: most numbers and variables in the start of a computation, a term
      to be simplified or a side of an equation.
    largest: numbers are from 1 to this one.
    largest_value: no number in a derivation is larger, of either sign.
    steps: a derivation takes at least 2 steps (1 to compute) and at most this
      many.
    characters: no line is longer.
  """

  numbers: int = 3
  largest: int = 9
  largest_value: int = 99
  steps: int = 6
  characters: int = 24

  def __post_init__(self):
    for name, least in (
      ('numbers', 2),
      ('largest', 2),
      ('largest_value', self.largest),
      ('steps', 2),
      ('characters', 8),
    ):
      value = getattr(self, name)
      if value < least:
        raise ValueError(f'{name}: got {value}, expected at least {least}')


def make_task(
  kind: TaskKind,
  size: TaskSize,
  rng: random.Random,
  *,
  is_wanted: Callable[[Task], bool] = lambda task: True,
) -> tuple[Task, Derivation]:
  """A task with one right derivation of it.

  Args:
    kind: of the task.
    size: of the task.
    rng: all chance comes from it.
    is_wanted: others are not considered.

  Raises:
    ValueError: if tasks of this kind and size are too rare to be found.
  """
  least = 1 if kind == 'compute' else 2
  for _ in range(_TRIES):
    steps: Derivation | None = None
    if kind == 'prove':
      task, steps = _proof(size, rng)
    else:
      task = Task(kind=kind, start=str(_start(kind, size, rng)))
    if not is_wanted(task):
      continue
    if kind != 'prove':
      steps = solve(task, rng=rng, limit=size.steps)
    if steps is None or not least <= len(steps) <= size.steps:
      continue
    lines = [task.start, *(step.text for step in steps)]
    if (
      all(_fits(line, size) for line in lines) and not check(task, steps).faults
    ):
      return task, steps
  raise ValueError(
    f'size: got {size}, expected one in which one of {_TRIES} random tasks to '
    f'{kind} fits'
  )


def _fits(text: str, size: TaskSize) -> bool:
  line = parse_line(text)
  sides = (line.left, line.right) if isinstance(line, Equation) else (line,)
  return len(text) <= size.characters and all(
    not isinstance(term, Number) or abs(term.value) <= size.largest_value
    for side in sides
    for term in subterms(side)
  )


def _start(kind: TaskKind, size: TaskSize, rng: random.Random) -> Line:
  if kind == 'compute':
    return _computation(rng.randint(2, size.numbers), size, rng)
  x = Variable('x')
  if kind == 'simplify':
    return _linear(rng.randint(2, size.numbers), size, rng, x)
  # With a whole solution more often than by chance.
  solution, factor = rng.randint(0, size.largest), _number(size, rng, 2)
  left: list[Term] = [multiply([factor, x])]
  value = factor.value * solution
  for _ in range(rng.randint(1, size.numbers - 1)):
    number = _number(size, rng)
    part: Term = number
    amount = number.value
    if rng.random() < 0.3:
      part, amount = x, solution
    if rng.random() < 0.4:
      part, amount = negate(part), -amount
    left.append(part)
    value += amount
  rng.shuffle(left)
  sides = [add(left), Number(value)]
  if rng.random() < 0.2:
    sides.reverse()
  return Equation(*sides)


def _number(size: TaskSize, rng: random.Random, least: int = 1) -> Number:
  return Number(rng.randint(least, size.largest))


def _computation(count: int, size: TaskSize, rng: random.Random) -> Term:
  if count == 1:
    return _number(size, rng)
  cut = rng.randint(1, count - 1)
  left = _computation(cut, size, rng)
  right = _computation(count - cut, size, rng)
  how = rng.choice('++-**')
  if how == '*':
    return multiply([left, right])
  return add([left, right if how == '+' else negate(right)])


def _linear(
  count: int, size: TaskSize, rng: random.Random, x: Variable
) -> Term:
  parts: list[Term] = []
  while count > 0:
    shape = rng.choice(('number', 'x', 'multiple', 'bracket'))
    if shape == 'bracket':
      inside = add([x, Number(rng.choice((-1, 1)) * _number(size, rng).value)])
      part = multiply([_number(size, rng, 2), inside])
      count -= 2
    else:
      number = _number(size, rng, 2)
      part = {'number': number, 'x': x, 'multiple': multiply([number, x])}[
        shape
      ]
      count -= 1
    parts.append(negate(part) if parts and rng.random() < 0.3 else part)
  return add(parts)


def _proof(size: TaskSize, rng: random.Random) -> tuple[Task, Derivation]:
  """A walk by rules of rings from a random term; its end is the target."""
  letters = [Variable(name) for name in 'abc']
  a, b, c = rng.sample(letters, 3)
  start: Term = rng.choice(
    (
      multiply([a, add([b, c])]),
      multiply([add([a, b]), c]),
      add([multiply([a, c]), multiply([b, c])]),
      add([multiply([a, b]), multiply([a, c])]),
      multiply([a, add([b, _number(size, rng)])]),
      add([multiply([a, b]), a]),
    )
  )
  line: Line = start
  seen, steps = {line}, []
  for _ in range(rng.randint(2, size.steps)):
    ways = [
      (name, result)
      for name in ('swap', 'dist', 'fact', 'one')
      for result in RULES[name].results(line)
      if result not in seen and len(str(result)) <= size.characters
    ]
    if not ways:
      break
    name, line = rng.choice(ways)
    seen.add(line)
    steps.append(Step(text=str(line), rule=name))
  task = Task(kind='prove', start=str(start), target=str(line))
  return task, tuple(steps)


def solve(
  task: Task,
  *,
  start: Line | None = None,
  rng: random.Random | None = None,
  limit: int = 64,
) -> Derivation | None:
  """A right derivation from a line to what the task asks for.

  Args:
    task: of any kind but 'prove', with x as its only variable.
    start: where to go on from; None from the task's own start.
    rng: chooses between equal ways to go on; None takes the first.
    limit: most steps.

  Returns:
    None if none was found; there may be one.
  """
  line = task.line if start is None else start
  steps: list[Step] = []
  while not task.is_met_by(line):
    ways = list(_next(line))
    if not ways or len(steps) == limit:
      return None
    rule, line = rng.choice(ways) if rng is not None else ways[0]
    steps.append(Step(text=str(line), rule=rule))
  return tuple(steps)


def _next(line: Line) -> Iterator[tuple[str, Line]]:
  """Good ways to go on: those of the first kind that there is."""
  for rule in ('zero', 'one', 'mul', 'add'):
    found = list(dict.fromkeys(RULES[rule].results(line)))
    if found:
      yield from ((rule, result) for result in found)
      return
  ways = {
    'dist': list(RULES['dist'].results(line)),
    # Collects x; c*(x+x) would only have to be multiplied out again.
    'fact': [new for new in RULES['fact'].results(line) if _adds_numbers(new)],
  }
  for rule, found in ways.items():
    if found:
      yield from ((rule, result) for result in dict.fromkeys(found))
      return
  order = _order(line)
  swapped = [new for new in RULES['swap'].results(line) if _order(new) < order]
  if swapped:
    yield from (('swap', new) for new in swapped)
    return
  if isinstance(line, Equation):
    yield from _next_of_equation(line)


def _adds_numbers(line: Line) -> bool:
  """Whether a sum of numbers alone is in a line: x-terms were collected."""
  return any(
    isinstance(term, Sum)
    and all(isinstance(part, Number) for part in term.parts)
    for term in _all_subterms(line)
  )


def _all_subterms(line: Line) -> Iterator[Term]:
  if isinstance(line, Equation):
    yield from subterms(line.left)
    yield from subterms(line.right)
  else:
    yield from subterms(line)


def _order(line: Line) -> int:
  """Pairs in the wrong order: in a sum numbers before x, in a product after."""
  wrong = 0
  for term in _all_subterms(line):
    if isinstance(term, Sum | Product):
      marks = [isinstance(part, Number) for part in term.parts]
      if isinstance(term, Product):
        marks = [not mark for mark in marks]
      wrong += sum(
        mark and not later
        for index, mark in enumerate(marks)
        for later in marks[index + 1 :]
      )
  return wrong


def _next_of_equation(line: Equation) -> Iterator[tuple[str, Line]]:
  """Both sides are simple here: bring them apart."""
  if not (is_simple(line.left) and is_simple(line.right)):
    return
  if isinstance(line.left, Number) and not isinstance(line.right, Number):
    yield 'flip', Equation(line.right, line.left)
    return
  # Numbers go right and x goes left, and neither comes back.
  for result in RULES['move'].results(line):
    assert isinstance(result, Equation)
    is_apart = _has_x(result.left) and not _has_x(result.right)
    if is_apart and (isinstance(line.left, Sum) or _has_x(line.right)):
      yield 'move', result
  for result in RULES['div'].results(line):
    yield 'div', result


def _has_x(term: Term) -> bool:
  return any(isinstance(part, Variable) for part in subterms(term))
