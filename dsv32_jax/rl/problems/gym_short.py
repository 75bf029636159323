"""Short prompts for families of reasoning-gym, and how to work them out.

The library's own wording is dozens of bytes a prompt, which a byte-level model
of a million parameters spends its context on. The items and the verifiers stay
the library's; only the question is put in fewer words.

Each `_<family>_work` writes the steps that lead to the answer.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class ShortForm:
  """A family in few bytes.

  Attributes:
    prompt: of an item.
    work: the steps to its answer, as text.
    options: for the items to be short as well, unless others are given.
  """

  prompt: Callable[[dict[str, Any]], str]
  work: Callable[[dict[str, Any]], str]
  options: dict[str, Any] = dataclasses.field(default_factory=dict)


def _meta(name: str) -> Callable[[dict[str, Any]], Any]:
  return lambda item: item['metadata'][name]


def _chain_sum_work(item: dict[str, Any]) -> str:
  """Left to right: 3 + 4 - 5 is '3+4=7 7-5=2'."""
  first, *rest = re.findall(r'[-+]? ?\d+', item['metadata']['expression'])
  total = int(first)
  steps = []
  for term in rest:
    term = term.replace(' ', '')
    steps.append(f'{total}{term}={total + int(term)}')
    total += int(term)
  return ' '.join(steps)


def _product_work(item: dict[str, Any]) -> str:
  """Digit by digit of the second factor, then their sum."""
  first, second = (
    int(part) for part in item['metadata']['expression'].split(' * ')
  )
  parts = [
    int(digit) * 10**place
    for place, digit in enumerate(reversed(str(abs(second))))
    if digit != '0'
  ] or [0]
  products = [first * part for part in reversed(parts)]
  steps = [
    f'{first}*{part}={product}'
    for part, product in zip(reversed(parts), products, strict=True)
  ]
  total = '+'.join(map(str, products))
  return ' '.join([*steps, total] if len(parts) > 1 else steps)


def _gcd_steps(first: int, second: int) -> list[str]:
  steps = []
  while second:
    steps.append(f'{first}%{second}={first % second}')
    first, second = second, first % second
  return steps


def _gcd_work(item: dict[str, Any]) -> str:
  numbers = item['metadata']['numbers']
  steps, value = [], numbers[0]
  for number in numbers[1:]:
    steps += _gcd_steps(max(value, number), min(value, number))
    value = math.gcd(value, number)
  return ' '.join(steps)


def _lcm_work(item: dict[str, Any]) -> str:
  steps, value = [], item['metadata']['numbers'][0]
  for number in item['metadata']['numbers'][1:]:
    divisor = math.gcd(value, number)
    steps += _gcd_steps(max(value, number), min(value, number))
    steps.append(f'{value}*{number}/{divisor}={value * number // divisor}')
    value = value * number // divisor
  return ' '.join(steps)


def _fraction_work(item: dict[str, Any]) -> str:
  above, below = (
    item['metadata']['numerator'],
    item['metadata']['denominator'],
  )
  divisor = math.gcd(above, below)
  return f'gcd {divisor} {above}/{divisor}={above // divisor} ' + (
    f'{below}/{divisor}={below // divisor}'
  )


def _letter_count_work(item: dict[str, Any]) -> str:
  """Each word with its count."""
  letter = item['metadata']['target_letter']
  return ' '.join(
    f'{word}:{word.lower().count(letter)}' for word in item['metadata']['span']
  )


def _equation_work(item: dict[str, Any]) -> str:
  """'2*g + 5 = 19' is '2*g=14 g=7', where the equation has that form."""
  equation, variable = (
    item['metadata']['equation'],
    item['metadata']['variable'],
  )
  form = rf'(\d+)\*{variable} ([+-]) (\d+) = (-?\d+)'
  found = re.fullmatch(form, equation)
  last = f'{variable}={item["answer"]}'
  if not found:
    return last
  factor, sign, added, right = found.groups()
  left = int(right) - int(sign + added)
  return f'{factor}*{variable}={left} {last}'


def _sequence_work(item: dict[str, Any]) -> str:
  """Differences of neighbours."""
  shown = item['metadata']['sequence'][:-1]
  return ' '.join(str(b - a) for a, b in itertools.pairwise(shown))


SHORT = {
  'chain_sum': ShortForm(
    lambda item: _meta('expression')(item).replace(' ', '') + '=',
    _chain_sum_work,
    {'min_terms': 2, 'max_terms': 2, 'min_digits': 1, 'max_digits': 2},
  ),
  'products': ShortForm(
    lambda item: _meta('expression')(item).replace(' ', '') + '=',
    _product_work,
    {'min_digits': 1, 'max_digits': 2},
  ),
  'gcd': ShortForm(
    lambda item: 'gcd ' + ' '.join(map(str, _meta('numbers')(item))),
    _gcd_work,
    {'max_value': 99},
  ),
  'lcm': ShortForm(
    lambda item: 'lcm ' + ' '.join(map(str, _meta('numbers')(item))),
    _lcm_work,
    {'max_value': 30},
  ),
  'count_bits': ShortForm(
    lambda item: f'bits {_meta("number")(item)}',
    lambda item: str(_meta('binary')(item)),
    {'max_n': 9999},
  ),
  'spell_backward': ShortForm(
    lambda item: f'reverse {_meta("word")(item)}',
    lambda item: ' '.join(_meta('word')(item)),
    {'max_word_len': 6},
  ),
  'letter_counting': ShortForm(
    lambda item: (
      f'count {_meta("target_letter")(item)}: ' + ' '.join(_meta('span')(item))
    ),
    _letter_count_work,
    {'min_words': 1, 'max_words': 3},
  ),
  'simple_equations': ShortForm(
    lambda item: _meta('equation')(item).replace(' ', ''),
    _equation_work,
    {'min_terms': 2, 'max_terms': 2, 'max_value': 20},
  ),
  'fraction_simplification': ShortForm(
    lambda item: (
      f'simplify {_meta("numerator")(item)}/{_meta("denominator")(item)}'
    ),
    _fraction_work,
    {'styles': ('plain',), 'max_value': 20, 'max_factor': 12},
  ),
  'number_sequence': ShortForm(
    lambda item: item['question'].replace(' ', ''),
    _sequence_work,
    {'max_terms': 5, 'min_value': 0, 'max_value': 30, 'max_complexity': 1},
  ),
  'base_conversion': ShortForm(
    lambda item: (
      f'base {_meta("source_base")(item)} to {_meta("target_base")(item)}: '
      f'{_meta("source_repr")(item)}'
    ),
    lambda item: str(_meta('decimal_value')(item)),
    {'max_value': 255},
  ),
}
