"""Labels of proofs without experts: many analyses, each checked many times.

Source: DeepSeekMath-V2, arXiv:2511.22570, section 2.3.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from dsv32_jax.rl.speciale.policy import Policy, Prompt, seed_of
from dsv32_jax.rl.speciale.prompts import Dialogue
from dsv32_jax.rl.speciale.sizes import check_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opinion:
  """One analysis of a proof, and what meta-checks said about it.

  Attributes:
    score: its grade of the proof.
    checks: of every meta-check, whether it found the analysis valid; empty for
      an analysis with score 1, which claims no issue that could be checked.
  """

  score: float
  checks: tuple[bool, ...] = ()

  @property
  def is_valid(self) -> bool:
    """Whether more than half of the checks say so."""
    return sum(self.checks) * 2 > len(self.checks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Label:
  """What became of a proof.

  Attributes:
    score: its label; None if it is to be discarded.
    why: one line.
  """

  score: float | None
  why: str


def auto_label(opinions: Sequence[Opinion], *, lowest: int) -> Label:
  """The label that n analyses give a proof.

  If at least `lowest` of the analyses with the lowest score of all are valid,
  that score is the label. If no analysis at all has a valid issue, the label is
  1. Otherwise the proof is discarded.

  Args:
    opinions: n analyses.
    lowest: k.

  Raises:
    ValueError: if there is no opinion, `lowest` is not positive, or an analysis
      with score below 1 was not checked.

  >>> auto_label([Opinion(score=1.0), Opinion(score=1.0)], lowest=1).score
  1.0
  """
  if not opinions:
    raise ValueError('opinions: got none, expected at least one')
  if lowest < 1:
    raise ValueError(f'lowest: got {lowest}, expected at least 1')
  for index, opinion in enumerate(opinions):
    if opinion.score < 1 and not opinion.checks:
      raise ValueError(
        f'opinions[{index}].checks: got none for a score of {opinion.score}, '
        'expected at least one'
      )
  if not any(opinion.score < 1 and opinion.is_valid for opinion in opinions):
    return Label(score=1.0, why='no analysis has a valid issue')
  least = min(opinion.score for opinion in opinions)
  count = sum(o.score == least and o.is_valid for o in opinions)
  why = f'{count} valid analyses give the lowest score, {least}'
  if count >= lowest:
    return Label(score=least, why=why)
  return Label(score=None, why=f'{why}, expected at least {lowest}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelConfig:
  """How many opinions a label takes.

  Attributes:
    analyses: n, of each proof.
    checks: m, of each analysis with score below 1.
    lowest: k, valid analyses with the lowest score that make it the label.
  """

  analyses: int = 16
  checks: int = 4
  lowest: int = 2

  def __post_init__(self):
    check_positive(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labelled:
  """A proof's label with what it was made of.

  Attributes:
    label: the label; discarded too if no analysis could be read.
    opinions: of the analyses that could be read.
    num_tokens: sampled in all.
  """

  label: Label
  opinions: tuple[Opinion, ...]
  num_tokens: int


def label_proofs(
  verifier: Policy,
  dialogue: Dialogue,
  proofs: Sequence[tuple[Any, str]],
  config: LabelConfig = LabelConfig(),
  *,
  seed: int = 0,
  meta_verifier: Policy | None = None,
) -> list[Labelled]:
  """Labels proofs by a model's own analyses.

  Args:
    verifier: writes analyses.
    dialogue: how to ask.
    proofs: (task, proof) of each.
    config: n, m and k.
    seed: of all draws.
    meta_verifier: checks analyses; None lets the verifier do it. A check is for
      an analysis if it gives it a quality of 1; one that cannot be read is not.
  """
  prompts = [
    Prompt(
      messages=dialogue.ask_review(task, proof),
      seed=seed_of(seed, 'analysis', place, index),
    )
    for place, (task, proof) in enumerate(proofs)
    for index in range(config.analyses)
  ]
  replies = verifier(prompts)
  reviews = [dialogue.read_review(reply) for reply in replies]
  checked = [i for i, r in enumerate(reviews) if r is not None and r.score < 1]
  checks = (meta_verifier or verifier)(
    [
      Prompt(
        messages=dialogue.ask_meta(
          *proofs[i // config.analyses], getattr(reviews[i], 'text', '')
        ),
        seed=seed_of(seed, 'check', i, index),
      )
      for i in checked
      for index in range(config.checks)
    ]
  )
  verdicts = {
    i: tuple(
      dialogue.read_meta(reply) == 1
      for reply in checks[place * config.checks : (place + 1) * config.checks]
    )
    for place, i in enumerate(checked)
  }
  tokens = [reply.num_tokens for reply in replies]
  for place, reply in enumerate(checks):
    tokens[checked[place // config.checks]] += reply.num_tokens
  labelled = []
  for place in range(len(proofs)):
    mine = range(place * config.analyses, (place + 1) * config.analyses)
    opinions = tuple(
      Opinion(score=review.score, checks=verdicts.get(i, ()))
      for i in mine
      if (review := reviews[i]) is not None
    )
    label = (
      auto_label(opinions, lowest=config.lowest)
      if opinions
      else Label(score=None, why='no analysis could be read')
    )
    labelled.append(
      Labelled(
        label=label, opinions=opinions, num_tokens=sum(tokens[i] for i in mine)
      )
    )
  return labelled
