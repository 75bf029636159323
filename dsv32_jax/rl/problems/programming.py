"""Small functions to write, checked on inputs that the prompt does not show.

Three levels. 'words' names the steps of an expression in x; 'examples' gives
pairs of inputs and outputs of a linear one; 'function' asks for a Python
function on lists. A problem's reference holds hidden inputs and what comes out;
only the inputs ever go to where the answer runs.
"""

import random
from collections.abc import Callable
from typing import Any, Literal, get_args

from dsv32_jax.chat import Message, Mode
from dsv32_jax.rl.problems import list_functions, splits
from dsv32_jax.rl.problems.logic import demonstrated
from dsv32_jax.rl.problems.types import Problem, Split, check_mode

Level = Literal['words', 'examples', 'function']

# What x is when an expression is checked; no prompt shows these numbers.
_INPUTS = (0, 1, 2, 3, 5, 8, 13, 40, 101, -1, -7, -64)

_WORDS: tuple[tuple[str, str, Callable[[int, int], int]], ...] = (
  ('plus', '+', lambda a, b: a + b),
  ('minus', '-', lambda a, b: a - b),
  ('times', '*', lambda a, b: a * b),
)


class ProgrammingSource:
  """Functions to write.

  >>> source = ProgrammingSource(level='words', mode='thinking')
  >>> problem = source.problem('train', 1)
  >>> reply = source.demonstration(problem, random.Random(0))
  >>> problem.prompt, reply.reasoning, reply.content
  ('minus 53 plus 47', 'x-53', 'x-53+47')
  """

  name = 'programming'
  domain = 'programming'

  def __init__(
    self,
    *,
    level: str = 'function',
    steps: int = 2,
    most: int = 99,
    seed: int = 0,
    mode: str = 'chat',
  ):
    """Prepares the level.

    Args:
      level: 'words': 'times 12 plus 7' is 'x*12+7'. 'examples': '1>5 2>7 6>15'
        is '2*x+3'. 'function': a Python function `f` on a list.
      steps: operations of 'words' and 'function', 1 to 4.
      most: the largest number in 'words' and 'examples', 2 to 9999.
      seed: of the problems.
      mode: of the problems.
    """
    if level not in get_args(Level):
      raise ValueError(
        f'level: got {level!r}, expected one of {list(get_args(Level))}'
      )
    if not 1 <= steps <= 4:
      raise ValueError(f'steps: got {steps}, expected 1 to 4')
    if not 2 <= most <= 9999:
      raise ValueError(f'most: got {most}, expected 2 to 9999')
    self.mode = check_mode(mode)
    self._level = level
    self._steps = steps
    self._most = most
    self._key = f'programming/{level}/{steps}/{most}/{seed}'

  def problem(
    self, split: Split, index: int, mode: Mode | None = None
  ) -> Problem:
    """See `ProblemSource.problem`."""
    mode = check_mode(mode or self.mode)
    make = {
      'words': self._words,
      'examples': self._examples,
      'function': self._function,
    }[self._level]
    prompt, reference = splits.draw(
      make, lambda made: made[0], key=self._key, split=split, index=index
    )
    return Problem(
      id=f'{self._key}/{split}/{index}/{mode}',
      domain=self.domain,
      mode=mode,
      messages=(Message(role='user', content=prompt),),
      reference=reference,
      scorer='program',
    )

  def demonstration(
    self, problem: Problem, rng: random.Random, mode: Mode | None = None
  ) -> Message:
    """See `ProblemSource.demonstration`."""
    del rng  # There is one way.
    return demonstrated(problem.reference, mode or problem.mode)

  def _words(self, rng: random.Random) -> tuple[str, dict[str, Any]]:
    text, lowest, words, partial = 'x', False, [], []
    outputs = list(_INPUTS)
    for _ in range(self._steps):
      word, sign, operation = rng.choice(_WORDS)
      number = rng.randint(2, self._most)
      if sign == '*' and lowest:
        text = f'({text})'
      text += f'{sign}{number}'
      lowest = sign != '*'
      words.append(f'{word} {number}')
      partial.append(text)
      outputs = [operation(value, number) for value in outputs]
    work = ' '.join(partial[:-1]) or text
    return ' '.join(words), _expression_reference(text, work, outputs)

  def _examples(self, rng: random.Random) -> tuple[str, dict[str, Any]]:
    factor, added = rng.randint(1, self._most), rng.randint(0, self._most)
    first = rng.randint(0, 9)
    shown = [first, first + 1, rng.choice([n for n in range(20) if n != first])]
    pairs = [(x, factor * x + added) for x in shown]
    (x0, y0), (_, y1), _ = pairs
    work = f'{y1}-{y0}={factor} {y0}-{factor}*{x0}={added}'
    return (
      ' '.join(f'{x}>{y}' for x, y in pairs),
      _expression_reference(
        f'{factor}*x+{added}', work, [factor * x + added for x in _INPUTS]
      ),
    )

  def _function(self, rng: random.Random) -> tuple[str, dict[str, Any]]:
    task = list_functions.draw(rng, self._steps)
    inputs = list_functions.inputs(rng)
    return task.prompt, {
      'kind': 'function',
      'inputs': [[numbers] for numbers in inputs],
      'expected': [task.run(numbers) for numbers in inputs],
      'answer': task.solution,
      'work': task.work,
    }


def _expression_reference(
  answer: str, work: str, outputs: list[int]
) -> dict[str, Any]:
  return {
    'kind': 'expression',
    'inputs': [[x] for x in _INPUTS],
    'expected': outputs,
    'answer': answer,
    'work': work,
  }
