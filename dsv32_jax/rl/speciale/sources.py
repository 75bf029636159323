"""Derivations as problems: to write, to mend, to check, to judge."""

import dataclasses
import random
from collections.abc import Sequence
from typing import Any, get_args

from dsv32_jax.chat import Message, Mode
from dsv32_jax.rl.problems import splits
from dsv32_jax.rl.problems.types import Problem, Split, check_mode
from dsv32_jax.rl.speciale import prompts, scorers
from dsv32_jax.rl.speciale.analyses import (
  Analysis,
  format_analysis,
  meta_score,
  parse_analysis,
  true_analysis,
)
from dsv32_jax.rl.speciale.derivations import (
  Derivation,
  Fault,
  FaultKind,
  Task,
  TaskKind,
  check,
  format_derivation,
  parse_derivation,
  score_of,
)
from dsv32_jax.rl.speciale.faults import Judged, put_some_fault
from dsv32_jax.rl.speciale.tasks import TaskSize, make_task, solve

ROLES: dict[str, str] = {
  'speciale/proof': scorers.PROOF,
  'speciale/refinement': scorers.PROOF,
  'speciale/review': scorers.REVIEW,
  'speciale/meta': scorers.META,
}
NAMES = tuple(ROLES)
_KINDS: tuple[TaskKind, ...] = get_args(TaskKind)
_FAULTS: tuple[FaultKind, ...] = get_args(FaultKind)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Item:
  """What a problem is about, with the answer that a demonstration gives.

  Attributes:
    task: what is derived.
    right: a right derivation of it.
    proof: the derivation that is shown, but to who is to write one.
    analysis: the analysis that is shown to who mends or judges.
  """

  task: Task
  right: Derivation
  proof: Judged
  analysis: Analysis


class SpecialeSource:
  """One of the four roles, over tasks of chosen kinds and size.

  Attributes:
    name: one of `NAMES`.
    domain: 'mathematics'.
    mode: of the problems.
    dialogue: how its problems are asked.
    key: says in a line which problems these are.

  >>> source = make('speciale/proof', {'kinds': ['compute'], 'numbers': 2})
  >>> problem = source.problem('train', 0)
  >>> problem.prompt
  'Compute 9*3.'
  """

  def __init__(
    self,
    name: str,
    *,
    seed: int = 0,
    mode: Mode = 'chat',
    kinds: Sequence[str] = _KINDS,
    faults: Sequence[str] = _FAULTS,
    right_share: float = 0.4,
    explains: bool = False,
    **size: int,
  ):
    """Prepares the source.

    Args:
      name: one of `NAMES`.
      seed: of the problems.
      mode: of the problems.
      kinds: of tasks, in equal shares.
      faults: of the derivations that are shown.
      right_share: of these, how many have none.
      explains: see `DerivationDialogue`.
      **size: fields of `TaskSize`.

    Raises:
      ValueError: unknown names and values.
      TypeError: unknown fields of `TaskSize`.
    """
    if name not in ROLES:
      raise ValueError(f'name: got {name!r}, expected one of {list(NAMES)}')
    check_mode(mode)
    if not 0 <= right_share < 1:
      raise ValueError(
        f'right_share: got {right_share}, expected at least 0 and below 1'
      )
    self.name = name
    self.domain = 'mathematics'
    self.mode: Mode = mode
    self._kinds = _known('kinds', kinds, _KINDS)
    self._faults = _known('faults', faults, _FAULTS)
    self._right_share = right_share
    self._size = TaskSize(**size)
    self.dialogue = prompts.DerivationDialogue(explains=explains)
    shown = () if name == 'speciale/proof' else (self._faults, right_share)
    self.key = '/'.join(
      map(str, (name, self._kinds, self._size, *shown, explains, seed))
    )

  def problem(
    self, split: Split, index: int, mode: Mode | None = None
  ) -> Problem:
    """See `ProblemSource.problem`.

    The task too is of the split, not the whole prompt alone: nobody is tested
    on a task that was another role's to train on.
    """
    item, messages = splits.draw(
      lambda rng: self._draw(rng, held_out=split == 'held_out'),
      lambda drawn: drawn[1][-1].content,
      key=self.key,
      split=split,
      index=index,
    )
    reference: dict[str, Any] = {'task': item.task.to_json()}
    if self.name != 'speciale/proof':
      reference['proof'] = format_derivation(item.proof.steps)
    if self.name in ('speciale/refinement', 'speciale/meta'):
      reference['analysis'] = format_analysis(item.analysis)
    reference['right'] = format_derivation(item.right)
    return Problem(
      id=f'{self.key}/{split}/{index}/{mode or self.mode}',
      domain=self.domain,
      mode=mode or self.mode,
      messages=messages,
      reference=reference,
      scorer=ROLES[self.name],
    )

  def demonstration(
    self, problem: Problem, rng: random.Random, mode: Mode | None = None
  ) -> Message:
    """See `ProblemSource.demonstration`.

    In thinking mode the thoughts are the lines that a step leads to, or, of who
    checks, whether each step is right; a generator may go over them twice.
    """
    reference = problem.reference
    task = Task(**reference['task'])
    if self.name in ('speciale/proof', 'speciale/refinement'):
      right = parse_derivation(reference['right'])
      if task.kind != 'prove' and rng.random() < 0.5:
        right = solve(task, rng=rng, limit=len(right)) or right
      content = prompts.format_attempt(right, Analysis(issues=(), score=1.0))
      thought = ' '.join(step.text for step in right)
      if rng.random() < 0.5:
        thought += f' again {thought}'
    else:
      steps = parse_derivation(reference['proof'])
      truth = check(task, steps)
      if self.name == 'speciale/review':
        content = format_analysis(true_analysis(truth))
      else:
        shown = parse_analysis(reference['analysis'])
        content = prompts.format_meta(meta_score(shown, truth))
      wrong = {fault.step: fault.kind for fault in truth.faults}
      thought = ' '.join(
        f'{number} {wrong.get(number, "ok")}'
        for number in range(1, len(steps) + 1)
      )
    is_thinking = (mode or problem.mode) == 'thinking'
    return Message(
      role='assistant',
      content=content,
      reasoning=thought if is_thinking else '',
    )

  def _draw(
    self, rng: random.Random, *, held_out: bool
  ) -> tuple[_Item, tuple[Message, ...]]:
    task, right = make_task(
      rng.choice(self._kinds),
      self._size,
      rng,
      is_wanted=lambda task: splits.is_held_out(task.question) == held_out,
    )
    proof = Judged(steps=right, verdict=check(task, right))
    # Who mends is shown what is to be mended.
    is_mended = self.name == 'speciale/refinement'
    if is_mended or rng.random() >= self._right_share:
      proof = put_some_fault(task, right, rng, self._faults)
    analysis = true_analysis(proof.verdict)
    if self.name == 'speciale/meta' and rng.random() >= self._right_share:
      analysis = wrong_analysis(proof, rng)
    item = _Item(task=task, right=right, proof=proof, analysis=analysis)
    return item, self._ask(item)

  def _ask(self, item: _Item) -> tuple[Message, ...]:
    proof = format_derivation(item.proof.steps)
    analysis = format_analysis(item.analysis)
    if self.name == 'speciale/proof':
      return self.dialogue.ask_proof(item.task)
    if self.name == 'speciale/refinement':
      return self.dialogue.ask_refinement(item.task, proof, analysis)
    if self.name == 'speciale/review':
      return self.dialogue.ask_review(item.task, proof)
    return self.dialogue.ask_meta(item.task, proof, analysis)


