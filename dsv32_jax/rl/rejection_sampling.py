"""Which of a specialist's answers become training data.

The paper says that specialists write the data of their domains and not how it
is chosen (arXiv:2512.02556, section 3). Ours: k answers a prompt; what the
verifier accepts is kept; of several correct answers to a prompt the shorter
ones, up to a cap; equal answers once; each tagged with domain, mode and what
wrote it.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsv32_jax.chat import Message
from dsv32_jax.data.conversations import Conversation
from dsv32_jax.rl.problems import Problem, is_held_out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
  """One answer to a problem.

  Attributes:
    problem: what was asked.
    message: the answer, or None if it does not parse.
    num_tokens: that were sampled.
    is_correct: the verifier accepts it, and it ended by itself.
  """

  problem: Problem
  message: Message | None
  num_tokens: int
  is_correct: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selected:
  """What is kept, and what became of the rest.

  Attributes:
    answers: kept, in the order of their prompts; shorter first within one.
    counts: of answers: 'sampled', 'unparsed', 'wrong', 'repeated' (an equal
      answer to the prompt is kept), 'over_cap', 'kept'; and of prompts:
      'prompts', 'prompts_solved'.
  """

  answers: tuple[Answer, ...]
  counts: Mapping[str, int]


def select(answers: Iterable[Answer], *, keep_per_prompt: int) -> Selected:
  """Chooses among the answers to training prompts.

  Two problems with the same prompt and mode count as one prompt.

  Args:
    answers: in any order; among equally short ones the earlier wins.
    keep_per_prompt: at most so many a prompt.

  Raises:
    ValueError: for an answer to a held-out prompt.
  """
  by_prompt: dict[tuple[str, str], list[Answer]] = {}
  counts: collections.Counter[str] = collections.Counter()
  for answer in answers:
    problem = answer.problem
    if is_held_out(problem.prompt):
      raise ValueError(
        f'problem: got {problem.id}, whose prompt is held out, expected one of '
        'the training split'
      )
    counts['sampled'] += 1
    by_prompt.setdefault((problem.prompt, problem.mode), []).append(answer)
  kept: list[Answer] = []
  for candidates in by_prompt.values():
    chosen, seen = [], set()
    for answer in sorted(candidates, key=lambda a: a.num_tokens):
      if answer.message is None:
        counts['unparsed'] += 1
      elif not answer.is_correct:
        counts['wrong'] += 1
      elif (text := _text(answer.message)) in seen:
        counts['repeated'] += 1
      elif len(chosen) == keep_per_prompt:
        counts['over_cap'] += 1
      else:
        seen.add(text)
        chosen.append(answer)
    counts['prompts_solved'] += bool(chosen)
    kept += chosen
  counts['kept'] = len(kept)
  counts['prompts'] = len(by_prompt)
  return Selected(answers=tuple(kept), counts={k: counts[k] for k in COUNTS})


COUNTS = (
  'sampled',
  'unparsed',
  'wrong',
  'repeated',
  'over_cap',
  'kept',
  'prompts',
  'prompts_solved',
)


def conversation(answer: Answer, **tags: Any) -> Conversation:
  """The training conversation of an answer that was kept.

  Args:
    answer: a correct one.
    **tags: what else is to be known of it.

  Raises:
    ValueError: for an answer that does not parse.
  """
  problem = answer.problem
  if answer.message is None:
    raise ValueError(f'answer: to {problem.id} does not parse')
  return Conversation(
    messages=(*problem.messages, answer.message),
    mode=problem.mode,
    tags={
      'domain': problem.domain,
      'problem': problem.id,
      'num_tokens': answer.num_tokens,
      **tags,
    },
  )


def _text(message: Message) -> tuple[str, str, str]:
  return message.reasoning, message.content, repr(message.tool_calls)


def total(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
  """Counts of several selections whose prompts are different, together."""
  return {name: sum(part[name] for part in counts) for name in COUNTS}
