"""Configuration of specialist distillation (arXiv:2512.02556, section 3).

From one base checkpoint a specialist is trained for each domain and mode; each
writes training data of its own; the base, trained on all of it, is the student;
one mixed RL stage follows. The paper gives no amounts.
"""

import dataclasses

from dsv32_jax.config.checks import check_at_least, require
from dsv32_jax.config.data import TokenizerConfig
from dsv32_jax.config.model import ModelConfig, check_types
from dsv32_jax.config.problems import (
  DemonstrationConfig,
  Mode,
  ProblemSourceConfig,
)
from dsv32_jax.config.rewards import RewardConfig
from dsv32_jax.config.rl import GRPOConfig, UpdateConfig
from dsv32_jax.config.rollout import RolloutConfig
from dsv32_jax.config.sft import SFTConfig, check_demonstrations, placed
from dsv32_jax.config.training import (
  CheckpointConfig,
  EvaluationConfig,
  RunConfig,
  StageConfig,
)

# "six specialized domains: mathematics, programming, general logical reasoning,
# general agentic tasks, agentic coding, and agentic search", each in thinking
# and non-thinking mode.
SPECIALISED_DOMAINS = (
  'mathematics',
  'programming',
  'logical_reasoning',
  'general_agent',
  'agentic_coding',
  'agentic_search',
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLStepConfig:
  """RL from a checkpoint; the fields are those of `config.rl.RLConfig`.

  Attributes:
    batches: rollout batches.
    rollout: how responses are sampled.
    rewards: what they earn.
    grpo: the objective.
    update: minibatches and optimizers.
    evaluate_problems: held-out problems a domain before and after.
  """

  batches: int
  rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
  rewards: RewardConfig = dataclasses.field(default_factory=RewardConfig)
  grpo: GRPOConfig = dataclasses.field(default_factory=GRPOConfig)
  update: UpdateConfig = dataclasses.field(default_factory=UpdateConfig)
  evaluate_problems: int = 200

  def __post_init__(self):
    check_types(self)
    check_at_least(self, 1, 'batches', 'evaluate_problems')


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecialistDomain:
  """One domain: its problems and how much is done with them.

  Attributes:
    sources: of problems; none leaves the domain out, and `unpopulated` says
      why.
    modes: a specialist is trained for each.
    unpopulated: what a user reads where there are no sources.
    demonstrations: worked answers of the sources for the cold start of a
      specialist, a mode; 0 has none, and RL starts from the base.
    sft_steps: of the cold start of its specialists; None takes the common
      number.
    rl_batches: rollout batches of its specialists; None takes the common
      number.
    distilled_prompts: training prompts that its specialists answer for the
      student, a mode; None takes the common number.
    weight: its share, a mode, of what the student reads; and of the prompts of
      mixed RL.
    max_new_tokens: longest response; None takes the rollout's.
  """

  sources: tuple[ProblemSourceConfig, ...] = ()
  modes: tuple[Mode, ...] = ('thinking', 'chat')
  unpopulated: str = ''
  demonstrations: int = 0
  sft_steps: int | None = None
  rl_batches: int | None = None
  distilled_prompts: int | None = None
  weight: float = 1.0
  max_new_tokens: int | None = None

  def __post_init__(self):
    check_types(self)
    check_at_least(self, 0, 'demonstrations', 'weight')
    check_at_least(
      self,
      1,
      'sft_steps',
      'rl_batches',
      'distilled_prompts',
      'max_new_tokens',
    )
    require(
      bool(self.sources) != bool(self.unpopulated),
      f'sources: got {len(self.sources)} with unpopulated '
      f'{self.unpopulated!r}, expected sources, or the reason why none',
    )
    require(
      len(self.modes) > 0 and len(set(self.modes)) == len(self.modes),
      f'modes: got {self.modes}, expected different ones, at least one',
    )
    for mode in self.modes:
      require(
        mode in ('thinking', 'chat'),
        f"modes: got {mode!r}, expected 'thinking' or 'chat'",
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RejectionConfig:
  """What a specialist writes, and which of it is kept.

  Attributes:
    prompts: different training prompts a domain and mode.
    samples: k, answers a prompt.
    keep_per_prompt: at most so many correct answers of a prompt are kept, the
      shorter first.
    temperature: of the draws.
    top_p: of the draws.
    part_prompts: prompts that are sampled and written together; what is
      written survives a crash.
  """

  prompts: int = 2000
  samples: int = 4
  keep_per_prompt: int = 1
  temperature: float = 1.0
  top_p: float = 1.0
  part_prompts: int = 500

  def __post_init__(self):
    check_types(self)
    check_at_least(
      self, 1, 'prompts', 'samples', 'keep_per_prompt', 'part_prompts'
    )
    require(
      self.temperature > 0,
      f'temperature: got {self.temperature}, expected a positive number (k '
      'greedy answers are all equal)',
    )
    require(
      0 < self.top_p <= 1,
      f'top_p: got {self.top_p}, expected 0 < top_p <= 1',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedEvaluationConfig:
  """The same held-out problems for every model.

  Attributes:
    problems: different held-out prompts a domain and mode.
    samples: answers a prompt; a prompt counts with their mean.
    temperature: of the draws (V3.2 is evaluated at 1.0); 0 is greedy.
    top_p: of the draws.
    part_problems: problems that are sampled and written together.
  """

  problems: int = 2000
  samples: int = 1
  temperature: float = 1.0
  top_p: float = 1.0
  part_problems: int = 1000

  def __post_init__(self):
    check_types(self)
    check_at_least(self, 1, 'samples', 'part_problems')
    # An interval needs a variance.
    check_at_least(self, 2, 'problems')
    check_at_least(self, 0, 'temperature')
    require(
      0 < self.top_p <= 1,
      f'top_p: got {self.top_p}, expected 0 < top_p <= 1',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseConfig:
  """The base checkpoint that every specialist and the student start from.

  Attributes:
    init_from: a checkpoint; None trains `stages`.
    tokenizer: of `init_from`; otherwise that of the first stage is used.
    stages: of a recipe, by name.
    order: names of the stages to run.
    demonstrations: what is written for the stages to read, by name: a source
      whose path is 'demonstrations:NAME' reads the one of that name.
  """

  init_from: str | None = None
  tokenizer: TokenizerConfig = dataclasses.field(
    default_factory=TokenizerConfig
  )
  stages: dict[str, StageConfig] = dataclasses.field(default_factory=dict)
  order: tuple[str, ...] = ()
  demonstrations: dict[str, tuple[DemonstrationConfig, ...]] = (
    dataclasses.field(default_factory=dict)
  )

  def __post_init__(self):
    check_types(self)
    require(
      (self.init_from is None) == bool(self.order),
      f'init_from: got {self.init_from!r} with order {list(self.order)}, '
      'expected either a checkpoint or stages to run',
    )
    check_demonstrations(self.stages, self.order, self.demonstrations)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationConfig:
  """The whole chain.

  Attributes:
    model: the architecture.
    base: where everything starts.
    domains: by name; those without sources are reported as such.
    specialist_sft: the cold start of a specialist.
    specialist_rl: its RL.
    rejection: what specialists write.
    student_sft: of the base on all that specialists wrote.
    mixed_rl: one stage over all domains and modes, from the student.
    evaluation: of all models on the same held-out problems.
    max_batch: answers that are sampled at a time, outside of RL.
    checkpoint: of every training stage.
    seed: of everything.
  """

  model: ModelConfig
  base: BaseConfig
  domains: dict[str, SpecialistDomain]
  specialist_sft: SFTConfig
  specialist_rl: RLStepConfig
  rejection: RejectionConfig
  student_sft: SFTConfig
  mixed_rl: RLStepConfig
  evaluation: PairedEvaluationConfig = dataclasses.field(
    default_factory=PairedEvaluationConfig
  )
  max_batch: int = 256
  checkpoint: CheckpointConfig = dataclasses.field(
    default_factory=CheckpointConfig
  )
  seed: int = 0

  def __post_init__(self):
    check_types(self)
    check_at_least(self, 1, 'max_batch')
    for name, domain in self.domains.items():
      require(
        name in SPECIALISED_DOMAINS,
        f'domains: got {name!r}, expected one of {list(SPECIALISED_DOMAINS)}',
      )
      require(
        isinstance(domain, SpecialistDomain),
        f'domains.{name}: got {domain!r}, expected a SpecialistDomain',
      )
    require(
      len(self.pairs) > 0,
      'domains: got none with sources, expected at least one',
    )
    for name in ('specialist_rl', 'mixed_rl'):
      longest = getattr(self, name).rollout.max_new_tokens
      for domain, settings in self.domains.items():
        own = settings.max_new_tokens or longest
        require(
          own <= longest,
          f'domains.{domain}.max_new_tokens: got {own}, expected at most '
          f'{name}.rollout.max_new_tokens {longest}',
        )
    self.model.require_indexer()
    if self.base.order:
      # Refuses stages that do not fit each other.
      self.base_run('')

  @property
  def pairs(self) -> tuple[tuple[str, Mode], ...]:
    """Every (domain, mode) that has a specialist."""
    return tuple(
      (name, mode)
      for name, domain in self.domains.items()
      if domain.sources
      for mode in domain.modes
    )

  def max_new_tokens(self, domain: str) -> int:
    """Longest response of a domain."""
    own = self.domains[domain].max_new_tokens
    return own or self.specialist_rl.rollout.max_new_tokens

  def base_run(self, demonstrations: str) -> RunConfig:
    """The recipe that makes the base.

    Args:
      demonstrations: directory in which they lie as NAME.jsonl.

    Raises:
      ValueError: for stages that do not fit each other.
    """
    return RunConfig(
      model=self.model,
      stages=placed(self.base.stages, demonstrations),
      order=self.base.order,
      seed=self.seed,
      checkpoint=self.checkpoint,
      evaluation=EvaluationConfig(every_steps=0),
    )

  @property
  def trained_model(self) -> ModelConfig:
    """The architecture after the base's stages: YaRN and k follow them."""
    if not self.base.order:
      return self.model
    return self.base_run('').stage_model(self.base.order[-1])
