"""Questions about a few facts that the prompt tells, with a rubric.

A stand-in for general questions: an answer is to name what was asked for, and
nothing that was not, in few words.
"""

import random
from typing import Any

from dsv32_jax.chat import Message, Mode
from dsv32_jax.rl.problems import splits
from dsv32_jax.rl.problems.types import Criterion, Problem, Split, check_mode

_NAMES = (
  'Ada', 'Ben', 'Cleo', 'Dan', 'Eva', 'Finn', 'Gus', 'Hana', 'Ivo', 'Jana',
  'Kai', 'Lena', 'Milo', 'Nora', 'Otto', 'Pia',
)  # fmt: skip
_PLACES = (
  'Rome', 'Oslo', 'Lima', 'Cairo', 'Delhi', 'Paris', 'Seoul', 'Quito', 'Bern',
  'Accra', 'Tunis', 'Hanoi', 'Porto', 'Kyoto', 'Perth', 'Turin',
)  # fmt: skip


class QuestionSource:
  """Who lives where, told in sentences, asked in either direction.

  >>> source = QuestionSource(facts=2)
  >>> problem = source.problem('train', 0)
  >>> reply = source.demonstration(problem, random.Random(0))
  >>> problem.prompt, reply.content
  ('Nora lives in Rome. Gus lives in Turin. Who lives in Turin?', 'Gus')
  """

  name = 'question_answering'
  domain = 'question_answering'

  def __init__(self, *, facts: int = 4, seed: int = 0, mode: str = 'chat'):
    """Prepares nothing.

    Args:
      facts: how many are told, 2 to 16.
      seed: of the problems.
      mode: of the problems.
    """
    if not 2 <= facts <= len(_NAMES):
      raise ValueError(f'facts: got {facts}, expected 2 to {len(_NAMES)}')
    self.mode = check_mode(mode)
    self._facts = facts
    self._key = f'question_answering/{facts}/{seed}'

  def problem(
    self, split: Split, index: int, mode: Mode | None = None
  ) -> Problem:
    """See `ProblemSource.problem`."""
    mode = check_mode(mode or self.mode)
    task = splits.draw(
      self._draw,
      lambda made: made['prompt'],
      key=self._key,
      split=split,
      index=index,
    )
    return Problem(
      id=f'{self._key}/{split}/{index}/{mode}',
      domain=self.domain,
      mode=mode,
      messages=(Message(role='user', content=task['prompt']),),
      reference=task,
      scorer='rubric',
      rubric=(
        Criterion(
          text=f'Names {task["answer"]}.',
          weight=3.0,
          kind='contains',
          arguments={'words': [task['answer']]},
        ),
        Criterion(
          text='Names nothing that was not asked for.',
          kind='excludes',
          arguments={'words': task['others']},
        ),
        Criterion(
          text='Has at most 12 words.',
          kind='length',
          arguments={'unit': 'words', 'least': 1, 'most': 12},
        ),
      ),
    )

  def demonstration(
    self, problem: Problem, rng: random.Random, mode: Mode | None = None
  ) -> Message:
    """See `ProblemSource.demonstration`."""
    del rng  # There is one way.
    task = problem.reference
    thinks = (mode or problem.mode) == 'thinking'
    return Message(
      role='assistant',
      content=task['answer'],
      reasoning=task['fact'] if thinks else '',
    )

  def _draw(self, rng: random.Random) -> dict[str, Any]:
    names = rng.sample(_NAMES, self._facts)
    places = rng.sample(_PLACES, self._facts)
    facts = [
      f'{name} lives in {place}.'
      for name, place in zip(names, places, strict=True)
    ]
    asked = rng.randrange(self._facts)
    if rng.random() < 0.5:
      question = f'Where does {names[asked]} live?'
      answer, others = places[asked], places
    else:
      question = f'Who lives in {places[asked]}?'
      answer, others = names[asked], names
    return {
      'prompt': ' '.join([*facts, question]),
      'answer': answer,
      'others': [other for other in others if other != answer],
      'fact': facts[asked],
    }
