"""Configuration of a run: stages, optimizers, checkpoints, evaluation."""

import dataclasses
from typing import Literal

from dsv32_jax.config.checks import require
from dsv32_jax.config.data import DataConfig
from dsv32_jax.config.model import (
  ModelConfig,
  RopeScaling,
  Selector,
  check_types,
)

RuleSetName = Literal[
  'fsdp',
  'fsdp_expert',
  'fsdp_expert_context',
  'fsdp_tensor_expert',
  'decode_expert',
]
StageKind = Literal[
  'pretrain',
  'context_extension',
  'dense_warmup',
  'sparse_training',
  'sft',
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """AdamW with one learning-rate schedule (V3 section 4.2 gives the defaults).

  Attributes:
    peak_learning_rate: after `warmup_steps` of linear warm-up from 0.
    final_fraction: learning rate over the peak where the stage ends, one step
      past the last.
    schedule: shape between the two.
    weight_decay: decoupled; not applied to vectors (norms, biases).
    clip_norm: global norm of this group's gradient; main model and indexer are
      clipped apart (spec section 5.2).
    moment_dtype: type in which both of Adam's moments are kept between steps;
      'bfloat16' halves their memory. They are computed with in float32.
  """

  peak_learning_rate: float = 3e-4
  warmup_steps: int = 0
  final_fraction: float = 1.0
  schedule: Literal['constant', 'linear', 'cosine'] = 'constant'
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0
  moment_dtype: Literal['float32', 'bfloat16'] = 'float32'

  def __post_init__(self):
    check_types(self)
    for name in ('peak_learning_rate', 'eps', 'clip_norm'):
      value = getattr(self, name)
      require(value > 0, f'{name}: got {value}, expected a positive number')
    for name in ('warmup_steps', 'final_fraction', 'weight_decay'):
      value = getattr(self, name)
      require(value >= 0, f'{name}: got {value}, expected 0 or more')
    for name in ('b1', 'b2'):
      value = getattr(self, name)
      require(0 <= value < 1, f'{name}: got {value}, expected 0 <= {name} < 1')


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
  """One stage of a recipe.

  Attributes:
    kind: what trains and on which losses; the paper's stage names.
    init_from: an earlier stage of the recipe, or a checkpoint directory; None
      starts from random parameters.
    steps: optimizer steps.
    data: what it reads; also the shape of a batch.
    optimizer: of the main model (unused while it is frozen).
    indexer_optimizer: of the indexers (unused in stages without indexer loss).
    selector: for sparse_training, which tokens attention reads; 'window' and
      'random' are the controls, 'all' the dense control. For sft, 'indexer' or
      'all'.
    index_topk: selected tokens; None keeps the model's.
    rope_scaling: YaRN from this stage on; None keeps what the start had.
    micro_batches: gradient accumulation over this many equal parts of a batch.
    indexer_kl_coefficient: weight of L^I.
    mtp_loss_weight: lambda of V3 eq. 25.
    router_bias_update_rate: gamma of the auxiliary-loss-free balancing.
    keep_optimizer_state: continue with the moments of `init_from`.
  """

  kind: StageKind
  steps: int
  data: DataConfig
  init_from: str | None = None
  optimizer: OptimizerConfig = dataclasses.field(
    default_factory=OptimizerConfig
  )
  indexer_optimizer: OptimizerConfig = dataclasses.field(
    default_factory=lambda: OptimizerConfig(
      peak_learning_rate=1e-3, weight_decay=0.0
    )
  )
  selector: Selector = 'indexer'
  index_topk: int | None = None
  rope_scaling: RopeScaling | None = None
  micro_batches: int = 1
  indexer_kl_coefficient: float = 1.0
  mtp_loss_weight: float = 0.1
  router_bias_update_rate: float = 1e-3
  keep_optimizer_state: bool = False

  def __post_init__(self):
    check_types(self)
    require(self.steps >= 1, f'steps: got {self.steps}, expected at least 1')
    require(
      self.micro_batches >= 1,
      f'micro_batches: got {self.micro_batches}, expected at least 1',
    )
    require(
      self.index_topk is None or self.index_topk >= 1,
      f'index_topk: got {self.index_topk}, expected at least 1',
    )
    require(
      self.data.batch_size % self.micro_batches == 0,
      f'micro_batches: got {self.micro_batches}, expected a divisor of '
      f'data.batch_size {self.data.batch_size}',
    )
    for name in (
      'indexer_kl_coefficient',
      'mtp_loss_weight',
      'router_bias_update_rate',
    ):
      value = getattr(self, name)
      require(value >= 0, f'{name}: got {value}, expected 0 or more')
    require(
      self.selector == 'indexer'
      or self.kind == 'sparse_training'
      or (self.kind == 'sft' and self.selector == 'all'),
      f'selector: got {self.selector!r} in a {self.kind} stage, expected '
      "'indexer' (only sparse_training has controls, and sft the dense 'all')",
    )
    require(
      self.kind != 'sft' or self.data.has_conversations,
      'data.sources: got no conversations in an sft stage, expected a source '
      "of kind 'conversations' (else nothing tells prompts from replies)",
    )
    require(
      self.kind != 'dense_warmup' or self.init_from is not None,
      'init_from: got None in a dense_warmup stage, expected a trained '
      'checkpoint (an indexer cannot learn from random attention)',
    )
    require(
      not self.keep_optimizer_state or self.init_from is not None,
      'keep_optimizer_state: got True without init_from, expected a stage or '
      'checkpoint to take the state from',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Devices along each mesh axis, and the rules that lay arrays out over them.

  One axis may be -1: it takes the devices that the others leave.

  Attributes:
    rules: a rule set of `dsv32_jax.sharding.rules`.
    data: copies of the model, each with its own rows of a batch.
    fsdp: parameters and rows of a batch are cut over it.
    expert: experts (and rows of a batch) are cut over it.
    context: tokens of a sequence are cut over it.
    tensor: heads and hidden widths are cut over it.
    exchange: how tokens reach the devices of their experts: 'dense' sends
      buffers with room for imbalance whole, on every backend; 'ragged' what is
      filled of them, on GPUs of one host. Results are the same.
  """

  rules: RuleSetName = 'fsdp'
  data: int = -1
  fsdp: int = 1
  expert: int = 1
  context: int = 1
  tensor: int = 1
  exchange: Literal['dense', 'ragged'] = 'dense'

  def __post_init__(self):
    check_types(self)
    names = ('data', 'fsdp', 'expert', 'context', 'tensor')
    for name in names:
      value = getattr(self, name)
      require(
        value == -1 or value >= 1,
        f'mesh.{name}: got {value}, expected -1 or at least 1',
      )
    rest = [name for name in names if getattr(self, name) == -1]
    require(
      len(rest) <= 1,
      f'mesh: got -1 for {" and ".join(rest)}, expected it for at most one',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """When training state is saved.

  Attributes:
    every_steps: a checkpoint each this many steps, and always at the end.
    keep: newest checkpoints kept a stage.
  """

  every_steps: int = 100
  keep: int = 2

  def __post_init__(self):
    check_types(self)
    for name in ('every_steps', 'keep'):
      value = getattr(self, name)
      require(value >= 1, f'checkpoint.{name}: got {value}, expected >= 1')


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
  """What is measured on held-out data, during stages and in the report.

  Attributes:
    every_steps: indexer observability and held-out loss each this many steps
      of a stage; 0 measures at the end of the stage only.
    seq_lens: lengths of the held-out text rows.
    rows: rows a length.
    batch_size: rows evaluated at a time.
    recall_distances: gaps between a key and its query, in tokens.
    recall_rows: rows a distance.
  """

  every_steps: int = 50
  seq_lens: tuple[int, ...] = (256, 512)
  rows: int = 32
  batch_size: int = 8
  recall_distances: tuple[int, ...] = (80, 128, 256, 400)
  recall_rows: int = 16

  def __post_init__(self):
    check_types(self)
    for name in ('rows', 'batch_size', 'recall_rows'):
      value = getattr(self, name)
      require(value >= 1, f'evaluation.{name}: got {value}, expected >= 1')
    require(
      self.every_steps >= 0,
      f'evaluation.every_steps: got {self.every_steps}, expected >= 0',
    )
    for name in ('seq_lens', 'recall_distances'):
      for value in getattr(self, name):
        require(
          type(value) is int and value >= 1,
          f'evaluation.{name}: got {value!r}, expected integers of at least 1',
        )
    require(
      len(self.seq_lens) > 0,
      'evaluation.seq_lens: got none, expected at least one length',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
  """A whole experiment: a model, a recipe of stages, and how to look at it.

  Attributes:
    model: the architecture at the first stage.
    stages: by name; `order` gives the order in which they run.
    order: names of the stages to run.
    seed: of parameters and of data order.
  """

  model: ModelConfig
  stages: dict[str, StageConfig]
  order: tuple[str, ...]
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
    require(len(self.order) > 0, 'order: got none, expected stage names')
    done: list[str] = []
    for name in self.order:
      require(
        name in self.stages,
        f'order: got {name!r}, expected one of {sorted(self.stages)}',
      )
      require(name not in done, f'order: got {name!r} twice, expected once')
      start = self.stages[name].init_from
      if start in self.stages:
        require(
          start in done,
          f'stages.{name}.init_from: got {start!r}, expected a stage that '
          f'comes before {name!r} in order {list(self.order)}',
        )
      self._check_stage(name)
      done.append(name)

  def _check_stage(self, name: str) -> None:
    """Refuses a stage that its model cannot run, before anything is loaded."""
    stage, model = self.stages[name], self.stage_model(name)
    try:
      if stage.kind == 'dense_warmup' or (
        stage.kind in ('sparse_training', 'sft') and stage.selector == 'indexer'
      ):
        model.require_indexer()
      require(
        stage.kind != 'sparse_training'
        or stage.selector == 'all'
        or model.index_topk < stage.data.seq_len,
        f'index_topk: got {model.index_topk}, expected less than '
        f'data.seq_len {stage.data.seq_len} (else sparse training selects '
        'every token)',
      )
    except ValueError as error:
      raise ValueError(f'stages.{name}: {error}') from None

  def stage_model(self, name: str) -> ModelConfig:
    """The architecture during a stage: YaRN and k follow its ancestors."""
    stage = self.stages[name]
    if stage.init_from in self.stages:
      model = self.stage_model(stage.init_from)
    else:
      model = self.model
    changes: dict = {}
    if stage.rope_scaling is not None:
      changes['rope_scaling'] = stage.rope_scaling
    if stage.index_topk is not None:
      changes['index_topk'] = stage.index_topk
    return dataclasses.replace(model, **changes)
