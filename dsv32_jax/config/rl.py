"""Configuration of reinforcement learning: rollouts, rewards, objective, loop.

Source: arXiv:2512.02556, section 3 ("scalable RL protocol", eq. 5-9, and mixed
RL). The paper gives no number for any of these; where a default has a source it
is named.
"""

import dataclasses
from typing import Literal

from dsv32_jax.config.checks import check_at_least, require
from dsv32_jax.config.model import ModelConfig, check_types
from dsv32_jax.config.problems import (
  DEMONSTRATIONS,
  DemonstrationConfig,
  DomainConfig,
)
from dsv32_jax.config.rewards import RewardConfig
from dsv32_jax.config.rollout import MOST_KEPT, RolloutConfig
from dsv32_jax.config.training import (
  CheckpointConfig,
  EvaluationConfig,
  MeshConfig,
  OptimizerConfig,
  RunConfig,
  StageConfig,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPOConfig:
  """The objective (eq. 5-9); every stabiliser has its own switch.

  Attributes:
    clip_epsilon: the ratio is clipped to 1 -+ this (R1: 10, so that it rarely
      binds; most public code: 0.2).
    kl_strength: beta of domains that `domain_kl_strength` does not name (R1:
      1e-3).
    domain_kl_strength: beta of a domain; "mathematics works with a weak KL
      penalty or none".
    unbiased_kl: correct the KL estimate by the differentiated ratio (eq. 7);
      False is plain K3.
    off_policy_sequence_mask: leave responses of negative advantage that the
      policy has moved away from out of the policy term (eq. 8-9).
    mask_delta: mean log-ratio of sampler to policy above which such a response
      is left out.
    keep_routing: replay the experts that were chosen while sampling.
    keep_sampling_mask: normalise over the token sets that were sampled from.
    keep_selection: replay the keys that the indexer selected while sampling.
    kl_over: the KL term's log-probabilities over the 'kept' sets or over the
      whole 'vocabulary'. Without keep_sampling_mask it is the vocabulary.
    divide_by_std: divide advantages by the group's standard deviation, as the
      first GRPO did; V3.2 does not.
    indexer: 'learns' by its KL on the selected set, or is 'frozen'.
    indexer_kl_coefficient: weight of that KL.
    router_bias_update_rate: gamma of the auxiliary-loss-free balancing; 0
      freezes the router's biases.
  """

  clip_epsilon: float = 0.2
  kl_strength: float = 1e-3
  domain_kl_strength: dict[str, float] = dataclasses.field(default_factory=dict)
  unbiased_kl: bool = True
  off_policy_sequence_mask: bool = True
  mask_delta: float = 0.1
  keep_routing: bool = True
  keep_sampling_mask: bool = True
  keep_selection: bool = True
  kl_over: Literal['kept', 'vocabulary'] = 'kept'
  divide_by_std: bool = False
  indexer: Literal['learns', 'frozen'] = 'learns'
  indexer_kl_coefficient: float = 1.0
  router_bias_update_rate: float = 0.0

  def __post_init__(self):
    check_types(self)
    require(
      self.clip_epsilon > 0,
      f'clip_epsilon: got {self.clip_epsilon}, expected a positive number',
    )
    check_at_least(
      self,
      0,
      'kl_strength',
      'indexer_kl_coefficient',
      'router_bias_update_rate',
    )
    for domain, value in self.domain_kl_strength.items():
      require(
        isinstance(value, (int, float)) and value >= 0,
        f'domain_kl_strength.{domain}: got {value!r}, expected 0 or more',
      )

  def kl_strength_of(self, domain: str) -> float:
    """Beta of a domain."""
    return self.domain_kl_strength.get(domain, self.kl_strength)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLEvaluationConfig:
  """Accuracy on held-out problems.

  Attributes:
    domains: which are evaluated; () takes all that have sources.
    problems: a domain, before the first and after the last step.
    every_batches: rollout batches between evaluations on the way; 0 has none.
    problems_on_the_way: a domain at those.
    samples: responses a problem; pass@1 is their mean.
    temperature: of the draws (V3.2 is evaluated at 1.0); 0 is greedy.
    top_p: of the draws.
    greedy: at the first and last, also report greedy accuracy.
  """

  domains: tuple[str, ...] = ()
  problems: int = 500
  every_batches: int = 10
  problems_on_the_way: int = 128
  samples: int = 1
  temperature: float = 1.0
  top_p: float = 1.0
  greedy: bool = True

  def __post_init__(self):
    check_types(self)
    check_at_least(self, 1, 'problems', 'problems_on_the_way', 'samples')
    check_at_least(self, 0, 'every_batches', 'temperature')
    require(
      0 < self.top_p <= 1,
      f'top_p: got {self.top_p}, expected 0 < top_p <= 1',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateConfig:
  """How a rollout batch becomes optimizer steps.

  Attributes:
    minibatches: steps a rollout batch, each on its own share of the responses
      (R1: 16); more than one makes the later ones off-policy.
    micro_batches: gradient accumulation over this many parts of a minibatch.
    row_tokens: length of a packed row; None takes the longest prompt and
      response there can be, rounded up to a multiple of 16.
    rows: rows a minibatch is packed into; None takes so many that the longest
      responses fit. A minibatch that needs more than the rows given here takes
      that many, which costs one more compilation.
    logits_chunk: tokens of a row whose logits are held at a time; 0 holds all.
    max_prompt_tokens: longest prompt; a longer one is an error.
    optimizer: of the main model (R1: learning rate 3e-6).
    indexer_optimizer: of the indexers.
    reference_every: rollout batches between refreshes of the KL's anchor (R1:
      400 steps); 0 keeps the start.
  """

  minibatches: int = 4
  micro_batches: int = 1
  row_tokens: int | None = None
  rows: int | None = None
  logits_chunk: int = 0
  max_prompt_tokens: int = 1024
  optimizer: OptimizerConfig = dataclasses.field(
    default_factory=lambda: OptimizerConfig(
      peak_learning_rate=3e-6, weight_decay=0.0
    )
  )
  indexer_optimizer: OptimizerConfig = dataclasses.field(
    default_factory=lambda: OptimizerConfig(
      peak_learning_rate=3e-6, weight_decay=0.0
    )
  )
  reference_every: int = 400

  def __post_init__(self):
    check_types(self)
    check_at_least(
      self,
      1,
      'minibatches',
      'micro_batches',
      'row_tokens',
      'rows',
      'max_prompt_tokens',
    )
    check_at_least(self, 0, 'reference_every', 'logits_chunk')


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig:
  """A whole RL run: where it starts, what it samples, how it learns.

  Attributes:
    model: the architecture at the first of `stages`, or of `init_from`.
    batches: rollout batches.
    domains: the mixture, by name.
    init_from: a checkpoint directory or work directory of a stage to start
      from; None runs `stages` in the work directory first.
    stages: pretraining and cold start, for `order`; a recipe without an sft
      stage is RL straight from a base model, R1-Zero's way.
    order: names of the stages to run, the last one is the start of RL.
    demonstrations: what is written for the stages to read, by name: a source
      whose path is 'demonstrations:NAME' reads the one of that name.
    pretraining_flops: FLOPs behind `init_from`; unknown if 0.
    rollout: how responses are sampled.
    rewards: what they earn.
    grpo: the objective.
    update: minibatches and optimizers.
    evaluation: accuracy on held-out problems.
    checkpoint: when training state is saved; steps are optimizer steps.
    mesh: of training.
    rollout_mesh: of sampling; None takes the devices and mesh of training.
    rollout_devices: the last so many devices of the job sample and the others
      train; 0 has both on the same devices.
    seed: of parameters, prompts, draws and minibatches.
  """

  model: ModelConfig
  batches: int
  domains: dict[str, DomainConfig]
  init_from: str | None = None
  stages: dict[str, StageConfig] = dataclasses.field(default_factory=dict)
  order: tuple[str, ...] = ()
  demonstrations: dict[str, tuple[DemonstrationConfig, ...]] = (
    dataclasses.field(default_factory=dict)
  )
  pretraining_flops: float = 0.0
  rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
  rewards: RewardConfig = dataclasses.field(default_factory=RewardConfig)
  grpo: GRPOConfig = dataclasses.field(default_factory=GRPOConfig)
  update: UpdateConfig = dataclasses.field(default_factory=UpdateConfig)
  evaluation: RLEvaluationConfig = dataclasses.field(
    default_factory=RLEvaluationConfig
  )
  checkpoint: CheckpointConfig = dataclasses.field(
    default_factory=CheckpointConfig
  )
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  rollout_mesh: MeshConfig | None = None
  rollout_devices: int = 0
  seed: int = 0

  def __post_init__(self):
    check_types(self)
    check_at_least(self, 1, 'batches')
    check_at_least(self, 0, 'pretraining_flops', 'rollout_devices')
    for name, domain in self.domains.items():
      require(
        isinstance(domain, DomainConfig),
        f'domains.{name}: got {domain!r}, expected a DomainConfig',
      )
    require(
      any(domain.weight > 0 for domain in self.domains.values()),
      'domains: got none with a weight above 0, expected at least one',
    )
    for name in self.evaluation.domains:
      require(
        name in self.domains,
        f'evaluation.domains: got {name!r}, expected names of domains '
        f'{sorted(self.domains)}',
      )
    for name in self.grpo.domain_kl_strength:
      require(
        name in self.domains,
        f'grpo.domain_kl_strength: got {name!r}, expected names of domains '
        f'{sorted(self.domains)}',
      )
    require(
      (self.init_from is None) == bool(self.order),
      f'init_from: got {self.init_from!r} with order {list(self.order)}, '
      'expected either a checkpoint or stages to run',
    )
    for name in self.order:
      self._check_paths(name)
    self._check_sizes()

  def _check_paths(self, stage: str) -> None:
    """Refuses demonstrations that no one writes."""
    require(
      stage in self.stages,
      f'order: got {stage!r}, expected one of {sorted(self.stages)}',
    )
    for source in self.stages[stage].data.sources:
      name = source.path.removeprefix(DEMONSTRATIONS)
      require(
        name == source.path or name in self.demonstrations,
        f'stages.{stage}.data.sources: got path {source.path!r}, expected one '
        f'of {[DEMONSTRATIONS + name for name in self.demonstrations]}',
      )

  def _check_sizes(self) -> None:
    rollout, update = self.rollout, self.update
    responses = rollout.responses_per_batch
    require(
      responses % update.minibatches == 0,
      f'update.minibatches: got {update.minibatches}, expected a divisor of '
      f'the {responses} responses of a rollout batch',
    )
    rows = self.rows
    require(
      not rollout.truncates_too_widely(self.model.vocab_size)
      or not self.grpo.keep_sampling_mask,
      f'rollout.top_k: got None with top_p {rollout.top_p} and a vocabulary of '
      f'{self.model.vocab_size}, expected at most {MOST_KEPT} or '
      'grpo.keep_sampling_mask False (all of a nucleus is recorded)',
    )
    require(
      rows % update.micro_batches == 0,
      f'update.micro_batches: got {update.micro_batches}, expected a divisor '
      f'of the {rows} rows of a minibatch',
    )
    longest = update.max_prompt_tokens + self.max_new_tokens
    require(
      self.row_tokens >= longest,
      f'update.row_tokens: got {self.row_tokens}, expected at least {longest}, '
      'update.max_prompt_tokens and the longest response together',
    )
    model = self.rl_model
    require(
      longest <= model.max_position_embeddings,
      f'rollout.max_new_tokens: got {self.max_new_tokens} after prompts of up '
      f'to {update.max_prompt_tokens}, expected together at most the '
      f"model's max_position_embeddings {model.max_position_embeddings}",
    )
    model.require_indexer()
    require(
      rollout.precision != 'fp8' or model.hidden_size % 16 == 0,
      f"rollout.precision: got 'fp8' for hidden_size {model.hidden_size}, "
      'expected a multiple of 16',
    )

  @property
  def max_new_tokens(self) -> int:
    """Of the longest response of any domain."""
    own = [
      domain.max_new_tokens or self.rollout.max_new_tokens
      for domain in self.domains.values()
    ]
    return max(own)

  @property
  def row_tokens(self) -> int:
    """T of a training row."""
    longest = self.update.max_prompt_tokens + self.max_new_tokens
    return self.update.row_tokens or -(-longest // 16) * 16

  @property
  def rows(self) -> int:
    """B of a minibatch, if its responses fit; else `most_rows`."""
    return self.update.rows or self.most_rows

  @property
  def most_rows(self) -> int:
    """Rows that a minibatch of the longest responses fits into."""
    longest = self.update.max_prompt_tokens + self.max_new_tokens
    # The last token of a response takes no place.
    a_row = self.row_tokens // max(longest - 1, 1)
    micro = self.update.micro_batches
    return -(-self.responses_per_minibatch // (a_row * micro)) * micro

  @property
  def kept_cap(self) -> int | None:
    """Most tokens of a recorded set; None where none is recorded."""
    if not self.rollout.truncates or not self.grpo.keep_sampling_mask:
      return None
    vocab_size = self.model.vocab_size
    return min(self.rollout.top_k or vocab_size, vocab_size)

  @property
  def responses_per_minibatch(self) -> int:
    return self.rollout.responses_per_batch // self.update.minibatches

  @property
  def steps(self) -> int:
    """Optimizer steps in all."""
    return self.batches * self.update.minibatches

  @property
  def rl_model(self) -> ModelConfig:
    """The architecture during RL: YaRN and k follow the stages."""
    if not self.order:
      return self.model
    return self.start_run().stage_model(self.order[-1])

  def start_run(self, demonstrations: str = '') -> RunConfig:
    """The recipe that makes the start of RL.

    Args:
      demonstrations: directory in which they lie as NAME.jsonl.

    Raises:
      ValueError: for stages that do not fit each other.
    """

    def placed(stage: StageConfig) -> StageConfig:
      sources = tuple(
        dataclasses.replace(
          source,
          path=f'{demonstrations}/'
          f'{source.path.removeprefix(DEMONSTRATIONS)}.jsonl',
        )
        if source.path.startswith(DEMONSTRATIONS)
        else source
        for source in stage.data.sources
      )
      data = dataclasses.replace(stage.data, sources=sources)
      return dataclasses.replace(stage, data=data)

    return RunConfig(
      model=self.model,
      stages={name: placed(stage) for name, stage in self.stages.items()},
      order=self.order,
      seed=self.seed,
      mesh=self.mesh,
      checkpoint=self.checkpoint,
      evaluation=EvaluationConfig(every_steps=0),
    )
