r"""School mathematics with answers in \boxed{}, worked out step by step.

Problems are made backwards from their answers, so the reference is right by
construction; answers are compared by value (`rewards.boxed`).
"""

import dataclasses
import math
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Literal, get_args

from dsv32_jax.chat import Message, Mode
from dsv32_jax.rl.problems import splits
from dsv32_jax.rl.problems.types import Problem, Split, check_mode

Wording = Literal['full', 'short']


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Item:
  """A problem in both wordings, its answer as LaTeX, and the steps to it."""

  full: str
  short: str
  answer: str
  steps: tuple[str, ...]


def _linear(rng: random.Random, most: int) -> _Item:
  x = rng.randint(-most, most)
  factor, added = rng.randint(2, 9), rng.randint(1, most)
  sign = rng.choice('+-')
  right = factor * x + (added if sign == '+' else -added)
  equation = f'{factor}x{sign}{added}={right}'
  return _Item(
    full=f'Solve for x: ${equation}$.',
    short=equation,
    answer=str(x),
    steps=(f'{factor}x={factor * x}', f'x={x}'),
  )


def _fractions(rng: random.Random, most: int) -> _Item:
  below = [rng.randint(2, min(most, 12)) for _ in range(2)]
  above = [rng.randint(1, number - 1) for number in below]
  sign = rng.choice('+-')
  common = math.lcm(*below)
  lifted = [a * common // b for a, b in zip(above, below, strict=True)]
  total = lifted[0] + (lifted[1] if sign == '+' else -lifted[1])
  value = Fraction(total, common)
  short = f'{above[0]}/{below[0]}{sign}{above[1]}/{below[1]}'
  frac = [rf'\frac{{{a}}}{{{b}}}' for a, b in zip(above, below, strict=True)]
  return _Item(
    full=f'Compute ${frac[0]} {sign} {frac[1]}$ in lowest terms.',
    short=short,
    answer=str(value),  # '5/6', and '2' for whole numbers.
    steps=(
      f'{lifted[0]}/{common}{sign}{lifted[1]}/{common}={total}/{common}',
      *(
        [f'{total}/{common}={value}']
        if f'{total}/{common}' != str(value)
        else []
      ),
    ),
  )


def _quadratic(rng: random.Random, most: int) -> _Item:
  low, high = sorted(rng.sample(range(-most, most + 1), 2))
  b, c = -(low + high), low * high
  equation = f'x^2{_term(b, "x")}{_term(c, "")}=0'
  return _Item(
    full=f'Find all real solutions of ${equation}$, separated by a comma.',
    short=equation,
    answer=f'{low},{high}',
    steps=(
      f'{low}+{high}={-b}'.replace('+-', '-'),
      f'{low}*{high}={c}',
      f'(x{_minus(low)})(x{_minus(high)})=0',
    ),
  )


def _system(rng: random.Random, most: int) -> _Item:
  x, y = rng.randint(-most, most), rng.randint(-most, most)
  total, difference = x + y, x - y
  return _Item(
    full=(f'Find the pair $(x, y)$ with $x+y={total}$ and $x-y={difference}$.'),
    short=f'x+y={total},x-y={difference}',
    answer=f'({x},{y})',
    steps=(
      f'2x={total + difference}',
      f'x={x}',
      f'y={total}-{x}={y}'.replace('--', '+'),
    ),
  )


def _percent(rng: random.Random, most: int) -> _Item:
  percent = rng.choice((5, 10, 15, 20, 25, 30, 40, 50, 60, 75, 80))
  number = rng.randint(1, most) * 20
  value = percent * number // 100
  return _Item(
    full=f'What is {percent} percent of {number}?',
    short=f'{percent}% of {number}',
    answer=str(value),
    steps=(
      f'{percent}*{number}={percent * number}',
      f'{percent * number}/100={value}',
    ),
  )


def _powers(rng: random.Random, most: int) -> _Item:
  base = rng.randint(2, 5)
  first, second = rng.randint(1, 4), rng.randint(1, 4)
  added = rng.randint(1, most)
  value = base ** (first + second) + added
  return _Item(
    full=rf'Compute ${base}^{first} \cdot {base}^{second} + {added}$.',
    short=f'{base}^{first}*{base}^{second}+{added}',
    answer=str(value),
    steps=(
      f'{base}^{first + second}={base ** (first + second)}',
      f'{base ** (first + second)}+{added}={value}',
    ),
  )


_KINDS: dict[str, Callable[[random.Random, int], _Item]] = {
  'linear': _linear,
  'fractions': _fractions,
  'quadratic': _quadratic,
  'system': _system,
  'percent': _percent,
  'powers': _powers,
}
KINDS = tuple(_KINDS)

_ASK = r' Put the final answer in \boxed{}.'


class MathematicsSource:
  r"""Equations, fractions, percentages, powers.

  >>> source = MathematicsSource(
  ...   kinds=('linear',), wording='short', mode='thinking'
  ... )
  >>> problem = source.problem('train', 0)
  >>> reply = source.demonstration(problem, random.Random(0))
  >>> problem.prompt, reply.reasoning, reply.content
  ('3x+2=80', '3x=78 x=26', '\\boxed{26}')
  """

  name = 'mathematics'
  domain = 'mathematics'

  def __init__(
    self,
    *,
    kinds: tuple[str, ...] | list[str] = KINDS,
    wording: str = 'full',
    most: int = 50,
    seed: int = 0,
    mode: str = 'chat',
  ):
    """Prepares the kinds.

    Args:
      kinds: of problems, in equal shares; any of `KINDS`.
      wording: 'full' sentences with LaTeX, or 'short' formulas.
      most: about the largest number, 2 to 9999.
      seed: of the problems.
      mode: of the problems.
    """
    for kind in kinds:
      if kind not in _KINDS:
        raise ValueError(f'kinds: got {kind!r}, expected some of {list(KINDS)}')
    if not kinds:
      raise ValueError(f'kinds: got none, expected some of {list(KINDS)}')
    if wording not in get_args(Wording):
      raise ValueError(
        f'wording: got {wording!r}, expected one of {list(get_args(Wording))}'
      )
    if not 2 <= most <= 9999:
      raise ValueError(f'most: got {most}, expected 2 to 9999')
    self.mode = check_mode(mode)
    self._kinds = tuple(kinds)
    self._is_short = wording == 'short'
    self._most = most
    self._key = f'mathematics/{"+".join(kinds)}/{wording}/{most}/{seed}'

  def problem(
    self, split: Split, index: int, mode: Mode | None = None
  ) -> Problem:
    """See `ProblemSource.problem`."""
    mode = check_mode(mode or self.mode)
    item = splits.draw(
      self._draw, self._prompt, key=self._key, split=split, index=index
    )
    return Problem(
      id=f'{self._key}/{split}/{index}/{mode}',
      domain=self.domain,
      mode=mode,
      messages=(Message(role='user', content=self._prompt(item)),),
      reference={'answer': item.answer, 'steps': list(item.steps)},
      scorer='boxed',
    )

  def demonstration(
    self, problem: Problem, rng: random.Random, mode: Mode | None = None
  ) -> Message:
    """See `ProblemSource.demonstration`."""
    del rng  # There is one way.
    steps, answer = problem.reference['steps'], problem.reference['answer']
    boxed = rf'\boxed{{{answer}}}'
    if self._is_short:
      reasoning, content = ' '.join(steps), boxed
    else:
      reasoning = '\n'.join(
        f'Step {number}: {step}' for number, step in enumerate(steps, 1)
      )
      content = f'The answer is {boxed}.'
    thinks = (mode or problem.mode) == 'thinking'
    return Message(
      role='assistant',
      content=content,
      reasoning=reasoning if thinks else '',
    )

  def _draw(self, rng: random.Random) -> _Item:
    return _KINDS[rng.choice(self._kinds)](rng, self._most)

  def _prompt(self, item: _Item) -> str:
    return item.short if self._is_short else item.full + _ASK


def _term(factor: int, name: str) -> str:
  """'+3x', '-x', '' for 0."""
  if not factor:
    return ''
  size = '' if name and abs(factor) == 1 else str(abs(factor))
  return f'{"+" if factor > 0 else "-"}{size}{name}'


def _minus(root: int) -> str:
  return f'-{root}' if root >= 0 else f'+{-root}'
