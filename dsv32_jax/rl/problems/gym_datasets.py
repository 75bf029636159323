"""The one file that knows reasoning-gym: its items, and its verifiers.

It imports nothing of this project, because a process that scores loads it alone
(`rewards.worker_main`): that one needs no jax.

Left out by name are families that would reward the wrong thing. What is wrong
with each was found by giving its verifier wrong answers
(tests/dsv32_jax/rl/problems/gym_test.py gives them again).
"""

import functools
import json
from typing import Any

_HASHED = (
  "its items follow Python's hash seed: a run that was killed and started "
  'again would see other problems'
)
# Release 0.1.25. The reason stands in the error.
REFUSED = {
  'game_of_life_halting': 'its verifier gives full marks to any text',
  'puzzle24': (
    'its verifier does not check which numbers an expression uses, and '
    'evaluates the answer as Python code'
  ),
  'coin_flip': (
    'its verifier compares leading digits: "0" gets full marks for 0.03125'
  ),
  'syllogism': (
    'its labels are wrong where the middle term is undistributed ("All A are '
    'B, some B are C" is taken to imply "some A are C")'
  ),
  'binary_matrix': 'its verifier evaluates the answer as Python code',
  'countdown': 'its verifier evaluates the answer as Python code',
  'intermediate_integration': (
    'its verifier evaluates the answer as Python code'
  ),
  'n_queens': 'its verifier evaluates the answer as Python code',
  'polynomial_multiplication': (
    'its verifier evaluates the answer as Python code'
  ),
  'simple_integration': 'its verifier evaluates the answer as Python code',
  'spiral_matrix': 'its verifier evaluates the answer as Python code',
  'string_insertion': 'its verifier evaluates the answer as Python code',
  'isomorphic_strings': _HASHED,
  'knight_swap': _HASHED,
  'list_functions': _HASHED,
  'ransom_note': _HASHED,
  'word_ladder': _HASHED,
  'composite': 'it mixes other families; name those',
}

# Families of a fixed number of items; in the others an index may be any number.
_LISTED = ('acre', 'gsm_symbolic')

# Their verifiers compare text or decimal numbers: nothing in them can hang,
# whatever the answer.
HARMLESS = (
  'chain_sum',
  'decimal_chain_sum',
  'number_format',
  'products',
  'self_reference',
  'spell_backward',
)

# An item counts as solved from here on; below it is partial credit.
FULL_MARKS = 1 - 1e-9


def families() -> list[str]:
  """Names of the families that may be used."""
  return sorted(set(_registry()) - set(REFUSED))


def category(family: str) -> str:
  """The library's own category, such as 'arithmetic'."""
  return _registry()[family][0].__module__.split('.')[1]


def cannot_hang(family: str) -> bool:
  """Whether the verifier may run in the process that trains."""
  # The base class compares text.
  return (
    family in HARMLESS or 'score_answer' not in _registry()[family][0].__dict__
  )


def num_items(family: str, options: str) -> int:
  """How many different indices there are."""
  return len(dataset(family, options)) if family in _LISTED else 10**9


@functools.lru_cache(maxsize=64)
def dataset(family: str, options: str) -> Any:
  """The dataset of a family.

  Args:
    family: as registered in reasoning-gym.
    options: fields of the family's configuration, as JSON of an object.

  Raises:
    ValueError: unknown or refused families, and options that it does not take.
    ModuleNotFoundError: without the extra `rl`.
  """
  registry = _registry()
  if family in REFUSED:
    raise ValueError(f'family: got {family!r}, but {REFUSED[family]}')
  if family not in registry:
    raise ValueError(
      f'family: got {family!r}, expected one of {sorted(registry)}'
    )
  import reasoning_gym

  given = {
    name: tuple(value) if isinstance(value, list) else value
    for name, value in json.loads(options).items()
  }
  for name in ('seed', 'size'):
    if name in given and (name == 'seed' or family not in _LISTED):
      raise ValueError(
        f'options.{name}: got {given[name]!r}, expected none (the index of a '
        'problem takes its place)'
      )
  try:
    return reasoning_gym.create_dataset(family, seed=0, **given)
  except (AssertionError, TypeError, ValueError) as error:
    raise ValueError(
      f'options: {family} does not take {given}: {error}'
    ) from None


@functools.lru_cache(maxsize=4096)
def item(family: str, options: str, index: int) -> dict[str, Any]:
  """Item `index` of a family: 'question', 'answer' and 'metadata'."""
  return dataset(family, options)[index]


def score(reference: dict[str, Any], answer: str) -> float:
  """The verifier's mark, 0 to 1; 0 where the verifier fails.

  Args:
    reference: 'family', 'options' (JSON text) and 'index'.
    answer: what the model answered.
  """
  family, options = reference['family'], reference['options']
  made = item(family, options, reference['index'])
  if not answer.strip():
    return 0.0  # Some verifiers give a little for saying nothing.
  try:
    mark = dataset(family, options).score_answer(answer, made)
  except Exception:
    return 0.0  # prime_factorization raises for what is no number, and so on.
  return float(mark or 0.0)


@functools.cache
def _registry() -> dict[str, Any]:
  try:
    from reasoning_gym.factory import DATASETS
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      "reasoning_gym: not installed, expected the extra 'rl' "
      "(pip install -e '.[rl]')"
    ) from error
  return DATASETS
