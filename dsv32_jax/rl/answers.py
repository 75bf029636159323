"""Answers of one model to many problems, verified, in parts that are kept.

For training data that specialists write and for comparing models: both ask a
fixed list of problems, and go on after a crash with the part that is missing.
"""

import dataclasses
import json
import pathlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dsv32_jax.chat import Mode
from dsv32_jax.checkpoints import integrity
from dsv32_jax.config.model import ModelConfig
from dsv32_jax.config.problems import ProblemSourceConfig
from dsv32_jax.config.rewards import RewardConfig
from dsv32_jax.config.rollout import RolloutConfig
from dsv32_jax.data import Tokenizer
from dsv32_jax.inference.sampling import Sampling
from dsv32_jax.rl import problems, rollout
from dsv32_jax.rl.problems import Problem, Split
from dsv32_jax.rl.prompts import draw_seed
from dsv32_jax.rl.rejection_sampling import Answer
from dsv32_jax.rl.rewards import RewardModel, Sampled

# Prompts that a source has given before are passed over; after so many a
# prompt wanted the source is held to have no more.
_MOST_REPEATS = 50


def distinct_problems(
  sources: Sequence[ProblemSourceConfig],
  *,
  split: Split,
  mode: Mode,
  count: int,
) -> list[Problem]:
  """The first different prompts of some sources, by their weights.

  Args:
    sources: of one domain.
    split: 'train' or 'held_out'.
    mode: in which they are asked.
    count: how many.

  Raises:
    ValueError: if the sources have fewer different prompts.
  """
  made = [problems.make(s.name, **s.options) for s in sources]
  weights = [source.weight for source in sources]
  # A string seeds `random` by its SHA-512, equal on every Python version.
  rng = random.Random(f'distinct problems:{split}')
  places = [0] * len(made)
  found: dict[str, Problem] = {}
  for _ in range(count * _MOST_REPEATS):
    if len(found) == count:
      break
    [number] = rng.choices(range(len(made)), weights)
    problem = made[number].problem(split, places[number], mode=mode)
    places[number] += 1
    found.setdefault(problem.prompt, problem)
  if len(found) < count:
    raise ValueError(
      f'problems: got {count} of {[s.name for s in sources]}, expected at '
      f'most the {len(found)} different prompts that their {split} split has '
      '(other options make more)'
    )
  return list(found.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
  """What is asked, and how it is answered.

  Attributes:
    problems: in order.
    samples: answers a problem.
    max_new_tokens: of an answer.
    sampling: how tokens are drawn.
    seed: of the draws; an answer's own seed follows from this, the problem's
      place and the answer's number, so that models which answer the same list
      draw alike.
    part: problems that are answered and kept together.
  """

  problems: Sequence[Problem]
  samples: int
  max_new_tokens: int
  sampling: Sampling
  seed: int
  part: int


class Answerer:
  """A model that answers, and the verifier of what it says."""

  def __init__(
    self,
    model: ModelConfig,
    variables: dict,
    tokenizer: Tokenizer,
    rewards: RewardConfig,
    config: RolloutConfig,
    *,
    max_tokens: int,
    report: Callable[[str], None] = print,
  ):
    """Makes the sampler and the verifier; call `close`, or use it in `with`.

    Args:
      model: the architecture.
      variables: of the model.
      tokenizer: of the model.
      rewards: what counts as right.
      config: sizes of the sampler.
      max_tokens: of the longest prompt and answer together.
      report: receives lines for the user.
    """
    self._sampler = rollout.Sampler(
      model, variables, config, tokenizer, max_tokens=max_tokens
    )
    self._rewards = RewardModel(rewards, max_new_tokens=config.max_new_tokens)
    self._report = report

  def answers(self, asked: Asked, first: int, end: int) -> list[Answer]:
    """Answers to the problems from `first` to `end`, in order."""
    repeated = [
      (place, problem, number)
      for place, problem in enumerate(asked.problems[first:end], first)
      for number in range(asked.samples)
    ]
    wanted = [problem for _, problem, _ in repeated]
    completions = self._sampler.sample(
      wanted,
      seeds=[draw_seed(asked.seed, place, n) for place, _, n in repeated],
      max_new_tokens=[asked.max_new_tokens] * len(wanted),
      sampling=asked.sampling,
    )
    outcomes = self._rewards.score(
      wanted,
      [
        Sampled(c.tokens, self._sampler.text(c), c.finish_reason)
        for c in completions
      ],
    )
    return [
      Answer(
        problem=problem,
        message=outcome.message,
        num_tokens=len(completion.tokens),
        is_correct=outcome.components['outcome'] >= 1,
      )
      for problem, completion, outcome in zip(
        wanted, completions, outcomes, strict=True
      )
    ]

  def parts(
    self,
    asked: Asked,
    directory: pathlib.Path,
    record: Callable[[list[Answer]], Any],
    *,
    name: str,
  ) -> list[Any]:
    """Answers everything, keeping each part as soon as it is complete.

    Args:
      asked: what is asked. A directory belongs to one list of problems.
      directory: gets part-00000.json and so on.
      record: what is kept of a part's answers, as JSON values.
      name: what the report calls it.

    Returns:
      The record of each part, in order.
    """
    directory.mkdir(parents=True, exist_ok=True)
    found = []
    for number, first in enumerate(range(0, len(asked.problems), asked.part)):
      path = directory / f'part-{number:05d}.json'
      if not path.exists():
        end = min(first + asked.part, len(asked.problems))
        answers = self.answers(asked, first, end)
        integrity.write_atomically(
          path, json.dumps(record(answers), ensure_ascii=False)
        )
        right = sum(answer.is_correct for answer in answers)
        self._report(
          f'{name}: {end} of {len(asked.problems)} problems, '
          f'{right / len(answers):.1%} of the last {len(answers)} answers right'
        )
      found.append(json.loads(path.read_text('utf-8')))
    return found

  def close(self) -> None:
    """Ends the processes of the verifier."""
    self._rewards.close()

  def __enter__(self) -> 'Answerer':
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def by_problem(
  answers: Sequence[Answer], samples: int
) -> Iterator[list[Answer]]:
  """The answers to each problem, from answers in the order of `answers`."""
  for start in range(0, len(answers), samples):
    yield list(answers[start : start + samples])
