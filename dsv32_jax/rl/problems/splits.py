"""Held-out problems: a prompt's own text says which split it belongs to.

So no prompt is in both splits, whichever source, seed or options it comes from,
and nothing has to be remembered.
"""

import hashlib
import random
from collections.abc import Callable
from typing import TypeVar, get_args

from dsv32_jax.rl.problems.types import Split

T = TypeVar('T')

# Of 256 hash values these many are held out: a quarter of the prompts. A small
# source (sums of two two-digit numbers: 8,100 prompts) still holds out enough
# of them to measure a few points.
_HELD_OUT = 64
_MOST_ATTEMPTS = 2000


def is_held_out(prompt: str) -> bool:
  """Whether a prompt belongs to the held-out split; white space is ignored.

  >>> sum(is_held_out(f'{i}+1=') for i in range(1000))
  284
  """
  digest = hashlib.sha256(' '.join(prompt.split()).encode()).digest()
  return digest[0] < _HELD_OUT


def draw(
  make: Callable[[random.Random], T],
  prompt_of: Callable[[T], str],
  *,
  key: str,
  split: str,
  index: int,
) -> T:
  """Draws until something of the split comes.

  Args:
    make: makes one from a generator of its own.
    prompt_of: the prompt whose text decides.
    key: source, options and seed.
    split: 'train' or 'held_out'.
    index: of the problem.

  Returns:
    The same for the same arguments.

  Raises:
    ValueError: for an unknown split or a negative index, or if a source has so
      few prompts that none belongs to the split.
  """
  if split not in get_args(Split):
    raise ValueError(
      f'split: got {split!r}, expected one of {list(get_args(Split))}'
    )
  if index < 0:
    raise ValueError(f'index: got {index}, expected 0 or more')
  for attempt in range(_MOST_ATTEMPTS):
    made = make(random.Random(f'{key}/{split}/{index}/{attempt}'))
    if is_held_out(prompt_of(made)) == (split == 'held_out'):
      return made
  raise ValueError(
    f'split: found no prompt of {key} that belongs to {split!r} in '
    f'{_MOST_ATTEMPTS} attempts; expected options with more different prompts'
  )
