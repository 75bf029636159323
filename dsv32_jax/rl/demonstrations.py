"""Worked answers of problem sources, as conversations for SFT.

A source that can write a correct answer to its own problems gives cold starts
without a teacher. What a demonstration looks like is the source's to say; here
is which problems are taken, in which mode, and how they are written.
"""

import dataclasses
import pathlib
import random
from collections.abc import Iterator, Mapping, Sequence

from dsv32_jax.chat import Mode
from dsv32_jax.config.problems import DemonstrationConfig
from dsv32_jax.data import conversations
from dsv32_jax.data.conversations import Conversation
from dsv32_jax.rl import problems
from dsv32_jax.rl.problems import ProblemSource

# Training problems that demonstrations are taken from, counted from here on, so
# that RL, which starts at 0, does not begin with the answers it was shown.
FIRST_INDEX = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """Demonstrations of one source.

  Attributes:
    source: of problems.
    count: how many.
    mode: in which they are answered.
    swapped: share of them that carry the answer of another problem: right in
      form, wrong in substance. It makes a model that knows how to answer, and
      is poor at it.
  """

  source: ProblemSource
  count: int
  mode: Mode
  swapped: float = 0.0


def part(config: DemonstrationConfig) -> Part:
  """The part that a config describes.

  Raises:
    ValueError: for a source that does not exist.
  """
  return Part(
    source=problems.make(config.source.name, **config.source.options),
    count=config.count,
    mode=config.mode,
    swapped=config.swapped,
  )


def make(parts: Sequence[Part], *, seed: int = 0) -> Iterator[Conversation]:
  """Makes the demonstrations, part after part.

  Args:
    parts: what to make.
    seed: of what sources leave to chance, and of which answers are swapped.

  Yields:
    A conversation each, tagged with domain, source, problem id and whether its
    answer is of another problem.
  """
  for number, part in enumerate(parts):
    for index in range(part.count):
      # A string seeds `random` by its SHA-512, equal on every Python version.
      rng = random.Random(f'demonstration:{seed}:{number}:{index}')
      is_swapped = rng.random() < part.swapped
      first = FIRST_INDEX + index
      problem = part.source.problem('train', first, mode=part.mode)
      answered = problem
      if is_swapped:
        other = first + part.count
        answered = part.source.problem('train', other, mode=part.mode)
      reply = part.source.demonstration(answered, rng)
      yield Conversation(
        messages=(*problem.messages, reply),
        mode=problem.mode,
        tags={
          'domain': problem.domain,
          'source': part.source.name,
          'problem': problem.id,
          'swapped': is_swapped,
        },
      )


def write(
  path: pathlib.Path, parts: Sequence[Part], *, seed: int = 0
) -> pathlib.Path:
  """Writes the demonstrations as JSONL unless the file is there already."""
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    conversations.write(path, make(parts, seed=seed))
  return path


def write_all(
  wanted: Mapping[str, Sequence[DemonstrationConfig]],
  directory: pathlib.Path,
  *,
  seed: int = 0,
) -> None:
  """Writes <directory>/NAME.jsonl for each name unless it is there already."""
  for name, parts in wanted.items():
    path = directory / f'{name}.jsonl'
    if not path.exists():
      write(path, [part(config) for config in parts], seed=seed)
