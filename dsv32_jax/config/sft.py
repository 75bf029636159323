"""Configuration of supervised training on conversations."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from dsv32_jax.config.checks import require
from dsv32_jax.config.data import DataConfig, SourceConfig, TokenizerConfig
from dsv32_jax.config.model import ModelConfig, check_types
from dsv32_jax.config.problems import DEMONSTRATIONS, DemonstrationConfig
from dsv32_jax.config.training import (
  CheckpointConfig,
  EvaluationConfig,
  MeshConfig,
  OptimizerConfig,
  RunConfig,
  StageConfig,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig:
  """One sft stage, whatever it starts from and reads.

  Attributes:
    steps: optimizer steps.
    seq_len: T of a packed row; a longer conversation is refused.
    batch_size: rows a step.
    optimizer: of the main model.
    indexer_optimizer: of the indexers.
    router_bias_update_rate: gamma of the auxiliary-loss-free balancing.
  """

  steps: int
  seq_len: int = 256
  batch_size: int = 8
  optimizer: OptimizerConfig = dataclasses.field(
    default_factory=lambda: OptimizerConfig(peak_learning_rate=1e-3)
  )
  indexer_optimizer: OptimizerConfig = dataclasses.field(
    default_factory=lambda: OptimizerConfig(
      peak_learning_rate=1e-3, weight_decay=0.0
    )
  )
  router_bias_update_rate: float = 1e-3

  def __post_init__(self):
    check_types(self)
    for name in ('steps', 'seq_len', 'batch_size'):
      value = getattr(self, name)
      require(value >= 1, f'{name}: got {value}, expected at least 1')
    require(
      self.router_bias_update_rate >= 0,
      f'router_bias_update_rate: got {self.router_bias_update_rate}, expected '
      '0 or more',
    )

  def stage(
    self,
    *,
    init_from: str,
    shares: Mapping[str, float],
    tokenizer: TokenizerConfig,
  ) -> StageConfig:
    """The stage that reads files of conversations, each by its share."""
    return StageConfig(
      kind='sft',
      init_from=init_from,
      steps=self.steps,
      data=DataConfig(
        seq_len=self.seq_len,
        batch_size=self.batch_size,
        tokenizer=tokenizer,
        sources=tuple(
          SourceConfig(kind='conversations', path=path, weight=share)
          for path, share in shares.items()
        ),
        held_out_fraction=0.0,
      ),
      optimizer=self.optimizer,
      indexer_optimizer=self.indexer_optimizer,
      router_bias_update_rate=self.router_bias_update_rate,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTRunConfig:
  """A recipe that ends in SFT, and the demonstrations that it reads.

  Attributes:
    model: the architecture at the first stage.
    stages: by name.
    order: names of the stages to run.
    demonstrations: what is written for the stages to read, by name: a source
      whose path is 'demonstrations:NAME' reads the one of that name.
    seed: of parameters, data order and demonstrations.
  """

  model: ModelConfig
  stages: dict[str, StageConfig]
  order: tuple[str, ...]
  demonstrations: dict[str, tuple[DemonstrationConfig, ...]] = (
    dataclasses.field(default_factory=dict)
  )
  seed: int = 0
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  checkpoint: CheckpointConfig = dataclasses.field(
    default_factory=CheckpointConfig
  )
  evaluation: EvaluationConfig = dataclasses.field(
    default_factory=EvaluationConfig
  )

  def __post_init__(self):
    check_types(self)
    check_demonstrations(self.stages, self.order, self.demonstrations)
    # Refuses stages that do not fit each other.
    self.run('')

  def run(self, demonstrations: str) -> RunConfig:
    """The recipe.

    Args:
      demonstrations: directory in which they lie as NAME.jsonl.
    """
    return RunConfig(
      model=self.model,
      stages=placed(self.stages, demonstrations),
      order=self.order,
      seed=self.seed,
      mesh=self.mesh,
      checkpoint=self.checkpoint,
      evaluation=self.evaluation,
    )

  def with_start(
    self, *, init_from: str | None, conversations: str | None
  ) -> 'SFTRunConfig':
    """The last stage alone, from another checkpoint or on other data.

    Args:
      init_from: a checkpoint; None runs all stages.
      conversations: path of a JSONL file, a directory or a glob pattern that
        takes the place of the last stage's sources; None leaves them.
    """
    name = self.order[-1]
    changes: dict[str, Any] = {}
    if init_from is not None:
      changes['init_from'] = init_from
    stage = dataclasses.replace(self.stages[name], **changes)
    if conversations is not None:
      source = SourceConfig(kind='conversations', path=conversations)
      data = dataclasses.replace(stage.data, sources=(source,))
      stage = dataclasses.replace(stage, data=data)
    return dataclasses.replace(
      self,
      stages={**self.stages, name: stage},
      order=self.order if init_from is None else (name,),
    )


def check_demonstrations(
  stages: Mapping[str, StageConfig],
  order: Sequence[str],
  written: Mapping[str, Any],
) -> None:
  """Refuses stages that read demonstrations which no one writes."""
  for name in order:
    require(
      name in stages,
      f'order: got {name!r}, expected one of {sorted(stages)}',
    )
    for source in stages[name].data.sources:
      asked = source.path.removeprefix(DEMONSTRATIONS)
      require(
        asked == source.path or asked in written,
        f'stages.{name}.data.sources: got path {source.path!r}, expected one '
        f'of {[DEMONSTRATIONS + known for known in written]}',
      )


def placed(
  stages: Mapping[str, StageConfig], directory: str
) -> dict[str, StageConfig]:
  """Stages whose demonstrations lie in a directory."""

  def found(source: SourceConfig) -> SourceConfig:
    name = source.path.removeprefix(DEMONSTRATIONS)
    if name == source.path:
      return source
    return dataclasses.replace(source, path=f'{directory}/{name}.jsonl')

  def moved(stage: StageConfig) -> StageConfig:
    sources = tuple(found(source) for source in stage.data.sources)
    data = dataclasses.replace(stage.data, sources=sources)
    return dataclasses.replace(stage, data=data)

  return {name: moved(stage) for name, stage in stages.items()}
