"""Derivations whose every step a program can judge.

A derivation is what a proof is elsewhere: numbered lines, each made from the
one before by a rule that it cites. Whether a step is right, and if not why,
follows from the rules alone, so that labels of proofs, which DeepSeekMath-V2
buys from experts, cost nothing here.

    Solve 2*x+3=7.
    1. 2*x=7-3 (move)
    2. 2*x=4 (add)
    3. x=2 (div)
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

from dsv32_jax.rl.speciale.rules import RULES
from dsv32_jax.rl.speciale.terms import (
  Equation,
  Line,
  Number,
  Product,
  Sum,
  TermError,
  Variable,
  means_the_same,
  parse_line,
)

TaskKind = Literal['compute', 'simplify', 'solve', 'prove']
FaultKind = Literal['form', 'value', 'rule', 'jump', 'goal']

MEANINGS: dict[FaultKind, str] = {
  'form': 'cannot be read as a step',
  'value': 'does not mean the same as the line before',
  'rule': 'is right, but by another rule than the one cited',
  'jump': 'means the same, but takes more than one application of a rule',
  'goal': 'is the last and not what was asked for',
}
# What a score of 0.5 forgives: errors of presentation, not of substance.
MINOR: frozenset[FaultKind] = frozenset({'rule', 'jump'})
MAX_STEPS = 64
_STEP = re.compile(r'([0-9]{1,4})\. (.+) \(([a-z]{1,16})\)')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """What is to be derived.

  Attributes:
    kind: 'compute' a number, 'simplify' to a*x+b, 'solve' to x=a, or 'prove'
      that a term can be made into another.
    start: the line that a derivation starts from.
    target: for 'prove', the line that it ends with; else ''.

  Raises:
    ValueError: if a text is no line, or not one of this kind.
  """

  kind: TaskKind
  start: str
  target: str = ''

  def __post_init__(self):
    if self.kind not in get_args(TaskKind):
      raise ValueError(
        f'kind: got {self.kind!r}, expected one of {list(get_args(TaskKind))}'
      )
    if self.target and self.kind != 'prove':
      raise ValueError(
        f'target: got {self.target!r}, expected none to {self.kind}'
      )
    for name in ('start', 'target') if self.kind == 'prove' else ('start',):
      text = getattr(self, name)
      try:
        parse_line(text)
      except TermError as error:
        raise ValueError(f'{name}: {text!r}: {error}') from None
    if isinstance(self.line, Equation) != (self.kind == 'solve'):
      raise ValueError(
        f'start: got {self.start!r}, expected '
        f'{"an equation" if self.kind == "solve" else "a term"} to {self.kind}'
      )

  @property
  def line(self) -> Line:
    return parse_line(self.start)

  @property
  def question(self) -> str:
    """The task in one line.

    >>> Task(kind='solve', start='2*x=6').question
    'Solve 2*x=6.'
    """
    if self.kind == 'prove':
      return f'Show {self.start} = {self.target}.'
    return f'{self.kind.capitalize()} {self.start}.'

  def is_met_by(self, line: Line) -> bool:
    """Whether a line is of the form that was asked for."""
    if self.kind == 'compute':
      return isinstance(line, Number)
    if self.kind == 'simplify':
      return is_simple(line)
    if self.kind == 'solve':
      return (
        isinstance(line, Equation)
        and isinstance(line.left, Variable)
        and isinstance(line.right, Number)
      )
    return line == parse_line(self.target)

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)


def is_simple(line: Line) -> bool:
  """Whether a line is a number, a*x, or a*x+b without needless parts."""
  if isinstance(line, Sum):
    return (
      len(line.parts) == 2
      and _is_multiple(line.parts[0])
      and isinstance(line.parts[1], Number)
      and line.parts[1].value != 0
    )
  return isinstance(line, Number) or _is_multiple(line)


def _is_multiple(line: Line) -> bool:
  if isinstance(line, Product):
    return (
      len(line.parts) == 2
      and isinstance(line.parts[0], Number)
      and line.parts[0].value not in (0, 1)
      and isinstance(line.parts[1], Variable)
    )
  return isinstance(line, Variable)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """One step as it was written.

  Attributes:
    text: its line, or everything that was written if it is not readable.
    rule: the rule it cites; '' if it is not readable.
  """

  text: str
  rule: str


Derivation = tuple[Step, ...]


def format_derivation(steps: Sequence[Step]) -> str:
  """Numbered lines, from 1 on."""
  return '\n'.join(
    f'{number}. {step.text} ({step.rule})' if step.rule else step.text
    for number, step in enumerate(steps, 1)
  )


def parse_derivation(text: str) -> Derivation:
  """Reads numbered lines.

  A line that is none, or has the wrong number, is a step that is not readable:
  a fault of the derivation that does not hide the others. Only MAX_STEPS steps
  are read; the first one beyond is a step that is not readable.
  """
  lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
  steps = []
  for number, line in enumerate(lines[: MAX_STEPS + 1], 1):
    match = _STEP.fullmatch(line)
    if match is None or int(match[1]) != number or number > MAX_STEPS:
      steps.append(Step(text=line, rule=''))
    else:
      steps.append(Step(text=match[2].strip(), rule=match[3]))
  return tuple(steps)


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Fault:
  """What is wrong with a step.

  Attributes:
    step: its number, from 1; 0 for a derivation without steps.
    kind: see `MEANINGS`.
  """

  step: int
  kind: FaultKind


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
  """The truth about a derivation.

  Attributes:
    faults: all of them, in order; a last step may have two.
    notes: one line on each, for people.
  """

  faults: tuple[Fault, ...]
  notes: tuple[str, ...]

  @property
  def score(self) -> float:
    """The truth in DeepSeekMath-V2's three grades."""
    return score_of(self.faults)


