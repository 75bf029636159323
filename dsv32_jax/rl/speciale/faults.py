"""Faults of every kind, put into right derivations.

Which faults a result has is never taken from how it was made: `check` says it,
and what does not have the fault that was meant is thrown away.
"""

import dataclasses
import random
import re
from collections.abc import Callable, Sequence

from dsv32_jax.rl.speciale.derivations import (
  Derivation,
  FaultKind,
  Step,
  Task,
  Verdict,
  check,
)
from dsv32_jax.rl.speciale.rules import RULES
from dsv32_jax.rl.speciale.tasks import solve
from dsv32_jax.rl.speciale.terms import (
  TermError,
  means_the_same,
  parse_line,
)

_TRIES = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
  """A derivation with the truth about it."""

  steps: Derivation
  verdict: Verdict


def put_fault(
  task: Task, right: Derivation, kind: FaultKind, rng: random.Random
) -> Judged | None:
  """A derivation with a fault of a kind, and perhaps others that follow.

  Args:
    task: what is derived.
    right: a right derivation of it.
    kind: of the fault.
    rng: chooses where and how.

  Returns:
    None if this derivation offers no place for such a fault.
  """
  for _ in range(_TRIES):
    steps = _MAKERS[kind](task, right, rng)
    if steps is None:
      continue
    verdict = check(task, steps)
    if kind in {fault.kind for fault in verdict.faults}:
      return Judged(steps=steps, verdict=verdict)
  return None


def put_some_fault(
  task: Task,
  right: Derivation,
  rng: random.Random,
  kinds: Sequence[FaultKind] = ('value', 'rule', 'jump', 'goal', 'form'),
) -> Judged:
  """A derivation with a fault of the first kind that fits, in random order.

  Raises:
    ValueError: if none of `kinds` fits.
  """
  for kind in rng.sample(kinds, len(kinds)):
    judged = put_fault(task, right, kind, rng)
    if judged is not None:
      return judged
  raise ValueError(f'kinds: got {list(kinds)}, expected one that fits {task}')


def _wrong_value(
  task: Task, right: Derivation, rng: random.Random
) -> Derivation | None:
  """A line that says something else, and the rest right from there on."""
  place = rng.randrange(len(right))
  step = right[place]
  text = _changed(step.text, rng)
  try:
    line = parse_line(text)
    if str(line) != text or means_the_same(line, parse_line(step.text)):
      return None
  except TermError:
    return None
  rest = right[place + 1 :]
  if task.kind != 'prove':
    # It may not come to an end: 2*x=3 has no whole solution.
    rest = solve(task, start=line, rng=rng, limit=len(right) + 2)
    if rest is None:
      return None
  return (*right[:place], Step(text=text, rule=step.rule), *rest)


def _changed(text: str, rng: random.Random) -> str:
  """A text with one number, sign or letter of it made another."""
  places = list(re.finditer(r'\d+|[-+]|[a-z]', text))
  if not places:
    return text
  place = rng.choice(places)
  old = place[0]
  if old.isdigit():
    value = int(old)
    new = str(abs(rng.choice((value - 1, value + 1, value + 10, value - 2))))
  elif old.isalpha():
    new = rng.choice(sorted(set(re.findall('[a-z]', text))))
  else:
    new = {'+': '-', '-': '+'}[old]
  return text[: place.start()] + new + text[place.end() :]


def _wrong_rule(
  task: Task, right: Derivation, rng: random.Random
) -> Derivation:
  del task
  place = rng.randrange(len(right))
  others = [name for name in RULES if name != right[place].rule]
  wrong = dataclasses.replace(right[place], rule=rng.choice(others))
  return (*right[:place], wrong, *right[place + 1 :])


def _left_out(
  task: Task, right: Derivation, rng: random.Random
) -> Derivation | None:
  del task
  if len(right) < 2:
    return None
  place = rng.randrange(len(right) - 1)
  return (*right[:place], *right[place + 1 :])


def _cut_short(
  task: Task, right: Derivation, rng: random.Random
) -> Derivation | None:
  del task
  return right[: rng.randrange(1, len(right))] if len(right) > 1 else None


def _unreadable(
  task: Task, right: Derivation, rng: random.Random
) -> Derivation:
  del task
  place = rng.randrange(len(right))
  step = right[place]
  text = rng.choice((step.text + '+', step.text + '=', '(' + step.text))
  return (*right[:place], Step(text=text, rule=step.rule), *right[place + 1 :])


_Maker = Callable[[Task, Derivation, random.Random], Derivation | None]
_MAKERS: dict[FaultKind, _Maker] = {
  'value': _wrong_value,
  'rule': _wrong_rule,
  'jump': _left_out,
  'goal': _cut_short,
  'form': _unreadable,
}
