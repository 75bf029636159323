"""Functions on lists of integers: what they do in words, and in Python."""

import dataclasses
import random
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """A function to write.

  Attributes:
    prompt: what is asked for.
    solution: Python that does it.
    work: the plan in words.
    run: does it, by its own means.
  """

  prompt: str
  solution: str
  work: str
  run: Callable[[list[int]], Any]


@dataclasses.dataclass(frozen=True)
class _Step:
  words: str
  code: str
  run: Callable[[list[int]], Any]


def draw(rng: random.Random, steps: int) -> Task:
  """A function of so many steps, of which the last may make one number."""
  chosen = [rng.choice(_ON_LISTS)(rng) for _ in range(steps - 1)]
  last = rng.choice(_ON_LISTS + _TO_NUMBERS)(rng)
  chosen.append(last)
  listed = '; '.join(f'{i}. {s.words}' for i, s in enumerate(chosen, 1))
  body = ''.join(f'  xs = {step.code}\n' for step in chosen)

  def run(numbers: list[int]) -> Any:
    value: Any = list(numbers)
    for step in chosen:
      value = step.run(value)
    return value

  return Task(
    prompt=(
      'Write a Python function f(xs) that takes a list of integers and returns '
      f'what these steps make of it: {listed}. Reply with the code only.'
    ),
    solution=f'def f(xs):\n{body}  return xs',
    work='Step by step, each on the result of the one before: '
    + '; '.join(step.words for step in chosen)
    + '.',
    run=run,
  )


def inputs(rng: random.Random, count: int = 10) -> list[list[int]]:
  """Lists to check with: empty, one number, repeated and negative ones."""
  drawn = [
    [rng.randint(-20, 20) for _ in range(rng.randint(2, 9))]
    for _ in range(count - 3)
  ]
  repeated = [rng.randint(-5, 5)] * 4
  return [[], [rng.randint(-9, 9)], repeated, *drawn]


def _add(rng: random.Random) -> _Step:
  n = rng.randint(1, 20)
  return _Step(
    f'add {n} to every number',
    f'[x + {n} for x in xs]',
    lambda xs: [n + x for x in xs],
  )


def _multiply(rng: random.Random) -> _Step:
  n = rng.randint(2, 9)
  return _Step(
    f'multiply every number by {n}',
    f'[x * {n} for x in xs]',
    lambda xs: [sum([x] * n) for x in xs],
  )


def _keep_divisible(rng: random.Random) -> _Step:
  n = rng.randint(2, 5)
  return _Step(
    f'keep the numbers that are divisible by {n}',
    f'[x for x in xs if x % {n} == 0]',
    lambda xs: [x for x in xs if not x % n],
  )


def _keep_greater(rng: random.Random) -> _Step:
  n = rng.randint(-10, 10)
  return _Step(
    f'keep the numbers greater than {n}',
    f'[x for x in xs if x > {n}]',
    lambda xs: [x for x in xs if not x <= n],
  )


def _first(rng: random.Random) -> _Step:
  n = rng.randint(1, 5)
  return _Step(
    f'keep the first {n} numbers (all if there are fewer)',
    f'xs[:{n}]',
    lambda xs: [x for i, x in enumerate(xs) if i < n],
  )


def _sorted(rng: random.Random) -> _Step:
  if rng.random() < 0.5:
    return _Step('sort in ascending order', 'sorted(xs)', sorted)
  return _Step(
    'sort in descending order',
    'sorted(xs, reverse=True)',
    lambda xs: sorted(xs)[::-1],
  )


def _reversed(rng: random.Random) -> _Step:
  del rng
  return _Step('reverse the order', 'xs[::-1]', lambda xs: list(reversed(xs)))


def _without_repeats(rng: random.Random) -> _Step:
  del rng
  return _Step(
    'drop numbers that occurred before',
    'list(dict.fromkeys(xs))',
    lambda xs: [x for i, x in enumerate(xs) if x not in xs[:i]],
  )


def _sum(rng: random.Random) -> _Step:
  del rng
  return _Step('return the sum (0 for an empty list)', 'sum(xs)', sum)


def _count(rng: random.Random) -> _Step:
  del rng
  return _Step('return how many there are', 'len(xs)', lambda xs: len([*xs]))


def _largest(rng: random.Random) -> _Step:
  del rng
  return _Step(
    'return the largest number (None for an empty list)',
    'max(xs, default=None)',
    lambda xs: sorted(xs)[-1] if xs else None,
  )


_ON_LISTS = (
  _add,
  _multiply,
  _keep_divisible,
  _keep_greater,
  _first,
  _sorted,
  _reversed,
  _without_repeats,
)
_TO_NUMBERS = (_sum, _count, _largest)
