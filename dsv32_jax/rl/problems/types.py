"""What a problem is, and where problems come from.

Plain host values: they compare by value, can be written as JSON, and know no
model and no tokenizer.
"""

import dataclasses
import random
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from dsv32_jax.chat import Message, Mode

# The six domains that have specialists (arXiv:2512.02556, section 3), and the
# two general ones beside them.
Domain = Literal[
  'mathematics',
  'programming',
  'logical_reasoning',
  'general_agent',
  'agentic_coding',
  'agentic_search',
  'writing',
  'question_answering',
]
DOMAINS: tuple[str, ...] = get_args(Domain)
MODES: tuple[str, ...] = get_args(Mode)

Split = Literal['train', 'held_out']

CriterionKind = Literal[
  'contains', 'excludes', 'count', 'length', 'format', 'json_schema', 'judge'
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Criterion:
  """One line of a rubric.

  Attributes:
    text: what is asked for, in words; what a model that judges reads.
    weight: relative to the other criteria.
    kind: how a program checks it (`rewards.rubric` says what each takes);
      'judge' is for a model alone.
    arguments: of the check; JSON values.
  """

  text: str
  weight: float = 1.0
  kind: CriterionKind = 'judge'
  arguments: dict[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if self.kind not in get_args(CriterionKind):
      raise ValueError(
        f'kind: got {self.kind!r}, expected one of '
        f'{list(get_args(CriterionKind))}'
      )
    if not self.weight > 0:
      raise ValueError(f'weight: got {self.weight}, expected a positive number')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """A prompt, and what is needed to score an answer to it.

  Attributes:
    id: unique among all sources, options and splits.
    domain: one of `DOMAINS`.
    mode: 'thinking', or 'chat' for a direct answer.
    messages: the conversation to continue.
    reference: for the scorer; JSON values. Nothing of it is shown.
    scorer: name in `rewards.scorers`.
    rubric: for the scorer 'rubric'.
    language: in which the answer is to be.
  """

  id: str
  domain: str
  mode: Mode
  messages: tuple[Message, ...]
  reference: Any = None
  scorer: str = 'exact'
  rubric: tuple[Criterion, ...] = ()
  language: str = 'en'

  def __post_init__(self):
    if self.domain not in DOMAINS:
      raise ValueError(
        f'domain: got {self.domain!r}, expected one of {list(DOMAINS)}'
      )
    check_mode(self.mode)
    if not self.messages:
      raise ValueError('messages: got none, expected at least one')

  @property
  def prompt(self) -> str:
    """The text of the last user message."""
    return next(
      message.content
      for message in reversed(self.messages)
      if message.role in ('user', 'developer')
    )


@runtime_checkable
class ProblemSource(Protocol):
  """An endless supply of problems of one kind.

  Attributes:
    name: with which the registry makes it.
    domain: of its problems.
    mode: of its problems, where none is asked for.
  """

  @property
  def name(self) -> str: ...

  @property
  def domain(self) -> str: ...

  @property
  def mode(self) -> Mode: ...

  def problem(
    self, split: Split, index: int, mode: Mode | None = None
  ) -> Problem:
    """Returns problem `index` of a split, the same on every machine.

    No prompt of 'held_out' occurs in 'train', whatever the seed and the options
    of the source. Two indices may give the same prompt.

    Args:
      split: 'train' or 'held_out'.
      index: 0 or more.
      mode: None takes the source's; the prompt is the same in both.
    """
    ...

  def demonstration(
    self, problem: Problem, rng: random.Random, mode: Mode | None = None
  ) -> Message:
    """Returns a right answer: worked out in thinking mode, direct in chat mode.

    Args:
      problem: one of this source.
      rng: where there are several ways to write it.
      mode: None takes the problem's.

    Raises:
      ValueError: if the source cannot write one.
    """
    ...


def check_mode(mode: str) -> Mode:
  """The mode, if it is one.

  Raises:
    ValueError: otherwise, naming those that there are.
  """
  if mode not in MODES:
    raise ValueError(f'mode: got {mode!r}, expected one of {list(MODES)}')
  return mode  # pyrefly: ignore