def score_of(faults: Sequence[Fault]) -> float:
  """1 for no fault, 0.5 if all are of presentation (`MINOR`), else 0."""
  if not faults:
    return 1.0
  return 0.5 if all(fault.kind in MINOR for fault in faults) else 0.0


def check(task: Task, steps: Sequence[Step]) -> Verdict:
  r"""Judges every step by the readable line before it.

  A step after a wrong one is right if it follows from what stands there: each
  fault is told once, where it was made.

  >>> task = Task(kind='compute', start='2+3*4')
  >>> check(task, parse_derivation('1. 5*4 (add)\n2. 20 (mul)')).faults
  (Fault(step=1, kind='value'),)
  """
  faults: list[Fault] = []
  notes: list[str] = []

  def tell(step: int, kind: FaultKind, note: str) -> None:
    faults.append(Fault(step=step, kind=kind))
    notes.append(f'step {step}: {note}')

  line = task.line
  is_met = task.is_met_by(line)
  for number, step in enumerate(steps, 1):
    is_met = False
    try:
      following = _read(step)
      kind, note = judge(line, following, step.rule)
    except TermError as error:
      tell(number, 'form', str(error))
      continue
    if kind is not None:
      tell(number, kind, note)
    line = following
    is_met = task.is_met_by(line)
  if not is_met:
    tell(len(steps), 'goal', f'{line} is not the end: {task.question}')
  return Verdict(faults=tuple(faults), notes=tuple(notes))


def _read(step: Step) -> Line:
  if not step.rule:
    raise TermError(f'got {step.text[:40]!r}, expected NUMBER. LINE (RULE)')
  return parse_line(step.text)


def judge(
  line: Line, following: Line, cited: str
) -> tuple[FaultKind | None, str]:
  """What is wrong with one step, if anything, and why.

  Raises:
    TermError: if a line is too large to be compared.
  """
  if cited in RULES and RULES[cited].gives(line, following):
    return None, ''
  if not means_the_same(line, following):
    return 'value', f'{line} and {following} do not mean the same'
  fitting = [
    name for name, rule in RULES.items() if rule.gives(line, following)
  ]
  if fitting:
    return 'rule', f'follows by {" or ".join(fitting)}, not by {cited}'
  return 'jump', f'no single rule leads from {line} to {following}'
