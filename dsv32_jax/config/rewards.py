"""Configuration of rewards: what a response earns, and who scores it."""

import dataclasses
from typing import Literal

from dsv32_jax.config.checks import check_at_least, require
from dsv32_jax.config.model import check_types


@dataclasses.dataclass(frozen=True, kw_only=True)
class DomainReward:
  """What a response of a domain earns.

  R = outcome_weight R_outcome + format_weight R_format
      + language_weight R_language - length_penalty P_length,
  with P_length = clip((L - (max_length - length_buffer)) / length_buffer, 0, 1)
  for a response of L tokens.

  Attributes:
    outcome_weight: of the verifier's or judge's outcome.
    threshold: a verifier's score of at least this is outcome 1, else 0; 0 takes
      the score as it is (rubrics do).
    format_weight: of a response that parses and is ended.
    language_weight: of the share of words in the target language.
    language: the target language.
    length_penalty: lambda; the Speciale variant has a smaller one.
    length_buffer: L_buf, tokens over which the penalty rises; 0 has no penalty
      but at the end.
    max_length: L_max; None takes the longest response that is sampled.
  """

  outcome_weight: float = 1.0
  threshold: float = 1.0
  format_weight: float = 0.0
  language_weight: float = 0.0
  language: str = 'en'
  length_penalty: float = 0.0
  length_buffer: int = 0
  max_length: int | None = None

  def __post_init__(self):
    check_types(self)
    check_at_least(
      self,
      0,
      'outcome_weight',
      'format_weight',
      'language_weight',
      'length_penalty',
      'length_buffer',
    )
    check_at_least(self, 1, 'max_length')
    require(
      0 <= self.threshold <= 1,
      f'threshold: got {self.threshold}, expected 0 to 1',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeConfig:
  """Who scores the criteria of a rubric.

  Attributes:
    kind: 'programmatic' checks are embedded; 'openai' asks an OpenAI-compatible
      endpoint.
    base_url: of the endpoint.
    model: its name there.
    samples: judgements a response, averaged.
    timeout_s: of one judgement.
    max_tokens: of one judgement.
    parallel: judgements that are waited for at a time.
    api_key_variable: environment variable that holds the endpoint's key; empty
      sends none.
  """

  kind: Literal['programmatic', 'openai'] = 'programmatic'
  base_url: str = ''
  model: str = ''
  samples: int = 1
  timeout_s: float = 60.0
  max_tokens: int = 1024
  parallel: int = 8
  api_key_variable: str = ''

  def __post_init__(self):
    check_types(self)
    check_at_least(self, 1, 'samples', 'max_tokens', 'parallel')
    require(
      self.timeout_s > 0,
      f'timeout_s: got {self.timeout_s}, expected a positive number',
    )
    require(
      bool(self.base_url) == (self.kind == 'openai'),
      f'base_url: got {self.base_url!r} for kind {self.kind!r}, expected a URL '
      "for 'openai' only",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig:
  """Rewards of all domains, and how they are computed.

  Attributes:
    default: of domains that `domains` does not name.
    domains: by 'domain', or by 'domain/mode' where a mode differs.
    workers: processes that score; 0 scores in this one.
    timeout_s: a scorer that takes longer costs its sample.
    judge: of problems with a rubric.
  """

  default: DomainReward = dataclasses.field(default_factory=DomainReward)
  domains: dict[str, DomainReward] = dataclasses.field(default_factory=dict)
  workers: int = 1
  timeout_s: float = 10.0
  judge: JudgeConfig = dataclasses.field(default_factory=JudgeConfig)

  def __post_init__(self):
    check_types(self)
    check_at_least(self, 0, 'workers')
    require(
      self.timeout_s > 0,
      f'timeout_s: got {self.timeout_s}, expected a positive number',
    )
    for name, value in self.domains.items():
      require(
        isinstance(value, DomainReward),
        f'domains.{name}: got {value!r}, expected a DomainReward',
      )

  def of(self, domain: str, mode: str) -> DomainReward:
    """The reward of a domain in a mode."""
    named = self.domains.get(f'{domain}/{mode}', self.domains.get(domain))
    return self.default if named is None else named
