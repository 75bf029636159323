"""Proofs that are refined until their checks pass.

Two ways, both of DeepSeekMath-V2 (arXiv:2511.22570, section 3): a model refines
its own proof by its own analysis (`refine`), or a pool of proofs is verified
many times over and refined by what was found (`search`).
"""

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

from dsv32_jax.rl.speciale.policy import Policy, Prompt, Reply, seed_of
from dsv32_jax.rl.speciale.prompts import Attempt, Dialogue, Review
from dsv32_jax.rl.speciale.sizes import check_positive

Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefineConfig:
  """Sequential refinement.

  Attributes:
    rounds: attempts at most, the first one included.
  """

  rounds: int = 8

  def __post_init__(self):
    check_positive(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refinement:
  """What sequential refinement of one task came to.

  Attributes:
    attempts: one a round; None where a reply could not be read.
    num_tokens: sampled in each round.
    stopped: 'passed' at a self-score of 1, or 'rounds' at the cap.
  """

  attempts: tuple[Attempt | None, ...]
  num_tokens: tuple[int, ...]
  stopped: Literal['passed', 'rounds']

  @property
  def best(self) -> Attempt | None:
    """The last of those with the highest self-score; None if none was read."""
    read = [attempt for attempt in self.attempts if attempt is not None]
    return max(reversed(read), key=lambda a: a.score) if read else None


def refine(
  policy: Policy,
  dialogue: Dialogue,
  tasks: Sequence[Any],
  config: RefineConfig = RefineConfig(),
  *,
  seed: int = 0,
) -> list[Refinement]:
  """Lets a model attempt each task, and mend its attempts by its own analyses.

  A round asks for all tasks that are not done, so a policy can batch them.
  After a reply that could not be read, the last one that could is refined
  again, or the task is attempted anew.
  """
  attempts: list[list[Attempt | None]] = [[] for _ in tasks]
  tokens: list[list[int]] = [[] for _ in tasks]
  open_tasks = list(range(len(tasks)))
  for round_index in range(config.rounds):
    prompts = []
    for place in open_tasks:
      last = next((a for a in reversed(attempts[place]) if a), None)
      prompts.append(
        Prompt(
          messages=_ask(dialogue, tasks[place], last),
          seed=seed_of(seed, 'refine', place, round_index),
        )
      )
    for place, reply in zip(open_tasks, policy(prompts), strict=True):
      attempts[place].append(dialogue.read_attempt(reply))
      tokens[place].append(reply.num_tokens)
    open_tasks = [p for p in open_tasks if not _is_sure(attempts[p][-1])]
    if not open_tasks:
      break
  return [
    Refinement(
      attempts=tuple(mine),
      num_tokens=tuple(counts),
      stopped='passed' if _is_sure(mine[-1]) else 'rounds',
    )
    for mine, counts in zip(attempts, tokens, strict=True)
  ]


def _ask(dialogue: Dialogue, task: Any, last: Attempt | None):
  if last is None:
    return dialogue.ask_proof(task)
  return dialogue.ask_refinement(task, last.proof, last.analysis)


def _is_sure(attempt: Attempt | None) -> bool:
  return attempt is not None and attempt.score == 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig:
  """Search over a pool of proofs; the defaults are the paper's.

  Attributes:
    proofs: attempts that the pool starts with.
    analyses: reviews of every proof.
    kept: proofs that a round refines, the best by mean score.
    pairs: reviews that each of them is refined by, one at a time.
    rounds: of refinement, at most.
  """

  proofs: int = 64
  analyses: int = 64
  kept: int = 64
  pairs: int = 8
  rounds: int = 16

  def __post_init__(self):
    check_positive(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
  """A proof of the pool.

  Attributes:
    attempt: the proof.
    reviews: None where a reply could not be read.
    round: in which it came; 0 for those that the pool starts with.
  """

  attempt: Attempt
  reviews: tuple[Review | None, ...]
  round: int

  @property
  def mean_score(self) -> float:
    """Of the reviews that could be read; 0 if none could."""
    scores = [review.score for review in self.reviews if review is not None]
    return sum(scores) / len(scores) if scores else 0.0

  @property
  def passes(self) -> bool:
    """Whether every check was read and gave 1."""
    return all(r is not None and r.score == 1 for r in self.reviews)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
  """What a search came to.

  Attributes:
    pool: all candidates, in the order in which they came.
    rounds: of refinement that were run.
    num_tokens: sampled in all.
    unreadable: replies of the generator without a proof to read.
    stopped: 'passed', when a proof passed all its checks, 'rounds' at the cap,
      or 'empty' if no proof could be read.
  """

  pool: tuple[Candidate, ...]
  rounds: int
  num_tokens: int
  unreadable: int
  stopped: Literal['passed', 'rounds', 'empty']

  @property
  def best(self) -> Candidate | None:
    """The first of those with the highest mean score."""
    return max(self.pool, key=lambda c: c.mean_score, default=None)


def search(
  policy: Policy,
  dialogue: Dialogue,
  task: Any,
  config: SearchConfig = SearchConfig(),
  *,
  seed: int = 0,
  verifier: Policy | None = None,
  report: Report = lambda line: None,
) -> Search:
  """Refines a pool of proofs of one task until one passes all its checks.

  A proof that is in the pool already is not put in again (ours: a small model
  repeats itself, and its checks would only be paid for twice).

  Args:
    policy: writes proofs.
    dialogue: how to ask.
    task: what is to be proved.
    config: sizes.
    seed: of all draws and choices.
    verifier: reviews them; None lets the policy do both, as the paper does.
    report: gets a line a round.
  """
  state = _Pool(policy, verifier or policy, dialogue, task, config, seed)
  state.grow([dialogue.ask_proof(task)] * config.proofs, round_index=0)
  rounds = 0
  while state.pool and not state.passed and rounds < config.rounds:
    rounds += 1
    prompts = [
      dialogue.ask_refinement(task, candidate.attempt.proof, review.text)
      for candidate in best_candidates(state.pool, config.kept)
      for review in issues_first(
        candidate.reviews,
        config.pairs,
        random.Random(seed_of(seed, 'pairs', rounds, candidate.attempt.proof)),
      )
    ]
    state.grow(prompts, round_index=rounds)
    report(
      f'round {rounds}: {len(state.pool)} proofs, best mean score '
      f'{max(c.mean_score for c in state.pool):.3f}'
    )
  ended = 'passed' if state.passed else 'rounds' if state.pool else 'empty'
  return Search(
    pool=tuple(state.pool),
    rounds=rounds,
    num_tokens=state.num_tokens,
    unreadable=state.unreadable,
    stopped=ended,
  )


def best_candidates(pool: Sequence[Candidate], count: int) -> list[Candidate]:
  """The best by mean score; of equals the newer, then the earlier."""
  order = sorted(
    range(len(pool)),
    key=lambda i: (-pool[i].mean_score, -pool[i].round, i),
  )
  return [pool[i] for i in order[:count]]


def issues_first(
  reviews: Sequence[Review | None], count: int, rng: random.Random
) -> list[Review]:
  """Reviews to refine by, in random order: first those that found an issue."""
  read = [review for review in reviews if review is not None]
  shuffled = rng.sample(read, len(read))
  return sorted(shuffled, key=lambda review: review.score == 1)[:count]


class _Pool:
  """The candidates of a search, and what they cost."""

  def __init__(
    self,
    policy: Policy,
    verifier: Policy,
    dialogue: Dialogue,
    task: Any,
    config: SearchConfig,
    seed: int,
  ):
    self.pool: list[Candidate] = []
    self.num_tokens = 0
    self.unreadable = 0
    self._policy, self._verifier = policy, verifier
    self._dialogue, self._task = dialogue, task
    self._config, self._seed = config, seed

  @property
  def passed(self) -> bool:
    return any(candidate.passes for candidate in self.pool)

  def grow(self, questions: Sequence[Any], *, round_index: int) -> None:
    """Lets the generator answer, and reviews what is new."""
    replies = self._run(self._policy, questions, ('proof', round_index))
    attempts = [self._dialogue.read_attempt(reply) for reply in replies]
    self.unreadable += attempts.count(None)
    known = {candidate.attempt.proof for candidate in self.pool}
    new: dict[str, Attempt] = {}
    for attempt in attempts:
      if attempt is not None and attempt.proof not in known:
        new.setdefault(attempt.proof, attempt)
    count = self._config.analyses
    reviews = [
      self._dialogue.read_review(reply)
      for reply in self._run(
        self._verifier,
        [
          self._dialogue.ask_review(self._task, proof)
          for proof in new
          for _ in range(count)
        ],
        ('review', round_index),
      )
    ]
    for place, attempt in enumerate(new.values()):
      mine = tuple(reviews[place * count : (place + 1) * count])
      self.pool.append(
        Candidate(attempt=attempt, reviews=mine, round=round_index)
      )

  def _run(
    self, policy: Policy, questions: Sequence[Any], what: tuple
  ) -> list[Reply]:
    replies = policy(
      [
        Prompt(messages=messages, seed=seed_of(self._seed, *what, index))
        for index, messages in enumerate(questions)
      ]
    )
    self.num_tokens += sum(reply.num_tokens for reply in replies)
    return replies
