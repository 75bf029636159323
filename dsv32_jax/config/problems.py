"""Configuration of problems: their sources, domains and worked answers."""

import dataclasses
from typing import Any, Literal

from dsv32_jax.config.checks import check_at_least, require
from dsv32_jax.config.model import check_types

Mode = Literal['thinking', 'chat']


DEMONSTRATIONS = 'demonstrations:'


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProblemSourceConfig:
  """One source of problems.

  Attributes:
    name: in the registry of `dsv32_jax.rl.problems`.
    options: of that source.
    weight: share of its domain's prompts, relative to its other sources.
  """

  name: str
  options: dict[str, Any] = dataclasses.field(default_factory=dict)
  weight: float = 1.0

  def __post_init__(self):
    check_types(self)
    require(
      self.weight > 0,
      f'weight: got {self.weight}, expected a positive number',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemonstrationConfig:
  """Worked answers of one source, for a cold start.

  Attributes:
    source: of problems; it must be able to write answers.
    count: how many.
    mode: in which they are answered.
    swapped: share of them with another problem's answer: right in form, wrong
      in substance.
  """

  source: ProblemSourceConfig
  count: int
  mode: Mode = 'chat'
  swapped: float = 0.0

  def __post_init__(self):
    check_types(self)
    check_at_least(self, 1, 'count')
    require(
      0 <= self.swapped <= 1,
      f'swapped: got {self.swapped}, expected 0 to 1',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DomainConfig:
  """One domain of the mixture, such as mathematics.

  Attributes:
    sources: where its problems come from.
    weight: share of the prompts, relative to the other domains; 0 leaves the
      domain out of training (it may still be evaluated).
    modes: in which its problems are posed, in equal shares.
    max_new_tokens: longest response; None takes the rollout's.
  """

  sources: tuple[ProblemSourceConfig, ...] = ()
  weight: float = 1.0
  modes: tuple[Mode, ...] = ('chat',)
  max_new_tokens: int | None = None

  def __post_init__(self):
    check_types(self)
    check_at_least(self, 0, 'weight')
    check_at_least(self, 1, 'max_new_tokens')
    require(
      self.weight == 0 or len(self.sources) > 0,
      f'sources: got none with weight {self.weight}, expected at least one, or '
      'weight 0',
    )
    for source in self.sources:
      require(
        isinstance(source, ProblemSourceConfig),
        f'sources: got {source!r}, expected ProblemSourceConfig',
      )
    require(len(self.modes) > 0, 'modes: got none, expected at least one')
    for mode in self.modes:
      require(
        mode in ('thinking', 'chat'),
        f"modes: got {mode!r}, expected 'thinking' or 'chat'",
      )
