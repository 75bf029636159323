"""Logical reasoning in few bytes, with answers that follow by rule.

Own families, because reasoning-gym's are worded at length and some are wrong
(`gym_datasets.REFUSED`). Every answer is unique, and each family has a way to
work it out step by step that a small model can follow.
"""

import dataclasses
import itertools
import random
from collections.abc import Callable
from typing import Any

from dsv32_jax.chat import Message, Mode
from dsv32_jax.rl.problems import splits
from dsv32_jax.rl.problems.types import Problem, Split, check_mode

_LETTERS = 'abcdefghijklmnopqrstuvwxyz'


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Item:
  """A puzzle, its answer, and the steps between."""

  prompt: str
  answer: str
  work: str


def _order(rng: random.Random, size: int) -> _Item:
  """Neighbours in a row are told in any order; the row is asked for."""
  row = rng.sample(_LETTERS, size)
  facts = [f'{a}<{b}' for a, b in itertools.pairwise(row)]
  told = rng.sample(facts, len(facts))
  return _Item(
    prompt='order ' + ' '.join(told),
    answer=''.join(row),
    work=' '.join(facts),
  )


def _truth(rng: random.Random, size: int) -> _Item:
  """Who tells the truth (+) says of the next one what is so; liars (-) not."""
  names = rng.sample(_LETTERS, size)
  signs = [rng.choice('+-') for _ in names]
  pairs = zip(names[:-1], signs[:-1], names[1:], signs[1:], strict=True)
  facts = [
    f'{a}:{b}{"+" if (own == "+") == (other == "+") else "-"}'
    for a, own, b, other in pairs
  ]
  solved = [name + sign for name, sign in zip(names, signs, strict=True)]
  return _Item(
    prompt=f'truth {solved[0]} ' + ' '.join(facts),
    answer=''.join(solved),
    work=' '.join(
      f'{before} {fact} {after}'
      for before, fact, after in zip(
        solved[:1], facts[:1], solved[1:2], strict=True
      )
    )
    + ''.join(
      f' {fact} {after}'
      for fact, after in zip(facts[1:], solved[2:], strict=True)
    ),
  )


def _follow(rng: random.Random, size: int) -> _Item:
  """Which letter a chain of rules ends with, among rules that lead away."""
  letters = rng.sample(_LETTERS, size + 1 + max(size - 1, 1) * 2)
  chain, rest = letters[: size + 1], letters[size + 1 :]
  rules = [f'{a}>{b}' for a, b in itertools.pairwise(chain)]
  others = [f'{a}>{b}' for a, b in zip(rest[::2], rest[1::2], strict=True)]
  told = rules + others[: max(size - 1, 1)]
  rng.shuffle(told)
  return _Item(
    prompt=f'from {chain[0]}: ' + ' '.join(told),
    answer=chain[-1],
    work=''.join(chain),
  )


def _formula(rng: random.Random, size: int) -> _Item:
  """The value of a formula for every value of a and b."""
  text, value = _expression(rng, size)
  rows = [(a, b) for a in (0, 1) for b in (0, 1)]
  answer = ''.join(str(int(value(a, b))) for a, b in rows)
  return _Item(
    prompt=f'table {text}',
    answer=answer,
    work=' '.join(
      f'{a}{b}:{bit}' for (a, b), bit in zip(rows, answer, strict=True)
    ),
  )


def _expression(
  rng: random.Random, size: int
) -> tuple[str, Callable[[int, int], bool]]:
  """A formula of `size` letters, bracketed, and what it means."""
  if size == 1:
    index = rng.randrange(2)
    if rng.random() < 0.3:
      return '!' + 'ab'[index], lambda *values: not values[index]
    return 'ab'[index], lambda *values: bool(values[index])
  left_size = rng.randrange(1, size)
  left, left_value = _expression(rng, left_size)
  right, right_value = _expression(rng, size - left_size)
  sign, meaning = rng.choice(_SIGNS)
  if left_size > 1:
    left = f'({left})'
  if size - left_size > 1:
    right = f'({right})'
  return (
    f'{left}{sign}{right}',
    lambda *values: meaning(left_value(*values), right_value(*values)),
  )


