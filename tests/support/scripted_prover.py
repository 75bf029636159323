"""A policy that writes derivations by a program, as well as it is told."""

import random
import re
from collections.abc import Sequence

from dsv32_jax.rl.speciale import analyses, faults, prompts, tasks
from dsv32_jax.rl.speciale.derivations import Task, check, parse_derivation
from dsv32_jax.rl.speciale.policy import Prompt, Reply

_QUESTION = re.compile(
  r'(?:Mend: |Check: |Judge: )?(Compute|Simplify|Solve|Show) (.*)\.'
)


def read_task(line: str) -> Task:
  match = _QUESTION.fullmatch(line)
  assert match is not None, line
  if match[1] == 'Show':
    start, target = match[2].split(' = ')
    return Task(kind='prove', start=start, target=target)
  kind = {'Compute': 'compute', 'Simplify': 'simplify', 'Solve': 'solve'}
  return Task(kind=kind[match[1]], start=match[2])


class ScriptedProver:
  """Answers every role.

  Attributes:
    asked: all prompts so far, as text.
  """

  def __init__(
    self, *, right: float, mends: float = 0.5, blind: float, unreadable=0.0
  ):
    """Sets how good it is.

    Args:
      right: share of first attempts that are right.
      mends: share of refinements that are right.
      blind: share of analyses that see no fault where there is one.
      unreadable: share of replies that cannot be read.
    """
    self.asked: list[str] = []
    self._right, self._mends, self._blind = right, mends, blind
    self._unreadable = unreadable

  def __call__(self, prompts_: Sequence[Prompt]) -> list[Reply]:
    self.asked += [prompt.messages[-1].content for prompt in prompts_]
    return [self._answer(prompt) for prompt in prompts_]

  def _answer(self, prompt: Prompt) -> Reply:
    rng = random.Random(prompt.seed)
    question, *rest = prompt.messages[-1].content.split('\n')
    proof, analysis = prompts.split_attempt('\n'.join(rest))
    task = read_task(question)
    if rng.random() < self._unreadable:
      return Reply(content='?', num_tokens=1)
    if question.startswith('Judge: '):
      shown = analyses.parse_analysis(analysis)
      truth = check(task, parse_derivation(proof))
      quality = analyses.meta_score(shown, truth)
      return Reply(content=prompts.format_meta(quality), num_tokens=2)
    if question.startswith('Check: '):
      found = self._analysis(task, parse_derivation(proof), rng)
      return Reply(content=analyses.format_analysis(found), num_tokens=5)
    steps = tasks.solve(task)
    assert steps is not None
    chance = self._mends if question.startswith('Mend: ') else self._right
    if rng.random() >= chance:
      steps = faults.put_some_fault(task, steps, rng).steps
    found = self._analysis(task, steps, rng)
    return Reply(
      content=prompts.format_attempt(steps, found),
      num_tokens=20,
      num_reasoning_tokens=rng.randint(1, 15),
    )

  def _analysis(self, task, steps, rng) -> analyses.Analysis:
    if rng.random() < self._blind:
      return analyses.Analysis(issues=(), score=1.0)
    return analyses.true_analysis(check(task, steps))
