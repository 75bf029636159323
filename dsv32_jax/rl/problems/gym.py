"""Problems of reasoning-gym, scored by the verifier of their family."""

import functools
import hashlib
import json
import random
from typing import Any, Literal, get_args

from dsv32_jax.chat import Message, Mode
from dsv32_jax.rl.problems import gym_datasets, splits
from dsv32_jax.rl.problems.gym_short import SHORT
from dsv32_jax.rl.problems.types import Problem, Split, check_mode

Wording = Literal['own', 'short']

_DOMAINS = {
  'algebra': 'mathematics',
  'arithmetic': 'mathematics',
  'geometry': 'mathematics',
  'probability': 'mathematics',
  'code': 'programming',
}


class GymSource:
  """One family of reasoning-gym.

  >>> source = GymSource('chain_sum', wording='short')
  >>> problem = source.problem('train', 0)
  >>> problem.prompt, source.demonstration(problem, random.Random(0)).content
  ('0-2=', '-2')
  """

  def __init__(
    self,
    family: str,
    *,
    seed: int = 0,
    mode: str = 'chat',
    wording: str = 'own',
    domain: str | None = None,
    **options: Any,
  ):
    """Prepares the family.

    Args:
      family: as registered in reasoning-gym.
      seed: of the problems.
      mode: of the problems.
      wording: 'own' is the library's; 'short' is ours (`gym_short.SHORT`), with
        options for small items unless others are given.
      domain: None goes by the family's category.
      **options: fields of the family's configuration.

    Raises:
      ValueError: unknown families, options and modes, and families whose
        verifiers are broken.
      ModuleNotFoundError: without the extra `rl`.
    """
    self.mode = check_mode(mode)
    if wording not in get_args(Wording):
      raise ValueError(
        f'wording: got {wording!r}, expected one of {list(get_args(Wording))}'
      )
    if wording == 'short':
      if family not in SHORT:
        raise ValueError(
          f"wording: got 'short' for {family}, expected one of {sorted(SHORT)}"
        )
      options = {**SHORT[family].options, **options}
    self._options = json.dumps(options, sort_keys=True)
    gym_datasets.dataset(family, self._options)
    self.name = f'gym/{family}'
    self.family = family
    self.domain = domain or _DOMAINS.get(
      gym_datasets.category(family), 'logical_reasoning'
    )
    self._wording = wording
    tag = hashlib.sha256(f'{self._options}/{wording}'.encode()).hexdigest()[:8]
    self._key = f'{self.name}/{tag}/{seed}'

  def problem(
    self, split: Split, index: int, mode: Mode | None = None
  ) -> Problem:
    """See `ProblemSource.problem`."""
    mode = check_mode(mode or self.mode)
    item = splits.draw(
      self._draw_index,
      self._prompt,
      key=self._key,
      split=split,
      index=index,
    )
    return Problem(
      id=f'{self._key}/{split}/{index}/{mode}',
      domain=self.domain,
      mode=mode,
      messages=(Message(role='user', content=self._prompt(item)),),
      reference={
        'family': self.family,
        'options': self._options,
        'index': item,
        'answer': self._item(item)['answer'],
      },
      scorer='gym',
    )

  def demonstration(
    self, problem: Problem, rng: random.Random, mode: Mode | None = None
  ) -> Message:
    """See `ProblemSource.demonstration`."""
    del rng  # There is one way.
    item = self._item(problem.reference['index'])
    if item['answer'] is None:
      raise ValueError(f'problem: {self.name} stores no answers to show')
    answer = str(item['answer'])
    if (mode or problem.mode) == 'chat':
      return Message(role='assistant', content=answer)
    if self.family not in SHORT:
      raise ValueError(
        f'mode: got thinking, but no program here works out {self.name}; '
        f'expected chat, or one of {sorted(SHORT)}'
      )
    work = SHORT[self.family].work(item)
    return Message(role='assistant', content=answer, reasoning=work)

  def _draw_index(self, rng: random.Random) -> int:
    return rng.randrange(gym_datasets.num_items(self.family, self._options))

  def _item(self, index: int) -> dict[str, Any]:
    return gym_datasets.item(self.family, self._options, index)

  def _prompt(self, index: int) -> str:
    item = self._item(index)
    if self._wording == 'short':
      return SHORT[self.family].prompt(item)
    return item['question']


def make(name: str, options: dict[str, Any]) -> GymSource:
  """The source 'gym/<family>'."""
  return GymSource(name.removeprefix('gym/'), **options)


@functools.cache
def names() -> tuple[str, ...]:
  return tuple(f'gym/{family}' for family in gym_datasets.families())