_SIGNS: tuple[tuple[str, Callable[[bool, bool], bool]], ...] = (
  ('&', lambda a, b: a and b),
  ('|', lambda a, b: a or b),
  ('^', lambda a, b: a != b),
  ('>', lambda a, b: not a or b),
)

# Family: how it is drawn, its default size and the sizes that it has.
_FAMILIES: dict[str, tuple[Callable[..., _Item], int, tuple[int, int]]] = {
  'order': (_order, 4, (3, 12)),
  'truth': (_truth, 4, (3, 12)),
  'follow': (_follow, 3, (2, 8)),
  'formula': (_formula, 4, (3, 10)),
}
FAMILIES = tuple(_FAMILIES)


class LogicSource:
  """Short puzzles: 'order', 'truth', 'follow' or 'formula'.

  >>> source = LogicSource(family='order', mode='thinking')
  >>> problem = source.problem('train', 0)
  >>> reply = source.demonstration(problem, random.Random(0))
  >>> problem.prompt, reply.reasoning, reply.content
  ('order z<f q<w w<z', 'q<w w<z z<f', 'qwzf')
  """

  name = 'logic'
  domain = 'logical_reasoning'

  def __init__(
    self,
    *,
    family: str = 'order',
    size: int | None = None,
    seed: int = 0,
    mode: str = 'chat',
  ):
    """Prepares the family.

    Args:
      family: 'order' (sort letters by what is told of neighbours), 'truth' (who
        lies), 'follow' (where a chain of rules leads), 'formula' (a truth
        table), or 'mixed'.
      size: letters of the puzzle; None takes the family's. Not with 'mixed'.
      seed: of the problems.
      mode: of the problems.
    """
    known = [*_FAMILIES, 'mixed']
    if family not in known:
      raise ValueError(f'family: got {family!r}, expected one of {known}')
    if size is not None:
      least, most = _FAMILIES.get(family, (None, 0, (1, 0)))[2]
      if not least <= size <= most:
        expected = (
          'None' if family == 'mixed' else f'{least} to {most} for {family!r}'
        )
        raise ValueError(f'size: got {size}, expected {expected}')
    self.mode = check_mode(mode)
    self._family = family
    self._size = size
    self._key = f'logic/{family}/{size}/{seed}'

  def problem(
    self, split: Split, index: int, mode: Mode | None = None
  ) -> Problem:
    """See `ProblemSource.problem`."""
    mode = check_mode(mode or self.mode)
    item = splits.draw(
      self._draw,
      lambda item: item.prompt,
      key=self._key,
      split=split,
      index=index,
    )
    return Problem(
      id=f'{self._key}/{split}/{index}/{mode}',
      domain=self.domain,
      mode=mode,
      messages=(Message(role='user', content=item.prompt),),
      reference={'answer': item.answer, 'work': item.work},
      scorer='exact',
    )

  def demonstration(
    self, problem: Problem, rng: random.Random, mode: Mode | None = None
  ) -> Message:
    """See `ProblemSource.demonstration`."""
    del rng  # There is one way.
    return demonstrated(problem.reference, mode or problem.mode)

  def _draw(self, rng: random.Random) -> _Item:
    family = self._family
    if family == 'mixed':
      family = rng.choice(FAMILIES)
    make, size, _ = _FAMILIES[family]
    return make(rng, size if self._size is None else self._size)


def demonstrated(reference: dict[str, Any], mode: str) -> Message:
  """The answer of a reference that holds it, with its 'work' if thinking."""
  return Message(
    role='assistant',
    content=reference['answer'],
    reasoning=reference['work'] if mode == 'thinking' else '',
  )