def wrong_analysis(proof: Judged, rng: random.Random) -> Analysis:
  """An analysis with a mistake that a meta-verifier may be asked to find.

  One issue too many, one for the wrong reason, none where there are some, or a
  score that does not follow. Not all of these lower its quality: to see nothing
  is no false claim.
  """
  faults = proof.verdict.faults
  ways = ['more', 'score']
  if faults:
    ways += ['reason', 'none']
  how = rng.choice(ways)
  if how == 'none':
    return Analysis(issues=(), score=1.0)
  if how == 'score':
    others = [s for s in (0.0, 0.5, 1.0) if s != proof.verdict.score]
    return Analysis(issues=faults, score=rng.choice(others))
  issues = list(faults)
  if how == 'reason':
    place = rng.randrange(len(issues))
    kinds = [kind for kind in _FAULTS if kind != issues[place].kind]
    issues[place] = dataclasses.replace(issues[place], kind=rng.choice(kinds))
  else:
    number = rng.randint(1, max(1, len(proof.steps)))
    issues.append(Fault(step=number, kind=rng.choice(_FAULTS)))
  issues = sorted(set(issues))
  return Analysis(issues=tuple(issues), score=score_of(issues))


def make(name: str, options: dict[str, Any]) -> SpecialeSource:
  """The source of that name.

  Raises:
    ValueError: unknown names, options and values.
  """
  try:
    return SpecialeSource(name, **options)
  except TypeError as error:
    raise ValueError(f'options: got {options} for {name!r}: {error}') from None


def _known(field: str, got: Sequence[str], known: tuple[Any, ...]) -> tuple:
  if not got or not set(got) <= set(known):
    raise ValueError(
      f'{field}: got {list(got)}, expected some of {list(known)}'
    )
  return tuple(got)
