"""Short texts to write, each with a rubric of its own that programs can check.

A stand-in for general writing prompts, whose rubrics a model would judge: the
same interface (`rewards.judges`), with criteria that need no reader.
"""

import random
from typing import Any

from dsv32_jax.chat import Message, Mode
from dsv32_jax.rl.problems import splits
from dsv32_jax.rl.problems.types import Criterion, Problem, Split, check_mode

_TOPICS = (
  'the sea', 'a garden', 'an old house', 'the first snow', 'a train station',
  'a lost key', 'the night sky', 'a market', 'a bridge', 'a rainy day',
  'a lighthouse', 'a library', 'the desert', 'a small dog', 'a wide river',
  'a busy kitchen',
)  # fmt: skip
_WORDS = (
  'blue', 'salt', 'light', 'stone', 'window', 'quiet', 'green', 'paper',
  'silver', 'bread', 'cold', 'morning', 'thread', 'wooden', 'music', 'golden',
  'river', 'smoke', 'glass', 'apple', 'shadow', 'honey', 'iron', 'feather',
)  # fmt: skip
_AVOIDED = ('very', 'really', 'nice', 'good', 'thing', 'beautiful')
_FORMS = ('sentences', 'bullets', 'json')


class WritingSource:
  """Sentences, lists or JSON on a topic, with words to use and to avoid.

  >>> source = WritingSource()
  >>> problem = source.problem('train', 0)
  >>> [criterion.kind for criterion in problem.rubric][:2]
  ['contains', 'excludes']
  """

  name = 'writing'
  domain = 'writing'

  def __init__(self, *, words: int = 2, seed: int = 0, mode: str = 'chat'):
    """Prepares nothing.

    Args:
      words: to be used, 1 to 5.
      seed: of the problems.
      mode: of the problems.
    """
    if not 1 <= words <= 5:
      raise ValueError(f'words: got {words}, expected 1 to 5')
    self.mode = check_mode(mode)
    self._words = words
    self._key = f'writing/{words}/{seed}'

  def problem(
    self, split: Split, index: int, mode: Mode | None = None
  ) -> Problem:
    """See `ProblemSource.problem`."""
    mode = check_mode(mode or self.mode)
    task = splits.draw(
      self._draw, _prompt, key=self._key, split=split, index=index
    )
    return Problem(
      id=f'{self._key}/{split}/{index}/{mode}',
      domain=self.domain,
      mode=mode,
      messages=(Message(role='user', content=_prompt(task)),),
      reference=task,
      scorer='rubric',
      rubric=_rubric(task),
    )

  def demonstration(
    self, problem: Problem, rng: random.Random, mode: Mode | None = None
  ) -> Message:
    """See `ProblemSource.demonstration`."""
    task = problem.reference
    words, topic, count = task['words'], task['topic'], task['count']
    pieces = []
    for number in range(count):
      used = words[number::count]
      opening = rng.choice(
        ('Here I think of', 'It reminds me of', 'There I once saw', 'I recall')
      )
      tail = f' with {" and ".join(used)} around it' if used else ' again'
      pieces.append(f'{opening} {topic}{tail}')
    if task['form'] == 'bullets':
      content = '\n'.join(f'- {piece}' for piece in pieces)
    elif task['form'] == 'json':
      content = (
        '{"title": "' + topic + '", "lines": ['
        + ', '.join(f'"{piece}"' for piece in pieces) + ']}'
      )  # fmt: skip
    else:
      content = ' '.join(f'{piece}.' for piece in pieces)
    thinks = (mode or problem.mode) == 'thinking'
    plan = (
      f'{count} {task["form"]} about {topic}; use {", ".join(words)}; '
      f'leave out {task["avoided"]}.'
    )
    return Message(
      role='assistant', content=content, reasoning=plan if thinks else ''
    )

  def _draw(self, rng: random.Random) -> dict[str, Any]:
    return {
      'topic': rng.choice(_TOPICS),
      'words': rng.sample(_WORDS, self._words),
      'avoided': rng.choice(_AVOIDED),
      'form': rng.choice(_FORMS),
      'count': rng.randint(2, 5),
    }


def _prompt(task: dict[str, Any]) -> str:
  form = {
    'sentences': f'Write {task["count"]} sentences',
    'bullets': f'Write a list of {task["count"]} points, each after "- ",',
    'json': (
      'Write a JSON object with the keys "title" (text) and "lines" '
      f'({task["count"]} texts)'
    ),
  }[task['form']]
  words = ' and '.join(f'"{word}"' for word in task['words'])
  return (
    f'{form} about {task["topic"]}. Use the words {words}. '
    f'Do not use the word "{task["avoided"]}".'
  )


def _rubric(task: dict[str, Any]) -> tuple[Criterion, ...]:
  count = task['count']
  criteria = [
    Criterion(
      text=f'Uses the words {", ".join(task["words"])}.',
      weight=2.0,
      kind='contains',
      arguments={'words': task['words']},
    ),
    Criterion(
      text=f'Does not use the word {task["avoided"]}.',
      kind='excludes',
      arguments={'words': [task['avoided']]},
    ),
    Criterion(
      text='Is between 5 and 120 words long.',
      kind='length',
      arguments={'unit': 'words', 'least': 5, 'most': 120},
    ),
  ]
  if task['form'] == 'json':
    schema = {
      'type': 'object',
      'required': ['title', 'lines'],
      'properties': {
        'title': {'type': 'string'},
        'lines': {
          'type': 'array',
          'items': {'type': 'string'},
          'minItems': count,
          'maxItems': count,
        },
      },
    }
    criteria.append(
      Criterion(
        text=f'Is JSON with a title and {count} lines.',
        weight=2.0,
        kind='json_schema',
        arguments={'schema': schema},
      )
    )
    return tuple(criteria)
  if task['form'] == 'bullets':
    criteria.append(
      Criterion(
        text='Is a list of points.',
        kind='format',
        arguments={'name': 'bullets'},
      )
    )
  unit = 'lines' if task['form'] == 'bullets' else 'sentences'
  criteria.append(
    Criterion(
      text=f'Has exactly {count} {unit}.',
      kind='length',
      arguments={'unit': unit, 'least': count, 'most': count},
    )
  )
  return tuple(criteria)
