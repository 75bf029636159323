"""Rubrics: what a response has to meet, and programs that check it.

General tasks are scored by a generative reward model with a rubric for every
prompt (arXiv:2512.02556, section 3; its format is not published). Here a rubric
is a list of criteria with weights; a judge gives each a score s in 0 to 1, and
the reward is the weighted mean sum(w s) / sum(w).
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from dsv32_jax.chat.schema import Schema
from dsv32_jax.rl.problems import Criterion

# What `count` and `length` count.
_UNITS: dict[str, Callable[[str], int]] = {
  'characters': len,
  'words': lambda text: len(text.split()),
  'lines': lambda text: sum(bool(line.strip()) for line in text.splitlines()),
  'sentences': lambda text: sum(
    any(map(str.isalnum, part)) for part in re.split('[.!?]', text)[:-1]
  ),
  'paragraphs': lambda text: len(
    [part for part in re.split(r'\n\s*\n', text) if part.strip()]
  ),
}

_FORMATS: dict[str, Callable[[str], bool]] = {
  'bullets': lambda text: _all_lines(text, r'\s*[-*•] \S.*'),
  'numbered': lambda text: (
    _all_lines(text, r'\s*\d+[.)] \S.*')
    and re.findall(r'^\s*(\d+)[.)] ', text, re.MULTILINE)
    == [str(n) for n in range(1, _UNITS['lines'](text) + 1)]
  ),
  'json': lambda text: _json(text) is not None,
  'lowercase': lambda text: text == text.lower() and bool(text.strip()),
  'uppercase': lambda text: text == text.upper() and bool(text.strip()),
  'one_line': lambda text: _UNITS['lines'](text) == 1,
}


def weighted(rubric: Sequence[Criterion], scores: Sequence[float]) -> float:
  """sum(w s) / sum(w).

  >>> weighted(
  ...   [Criterion(text='a', weight=3.0), Criterion(text='b')], [1.0, 0.0]
  ... )
  0.75
  """
  total = sum(criterion.weight for criterion in rubric)
  pairs = zip(rubric, scores, strict=True)
  return sum(criterion.weight * score for criterion, score in pairs) / total


def check(criterion: Criterion, text: str) -> float:
  """The score of a text by one criterion.

  | kind | arguments |
  |---|---|
  | contains | words: each found gives its share; whole words, any case |
  | excludes | words: none may be there |
  | count | text, least, most: how often it occurs |
  | length | unit, least, most |
  | format | name: 'bullets', 'numbered', 'json', 'lowercase', ... |
  | json_schema | schema: that the text, as JSON, meets |

  Raises:
    ValueError: for a criterion that no program checks, or bad arguments.
  """
  arguments = criterion.arguments
  try:
    if criterion.kind == 'contains':
      words = arguments['words']
      return sum(_occurs(word, text) for word in words) / len(words)
    if criterion.kind == 'excludes':
      return float(not any(_occurs(word, text) for word in arguments['words']))
    if criterion.kind == 'count':
      return _within(text.count(arguments['text']), arguments)
    if criterion.kind == 'length':
      return _within(_UNITS[arguments['unit']](text), arguments)
    if criterion.kind == 'format':
      return float(_FORMATS[arguments['name']](text))
    if criterion.kind == 'json_schema':
      value = _json(text)
      schema = Schema(arguments['schema'], field='schema')
      return float(value is not None and schema.problem(value[0]) is None)
  except (KeyError, TypeError, ZeroDivisionError) as error:
    raise ValueError(
      f'arguments: {criterion.kind} cannot use {arguments} ({error!r})'
    ) from None
  raise ValueError(
    f'kind: {criterion.kind!r} ({criterion.text!r}) is for a model that judges'
  )


def _within(count: int, arguments: dict[str, Any]) -> float:
  least, most = arguments.get('least', 0), arguments.get('most', count)
  return float(least <= count <= most)


def _occurs(word: str, text: str) -> bool:
  return bool(
    re.search(rf'(?<!\w){re.escape(word)}(?!\w)', text, re.IGNORECASE)
  )


def _all_lines(text: str, pattern: str) -> bool:
  lines = [line for line in text.splitlines() if line.strip()]
  return bool(lines) and all(re.fullmatch(pattern, line) for line in lines)


def _json(text: str) -> tuple[Any] | None:
  """The value in a tuple, since null is one."""
  try:
    return (json.loads(text),)
  except (ValueError, RecursionError):
    return None
