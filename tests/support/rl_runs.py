"""A tiny RL run, and processes that do it, which a test may kill at any moment.

`python -m tests.support.rl_runs CACHE` trains in every directory it is told
(`fork_server`), with compiled programs in CACHE.
"""

import functools
import hashlib
import json
import os
import pathlib
import sys
import warnings
from typing import Any

from dsv32_jax.config.data import DataConfig, SourceConfig
from dsv32_jax.config.model import ModelConfig
from dsv32_jax.config.problems import (
  DEMONSTRATIONS,
  DemonstrationConfig,
  DomainConfig,
  ProblemSourceConfig,
)
from dsv32_jax.config.rewards import DomainReward, RewardConfig
from dsv32_jax.config.rl import (
  GRPOConfig,
  RLConfig,
  RLEvaluationConfig,
  UpdateConfig,
)
from dsv32_jax.config.rollout import RolloutConfig
from dsv32_jax.config.training import (
  CheckpointConfig,
  MeshConfig,
  OptimizerConfig,
  StageConfig,
)
from tests.support import fork_server


def config(**changes: Any) -> RLConfig:
  """Two domains, batches in two chunks, drawn one batch ahead; no start yet."""
  sums = source('chain_sum', max_digits=1)
  fields: dict[str, Any] = {
    'model': model(),
    'batches': 4,
    'domains': {
      'mathematics': DomainConfig(sources=(sums,), weight=2.0),
      'logical_reasoning': DomainConfig(
        sources=(source('spell_backward', min_word_len=3, max_word_len=3),)
      ),
    },
    'demonstrations': {'start': (DemonstrationConfig(source=sums, count=60),)},
    'stages': {
      'cold_start': StageConfig(
        kind='sft',
        steps=3,
        data=DataConfig(
          seq_len=32,
          batch_size=8,
          sources=(
            SourceConfig(kind='conversations', path=f'{DEMONSTRATIONS}start'),
          ),
          held_out_fraction=0.0,
        ),
        optimizer=adam(3e-3),
      )
    },
    'order': ('cold_start',),
    'rollout': RolloutConfig(
      prompts_per_batch=4,
      group_size=4,
      top_p=0.95,
      max_new_tokens=5,
      staleness=1,
      chunk_prompts=2,
      max_batch=8,
      prefill_rows=8,
      prefill_chunk=32,
      page_size=16,
      decode_steps=4,
    ),
    # A reward that a random model earns now and then.
    'rewards': RewardConfig(workers=0, default=format_reward()),
    'grpo': GRPOConfig(domain_kl_strength={'mathematics': 1e-2}),
    'update': UpdateConfig(
      minibatches=2,
      row_tokens=64,
      max_prompt_tokens=28,
      optimizer=adam(1e-2),
      indexer_optimizer=adam(1e-2),
      reference_every=2,
    ),
    'evaluation': RLEvaluationConfig(
      problems=4, every_batches=2, problems_on_the_way=4, greedy=False
    ),
    'checkpoint': CheckpointConfig(every_steps=1),
    # Tests have eight devices.
    'mesh': MeshConfig(data=1),
  }
  return RLConfig(**(fields | changes))


def model() -> ModelConfig:
  """One dense and one MoE layer of width 16, over bytes; k is 8."""
  return ModelConfig(
    vocab_size=272,
    hidden_size=16,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    num_attention_heads=2,
    q_lora_rank=12,
    kv_lora_rank=8,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=6,
    intermediate_size=24,
    moe_intermediate_size=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    index_n_heads=4,
    index_head_dim=8,
    index_topk=8,
    max_position_embeddings=64,
    initializer_range=0.2,
    remat='none',
  )


def source(family: str, **options: Any) -> ProblemSourceConfig:
  """A family of reasoning-gym in few bytes."""
  return ProblemSourceConfig(
    name=f'gym/{family}', options={'wording': 'short', **options}
  )


def adam(peak: float) -> OptimizerConfig:
  return OptimizerConfig(peak_learning_rate=peak, weight_decay=0.0)


def format_reward() -> DomainReward:
  return DomainReward(
    format_weight=1.0, length_penalty=0.5, length_buffer=4, threshold=1.0
  )


def digest(workdir: pathlib.Path) -> dict[str, Any]:
  """Last step, a hash over every bit of its state, rewards and accuracies."""
  from dsv32_jax.checkpoints import integrity

  newest = max((workdir / 'checkpoints').glob('step_*'))
  assert integrity.is_sealed(newest)
  assert integrity.damage(newest) is None
  return {
    'step': newest.name,
    'state': _state_hash(newest),
    'lines': [
      {k: v for k, v in line.items() if not _is_time(k)}
      for line in map(
        json.loads,
        (workdir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines(),
      )
    ],
    'evaluations': {
      path.name: path.read_text(encoding='utf-8')
      for path in sorted((workdir / 'evaluation').glob('*.json'))
    },
  }


def _is_time(name: str) -> bool:
  return name.startswith('time/') or name.endswith('_per_s')


def _state_hash(path: pathlib.Path) -> str:
  """Of all arrays of a checkpoint, read without a template."""
  import jax
  import numpy as np
  import orbax.checkpoint as ocp

  checkpointer = ocp.PyTreeCheckpointer()
  with warnings.catch_warnings():
    # Read on the device that wrote it.
    warnings.filterwarnings('ignore', 'Sharding info not provided')
    tree = checkpointer.restore(path / 'state')
  found = hashlib.sha256()
  for place, leaf in jax.tree_util.tree_leaves_with_path(tree):
    found.update(jax.tree_util.keystr(place).encode())
    found.update(np.asarray(leaf).tobytes())
  return found.hexdigest()


def server(cache: pathlib.Path) -> fork_server.Server:
  """Serves runs."""
  # One device, and it compiles for longer than it runs.
  environment = os.environ | {'XLA_FLAGS': '--xla_backend_optimization_level=0'}
  command = [sys.executable, '-m', 'tests.support.rl_runs', str(cache)]
  return fork_server.Server(command, environment)


def _train(cache: pathlib.Path, workdir: pathlib.Path) -> None:
  import jax

  from dsv32_jax.rl import trainer

  # Compiling takes longer than all steps together.
  jax.config.update('jax_compilation_cache_dir', str(cache))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  with open(workdir.with_suffix('.log'), 'a', encoding='utf-8') as log:
    say = functools.partial(print, file=log, flush=True)
    board = functools.partial(_Silent, say)
    trainer.Run(config(), workdir, report=say, display=board).run()


class _Silent:
  """A display that writes what it is told, for when a test fails."""

  def __init__(self, say: Any, **_: Any):
    self._say = say

  def phase(self, name: str, done: int, total: int) -> None:
    if done == total:
      self._say(f'{name} {done}/{total}')

  def update(self, step: int, values: Any) -> None:
    self._say(f'step {step}')

  def close(self) -> None:
    pass


def _serve(cache: pathlib.Path) -> None:
  import reasoning_gym  # noqa: F401

  import dsv32_jax.rl.trainer  # noqa: F401

  fork_server.serve(functools.partial(_train, cache))


if __name__ == '__main__':
  _serve(pathlib.Path(sys.argv[1]))
