"""The same training on one device and on many.

A small model goes through pretrain, dense warm-up and sparse training; each
stage starts from the one before. Run it under `double_precision` to tell a
wrong layout from rounding.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from dsv32_jax.config.data import DataConfig
from dsv32_jax.config.model import ModelConfig
from dsv32_jax.config.training import MeshConfig, OptimizerConfig, StageConfig
from dsv32_jax.modules.moe import ROUTER_BIAS
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.sharding import mesh as mesh_lib
from dsv32_jax.sharding import parallel as parallel_lib
from dsv32_jax.sharding import specs
from dsv32_jax.training import compiled_step, optimizer, stages, step
from dsv32_jax.training import state as state_lib
from dsv32_jax.training.batch import Batch
from tests.support import tiny_configs

STAGES = ('pretrain', 'dense_warmup', 'sparse_training')
LENGTH = 40
# One whole row, packed ones, padding, an empty row.
DOCUMENTS = (
  [40], [21, 19], [5], [3, 30], [1, 2, 8, 11], [], [39], [10, 10, 10],
)  # fmt: skip


def config(**changes: Any) -> ModelConfig:
  """A dense layer, a MoE layer and MTP; every cut dim divides by 8."""
  sizes: dict[str, Any] = {
    'num_nextn_predict_layers': 1,
    'num_attention_heads': 4,
    'q_lora_rank': 16,
    'n_group': 4,
    'topk_group': 2,
    'index_topk': 5,
  }
  return tiny_configs.config(**(sizes | changes))


@dataclasses.dataclass(frozen=True)
class Result:
  """What a stage left.

  Attributes:
    state: the training state, whole numpy arrays.
    lines: metrics, one dict a step.
    shard_shapes: of the parameters on one device.
  """

  state: Any
  lines: list[dict[str, np.ndarray]]
  shard_shapes: Any


def train(
  cfg: ModelConfig,
  mesh: MeshConfig | None,
  *,
  kinds: tuple[str, ...] = STAGES,
  steps: int = 20,
  micro_batches: int = 1,
  skewed: bool = False,
  dtype: Any = np.float32,
) -> dict[str, Result]:
  """Trains through stages; `mesh` None is one device.

  Args:
    cfg: the model.
    mesh: devices and rules.
    kinds: stages.
    steps: a stage.
    micro_batches: parts of a batch.
    skewed: router biases send every token to the first experts.
    dtype: of parameters.
  """
  parallel = None if mesh is None else mesh_lib.make_parallel(mesh)
  model = DeepSeekV32(cfg)
  variables = _variables(model, skewed=skewed, dtype=dtype)
  if parallel is not None:
    shapes = state_lib.variable_shapes(model, parallel)
    variables = jax.tree.map(
      lambda leaf, shape: jax.device_put(leaf, shape.sharding),
      variables,
      shapes,
    )
  found = {}
  with parallel_lib.use(parallel):
    for kind in kinds:
      result, variables = _stage(
        model, parallel, variables, kind, steps, micro_batches
      )
      found[kind] = result
  return found


def _variables(model: DeepSeekV32, *, skewed: bool, dtype: Any) -> dict:
  shapes = state_lib.variable_shapes(model)
  shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes
  )
  variables = tiny_configs.random_tree(shapes)
  if skewed:
    experts = model.cfg.n_routed_experts
    bias = np.where(np.arange(experts) < model.cfg.num_experts_per_tok, 9.0, 0)
    variables[ROUTER_BIAS] = jax.tree.map(
      lambda leaf: jax.numpy.asarray(
        np.broadcast_to(bias, leaf.shape), leaf.dtype
      ),
      variables[ROUTER_BIAS],
    )
  return variables


def _stage(model, parallel, variables, kind, steps, micro_batches):
  settings = OptimizerConfig(peak_learning_rate=2e-3)
  stage_config = StageConfig(
    kind=kind,
    steps=steps,
    data=DataConfig(seq_len=LENGTH, batch_size=len(DOCUMENTS)),
    init_from=None if kind == 'pretrain' else 'before',
    optimizer=settings,
    indexer_optimizer=settings,
    micro_batches=micro_batches,
  )
  stage = stages.build(stage_config, model.cfg)
  tx = optimizer.build(stage_config, stage)
  shardings = None
  if parallel is not None:
    shardings = specs.of_leaves(variables['params'])
  state = state_lib.create(variables, stage, tx, parallel)
  state = compiled_step.place_state(state, parallel)
  train_step = step.make_train_step(model, stage, tx, shardings)
  placed = jax.tree.map(lambda leaf: leaf.sharding, state)
  compiled = tiny_configs.jit(train_step, out_shardings=(placed, None))
  key = jax.device_put(jax.random.key(1), compiled_step.whole(parallel))
  lines = []
  for number in range(steps):
    rows = tiny_configs.rows(DOCUMENTS, length=LENGTH, seed=number)
    batch = Batch.from_numpy(compiled_step.place_rows(rows, parallel))
    state, metrics = compiled(state, batch, key)
    lines.append(jax.tree.map(np.asarray, metrics))
  result = Result(
    state=jax.tree.map(np.asarray, state),
    lines=lines,
    shard_shapes=jax.tree.map(
      lambda leaf: leaf.sharding.shard_shape(leaf.shape), state.params
    ),
  )
  return result, state.variables
