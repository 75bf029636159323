"""What answers about derivations earn, from the truth that a program knows."""

import dataclasses
from typing import Any

from dsv32_jax.chat import Message
from dsv32_jax.rl.problems.types import Problem
from dsv32_jax.rl.speciale import rewards
from dsv32_jax.rl.speciale.analyses import (
  AnalysisError,
  found_share,
  meta_score,
  parse_analysis,
)
from dsv32_jax.rl.speciale.derivations import (
  Task,
  check,
  parse_derivation,
)
from dsv32_jax.rl.speciale.prompts import parse_meta, split_attempt

PROOF, REVIEW, META = 'speciale/proof', 'speciale/review', 'speciale/meta'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
  """What one answer earns.

  Attributes:
    total: its reward, 0 to 1.
    components: of which it is made, each 0 to 1, for metrics.
  """

  total: float
  components: dict[str, float]


def score(problem: Problem, message: Message) -> Scores:
  """Scores the answer to a problem of `sources`.

  Raises:
    ValueError: for a problem of another scorer.
  """
  scorers = {PROOF: score_proof, REVIEW: score_review, META: score_meta}
  if problem.scorer not in scorers:
    raise ValueError(
      f'scorer: got {problem.scorer!r}, expected one of {sorted(scorers)}'
    )
  return scorers[problem.scorer](problem.reference, message.content)


def score_proof(reference: dict[str, Any], text: str) -> Scores:
  """The generator's reward of a derivation with its self-analysis.

  The verifier of the derivation, and the meta-verifier of the self-analysis,
  are the program.
  """
  proof, rest = split_attempt(text)
  truth = check(Task(**reference['task']), parse_derivation(proof))
  components = {'proof': truth.score, 'well_formed': 0.0}
  try:
    analysis = parse_analysis(rest)
  except AnalysisError:
    return Scores(total=0.0, components=components)
  if not proof:
    return Scores(total=0.0, components=components)
  meta = meta_score(analysis, truth)
  total = rewards.generator_reward(
    is_formed=True, proof=truth.score, predicted=analysis.score, meta=meta
  )
  return Scores(
    total=total,
    components=components
    | {
      'well_formed': 1.0,
      'self_agreement': rewards.agreement(analysis.score, truth.score),
      'self_meta': meta,
      'honest': float(analysis.score == truth.score),
    },
  )


def score_review(reference: dict[str, Any], text: str) -> Scores:
  """The verifier's reward of an analysis, with the program as meta-verifier."""
  truth = check(Task(**reference['task']), parse_derivation(reference['proof']))
  try:
    analysis = parse_analysis(text)
  except AnalysisError:
    return Scores(total=0.0, components={'well_formed': 0.0})
  meta = meta_score(analysis, truth)
  return Scores(
    total=rewards.verifier_reward(
      is_formed=True, predicted=analysis.score, true=truth.score, meta=meta
    ),
    components={
      'well_formed': 1.0,
      'agreement': rewards.agreement(analysis.score, truth.score),
      'meta': meta,
      'found': found_share(analysis.issues, truth),
    },
  )


def score_meta(reference: dict[str, Any], text: str) -> Scores:
  """The meta-verifier's reward: R_format * (1 - |ms' - ms|)."""
  truth = check(Task(**reference['task']), parse_derivation(reference['proof']))
  true = meta_score(parse_analysis(reference['analysis']), truth)
  predicted = parse_meta(text)
  if predicted is None:
    return Scores(total=0.0, components={'well_formed': 0.0})
  total = rewards.agreement(predicted, true)
  return Scores(
    total=total, components={'well_formed': 1.0, 'agreement': total}
  )
