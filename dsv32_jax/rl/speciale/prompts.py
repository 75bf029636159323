"""Derivations as conversations: what is asked, and how replies are read.

The protocols of `refinement`, `labels` and `selection` know a `Dialogue` only,
so proofs of another kind need another dialogue and nothing else.
"""

import dataclasses
import re
from typing import Any, Protocol, runtime_checkable

from dsv32_jax.chat import Message
from dsv32_jax.rl.speciale.analyses import (
  SCORES,
  Analysis,
  AnalysisError,
  format_analysis,
  format_score,
  parse_analysis,
)
from dsv32_jax.rl.speciale.derivations import (
  MEANINGS,
  Derivation,
  Task,
  format_derivation,
  parse_derivation,
)
from dsv32_jax.rl.speciale.policy import Reply
from dsv32_jax.rl.speciale.rules import RULES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
  """A proof with what its author says about it.

  Attributes:
    proof: Y, as it was written.
    analysis: Z, as it was written.
    score: that Z gives Y.
  """

  proof: str
  analysis: str
  score: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Review:
  """An analysis by a verifier.

  Attributes:
    text: as it was written.
    score: that it gives.
  """

  text: str
  score: float


@runtime_checkable
class Dialogue(Protocol):
  """How one kind of proofs is talked about."""

  def ask_proof(self, task: Any) -> tuple[Message, ...]: ...

  def ask_refinement(
    self, task: Any, proof: str, analysis: str
  ) -> tuple[Message, ...]: ...

  def ask_review(self, task: Any, proof: str) -> tuple[Message, ...]: ...

  def ask_meta(
    self, task: Any, proof: str, analysis: str
  ) -> tuple[Message, ...]: ...

  def read_attempt(self, reply: Reply) -> Attempt | None:
    """Returns None for R_format = 0."""
    ...

  def read_review(self, reply: Reply) -> Review | None: ...

  def read_meta(self, reply: Reply) -> float | None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class DerivationDialogue:
  """Dialogue about derivations.

  Attributes:
    explains: put the rules, the form of an answer and the grades before what
      is asked, for a model that was not trained on it. One that was trained
      without is to be asked without.
  """

  explains: bool = False

  def ask_proof(self, task: Task) -> tuple[Message, ...]:
    return self._ask(_PROOF, task.question)

  def ask_refinement(
    self, task: Task, proof: str, analysis: str
  ) -> tuple[Message, ...]:
    return self._ask(_PROOF, f'Mend: {task.question}\n{proof}\n{analysis}')

  def ask_review(self, task: Task, proof: str) -> tuple[Message, ...]:
    return self._ask(_REVIEW, f'Check: {task.question}\n{proof}')

  def ask_meta(
    self, task: Task, proof: str, analysis: str
  ) -> tuple[Message, ...]:
    return self._ask(_META, f'Judge: {task.question}\n{proof}\n{analysis}')

  def read_attempt(self, reply: Reply) -> Attempt | None:
    if not reply.is_finished:
      return None
    proof, analysis = split_attempt(reply.content)
    try:
      score = parse_analysis(analysis).score
    except AnalysisError:
      return None
    return (
      Attempt(proof=proof, analysis=analysis, score=score) if proof else None
    )

  def read_review(self, reply: Reply) -> Review | None:
    if not reply.is_finished:
      return None
    try:
      score = parse_analysis(reply.content).score
    except AnalysisError:
      return None
    return Review(text=reply.content.strip(), score=score)

  def read_meta(self, reply: Reply) -> float | None:
    return parse_meta(reply.content) if reply.is_finished else None

  def _ask(self, explanation: str, text: str) -> tuple[Message, ...]:
    if self.explains:
      text = f'{explanation}\n\n{text}'
    return (Message(role='user', content=text),)


def format_attempt(steps: Derivation, analysis: Analysis) -> str:
  """What a generator answers: derivation, then self-analysis."""
  return f'{format_derivation(steps)}\n{format_analysis(analysis)}'


def split_attempt(text: str) -> tuple[str, str]:
  r"""The derivation, and the self-analysis from its first line on.

  >>> split_attempt('1. 5 (add)\nscore: 1')
  ('1. 5 (add)', 'score: 1')
  """
  lines = text.strip().splitlines()
  cut = next(
    (i for i, line in enumerate(lines) if _ANALYSIS.match(line)), len(lines)
  )
  return '\n'.join(lines[:cut]).strip(), '\n'.join(lines[cut:]).strip()


_ANALYSIS = re.compile(r'\s*(step|score)\b')


def steps_of(attempt: Attempt) -> Derivation:
  return parse_derivation(attempt.proof)


def format_meta(quality: float) -> str:
  return f'quality: {format_score(quality)}'


def parse_meta(text: str) -> float | None:
  """Reads a meta-verifier's answer; None if it is none.

  >>> parse_meta('quality: 0.5')
  0.5
  """
  head, _, score = text.strip().partition(': ')
  return SCORES.get(score) if head == 'quality' else None


_RULES = '\n'.join(f'{rule.name}: {rule.meaning}' for rule in RULES.values())
_KINDS = '\n'.join(
  f'{kind}: the step {text}' for kind, text in MEANINGS.items()
)
_ANALYSIS_FORM = f"""\
An analysis has a line "step NUMBER: KIND" for every faulty step, then a last
line "score: SCORE". KIND is one of
{_KINDS}
SCORE is 1 if no step is faulty, 0.5 if all faults are of kind rule or jump, and
else 0. Each step is judged by the line before it, right or wrong."""
_PROOF = f"""\
Write a derivation: numbered lines, each made from the one before by one
application of one rule, as in
1. 2*x=7-3 (move)
2. 2*x=4 (add)
The first is made from what is given. The rules, for any part of a line:
{_RULES}
Brackets that say nothing are left out. To compute ends with a number, to
simplify with the form a*x+b, to solve with x=a, to show with what is to be
shown. After the derivation write an analysis of it, as strict as you would be
with somebody else's. {_ANALYSIS_FORM}
Write nothing else. If a derivation and its analysis are given, write a better
one."""
_REVIEW = f"""\
Check a derivation, in which each numbered line is to be made from the one
before by one application of the rule in brackets. The rules, for any part of a
line:
{_RULES}
Write an analysis and nothing else. {_ANALYSIS_FORM}"""
_META = f"""\
Judge the analysis of a derivation. {_ANALYSIS_FORM}
Write one line and nothing else: "quality: 0" if the analysis names a step that
has no fault or if what it names does not justify its score, "quality: 0.5" if
every step that it names is faulty but one for another reason, and else
"quality: 1". Faults that it does not name do not count."""
