"""What a verifier writes about a derivation, and how right it is.

An analysis names faulty steps, each with a reason, and ends with a score:

    step 2: value
    score: 0
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import get_args

from dsv32_jax.rl.speciale.derivations import (
  Fault,
  FaultKind,
  Verdict,
  score_of,
)

SCORES: dict[str, float] = {'0': 0.0, '0.5': 0.5, '1': 1.0}
MAX_ISSUES = 64
_ISSUE = re.compile(r'step ([0-9]{1,4}): ([a-z]+)')
_SCORE = re.compile(r'score: (\S+)')


class AnalysisError(ValueError):
  """A text is no analysis; R_format of it is 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analysis:
  """A verifier's opinion.

  Attributes:
    issues: the faults it sees.
    score: its grade of the derivation.
  """

  issues: tuple[Fault, ...]
  score: float


def format_score(score: float) -> str:
  """As `SCORES` spells it."""
  return next(text for text, value in SCORES.items() if value == score)


def format_analysis(analysis: Analysis) -> str:
  lines = [f'step {issue.step}: {issue.kind}' for issue in analysis.issues]
  return '\n'.join([*lines, f'score: {format_score(analysis.score)}'])


def parse_analysis(text: str) -> Analysis:
  """Reads an analysis, strictly: nothing else may stand in it.

  Raises:
    AnalysisError: at the first mistake.

  >>> parse_analysis('score: 1')
  Analysis(issues=(), score=1.0)
  """
  lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
  if not lines:
    raise AnalysisError('got an empty analysis')
  last = _SCORE.fullmatch(lines[-1])
  if last is None or last[1] not in SCORES:
    raise AnalysisError(
      f'got {lines[-1][:40]!r} as the last line, expected score: SCORE, one of '
      f'{list(SCORES)}'
    )
  if len(lines) > MAX_ISSUES + 1:
    raise AnalysisError(
      f'got {len(lines) - 1} issues, expected at most {MAX_ISSUES}'
    )
  issues = []
  for line in lines[:-1]:
    match = _ISSUE.fullmatch(line)
    if match is None or match[2] not in get_args(FaultKind):
      raise AnalysisError(
        f'got {line[:40]!r}, expected step NUMBER: KIND, one of '
        f'{list(get_args(FaultKind))}'
      )
    kind: FaultKind = match[2]  # pyrefly: ignore
    issues.append(Fault(step=int(match[1]), kind=kind))
  if len(set(issues)) < len(issues):
    raise AnalysisError('got the same issue twice')
  return Analysis(issues=tuple(issues), score=SCORES[last[1]])


def true_analysis(verdict: Verdict) -> Analysis:
  """The analysis that names every fault, in order."""
  return Analysis(issues=verdict.faults, score=verdict.score)


def meta_score(analysis: Analysis, truth: Verdict) -> float:
  """Quality of an analysis: are its issues there, do they justify its score?

  DeepSeekMath-V2's meta-verifier asks the two; it does not ask whether issues
  are missing, which costs the verifier through the difference of the scores.

  Returns:
    0 if an issue names a step without fault, or if the issues do not justify
    the score (`score_of` of what is cited is another); 0.5 if every issue names
    a faulty step, but one for the wrong reason; else 1.
  """
  if score_of(analysis.issues) != analysis.score:
    return 0.0
  return min(
    (issue_score(issue, truth) for issue in analysis.issues), default=1.0
  )


def issue_score(issue: Fault, truth: Verdict) -> float:
  """1 if the fault is there, 0.5 if its step has another, else 0."""
  if issue in truth.faults:
    return 1.0
  return 0.5 if issue.step in {fault.step for fault in truth.faults} else 0.0


def found_share(issues: Sequence[Fault], truth: Verdict) -> float:
  """Share of the true faults that are cited; 1 if there is none."""
  if not truth.faults:
    return 1.0
  return len(set(issues) & set(truth.faults)) / len(truth.faults)
