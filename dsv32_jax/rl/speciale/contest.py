"""A contest on derivations: sample many, hand in few.

The tests that everybody may run (`passes_sample_tests`) look at where a
derivation ends, as sample tests of a contest look at some outputs; the jury
(`derivations.check`) looks at every step.
"""

import dataclasses
import math
import random
from collections.abc import Sequence

from dsv32_jax.rl.speciale.derivations import (
  Task,
  check,
  parse_derivation,
)
from dsv32_jax.rl.speciale.policy import Policy, Prompt, Reply, seed_of
from dsv32_jax.rl.speciale.prompts import Attempt, Dialogue
from dsv32_jax.rl.speciale.selection import (
  Contest,
  Sample,
  Selection,
  select,
)
from dsv32_jax.rl.speciale.terms import (
  TermError,
  means_the_same,
  parse_line,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
  """One task of a contest.

  Attributes:
    samples: what selection knew of each sample.
    is_right: of each sample, what the jury says.
    selection: what was handed in.
    num_tokens: sampled in all.
  """

  samples: tuple[Sample, ...]
  is_right: tuple[bool, ...]
  selection: Selection
  num_tokens: int

  @property
  def is_solved(self) -> bool:
    """Whether anything that was handed in is right."""
    return any(self.is_right[i] for i in self.selection.submitted)

  def solved_by_chance(self, count: int) -> float:
    """How likely `count` samples drawn blindly have a right one in them."""
    total, right = len(self.is_right), sum(self.is_right)
    count = min(count, total)
    return 1 - math.comb(total - right, count) / math.comb(total, count)

  def solved_by_order(self, count: int, *, order: str, seed: int = 0) -> bool:
    """Whether a right one is handed in by another order after both filters.

    Args:
      count: submissions.
      order: 'longest', 'shortest' or 'random'.
      seed: of the random order.
    """
    # All that pass the filters, longest reasoning first.
    passing = list(select(self.samples, len(self.samples) or 1).submitted)
    if order == 'shortest':
      passing.reverse()
    elif order == 'random':
      random.Random(seed).shuffle(passing)
    elif order != 'longest':
      raise ValueError(
        f"order: got {order!r}, expected 'longest', 'shortest' or 'random'"
      )
    return any(self.is_right[i] for i in passing[:count])


def passes_sample_tests(task: Task, proof: str) -> bool:
  """Whether a derivation ends where it should, with what the task means."""
  steps = parse_derivation(proof)
  try:
    line = parse_line(steps[-1].text) if steps else task.line
    return task.is_met_by(line) and means_the_same(task.line, line)
  except TermError:
    return False


def compete(
  policy: Policy,
  dialogue: Dialogue,
  tasks: Sequence[Task],
  contest: Contest,
  *,
  seed: int = 0,
) -> list[Entry]:
  """Samples each task, filters and selects, and asks the jury.

  A sample declares its own failure if its self-analysis gives it less than 1.
  """
  replies = policy(
    [
      Prompt(
        messages=dialogue.ask_proof(task),
        seed=seed_of(seed, 'contest', place, index),
      )
      for place, task in enumerate(tasks)
      for index in range(contest.samples)
    ]
  )
  entries = []
  for place, task in enumerate(tasks):
    mine = replies[place * contest.samples : (place + 1) * contest.samples]
    attempts = [dialogue.read_attempt(reply) for reply in mine]
    samples = tuple(
      sample_of(task, reply, attempt)
      for reply, attempt in zip(mine, attempts, strict=True)
    )
    entries.append(
      Entry(
        samples=samples,
        is_right=tuple(
          attempt is not None
          and not check(task, parse_derivation(attempt.proof)).faults
          for attempt in attempts
        ),
        selection=select(samples, contest.submissions),
        num_tokens=sum(reply.num_tokens for reply in mine),
      )
    )
  return entries


def sample_of(task: Task, reply: Reply, attempt: Attempt | None) -> Sample:
  """What selection may know of a reply."""
  return Sample(
    passes_sample_tests=(
      attempt is not None and passes_sample_tests(task, attempt.proof)
    ),
    is_within_length=reply.is_finished,
    declares_failure=attempt is None or attempt.score < 1,
    num_reasoning_tokens=reply.num_reasoning_tokens,
  )
