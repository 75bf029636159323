r"""What the ablations of the stabilisers share (docs/rl_ablations.md).

A byte model learns to spell words backwards. One minibatch a rollout batch, so
that the staleness of a regime counts optimizer steps.

    python experiments/rl_ablations.py --results=runs/ablations \
      --config=experiments/configs/rl_ablations.py:smoke
"""

import dataclasses

from dsv32_jax.config import presets
from dsv32_jax.config.data import DataConfig, SourceConfig
from dsv32_jax.config.model import ModelConfig
from dsv32_jax.config.problems import (
  DEMONSTRATIONS,
  DemonstrationConfig,
  DomainConfig,
  ProblemSourceConfig,
)
from dsv32_jax.config.rewards import RewardConfig
from dsv32_jax.config.rl import (
  GRPOConfig,
  RLConfig,
  RLEvaluationConfig,
  UpdateConfig,
)
from dsv32_jax.config.rollout import RolloutConfig
from dsv32_jax.config.training import OptimizerConfig, StageConfig
from dsv32_jax.training import flags


def get_config(preset: str = 'cpu'):
  """The ConfigDict of a preset."""
  known = {'smoke': smoke, 'cpu': cpu}
  if preset not in known:
    raise ValueError(f'preset: got {preset!r}, expected one of {list(known)}')
  return flags.to_config_dict(known[preset]())


def adam(peak: float, **more) -> OptimizerConfig:
  """AdamW without decay."""
  return OptimizerConfig(peak_learning_rate=peak, weight_decay=0.0, **more)


def model(**sizes) -> ModelConfig:
  """Two MoE layers of 16 experts, and k far below every length.

  Both discrete choices are tight, so that replaying them can matter.
  """
  changes: dict = {
    'vocab_size': 272,
    'hidden_size': 96,
    'num_hidden_layers': 3,
    'q_lora_rank': 48,
    'kv_lora_rank': 32,
    'qk_nope_head_dim': 24,
    'qk_rope_head_dim': 8,
    'v_head_dim': 24,
    'intermediate_size': 192,
    'moe_intermediate_size': 48,
    'n_routed_experts': 16,
    'index_n_heads': 4,
    'index_head_dim': 16,
    'index_topk': 8,
    'max_position_embeddings': 64,
    **sizes,
  }
  return dataclasses.replace(presets.cpu(), **changes)


def run(
  *,
  model: ModelConfig,
  word: tuple[int, int],
  base_steps: int,
  warmup_steps: int,
  cold_steps: int,
  batches: int,
  prompts: int,
  group: int,
  problems: int,
  learning_rate: float,
) -> RLConfig:
  """A whole run on words of so many letters."""
  least, most = word
  source = ProblemSourceConfig(
    name='gym/spell_backward',
    options={'wording': 'short', 'min_word_len': least, 'max_word_len': most},
  )
  data = DataConfig(
    seq_len=48,
    batch_size=32,
    sources=(
      SourceConfig(kind='conversations', path=DEMONSTRATIONS + 'words'),
    ),
    held_out_fraction=0.0,
  )
  new, prompt = most + 2, most + 12
  return RLConfig(
    model=model,
    batches=batches,
    domains={'logical_reasoning': DomainConfig(sources=(source,))},
    demonstrations={
      'words': (DemonstrationConfig(source=source, count=60 * base_steps),)
    },
    stages={
      'base': StageConfig(
        kind='pretrain',
        steps=base_steps,
        data=data,
        optimizer=adam(3e-3, warmup_steps=min(20, base_steps)),
      ),
      'dense_warmup': StageConfig(
        kind='dense_warmup',
        init_from='base',
        steps=warmup_steps,
        data=dataclasses.replace(data, seed=1),
        indexer_optimizer=adam(3e-3),
      ),
      'cold_start': StageConfig(
        kind='sft',
        init_from='dense_warmup',
        steps=cold_steps,
        data=dataclasses.replace(data, seed=2),
        optimizer=adam(3e-4),
        indexer_optimizer=adam(1e-3),
      ),
    },
    order=('base', 'dense_warmup', 'cold_start'),
    rollout=RolloutConfig(
      prompts_per_batch=prompts,
      group_size=group,
      top_k=64,
      max_new_tokens=new,
      max_batch=prompts * group,
      prefill_rows=prompts * group,
      prefill_chunk=32,
      page_size=16,
      decode_steps=new - 1,
    ),
    rewards=RewardConfig(workers=0),
    grpo=GRPOConfig(kl_strength=0.05),
    update=UpdateConfig(
      minibatches=1,
      row_tokens=prompt + new,
      rows=prompts * group,
      max_prompt_tokens=prompt,
      optimizer=adam(learning_rate),
      indexer_optimizer=adam(1e-3),
      reference_every=0,
    ),
    evaluation=RLEvaluationConfig(problems=problems, every_batches=0),
  )


def smoke() -> RLConfig:
  """Does it run? Two minutes for two cells."""
  return run(
    model=model(hidden_size=32, num_hidden_layers=2, n_routed_experts=8),
    word=(3, 4),
    base_steps=4,
    warmup_steps=2,
    cold_steps=2,
    batches=3,
    prompts=2,
    group=2,
    problems=4,
    learning_rate=1e-3,
  )


def cpu() -> RLConfig:
  """A run takes about two minutes on one core, once compiled."""
  return run(
    model=model(),
    word=(3, 5),
    base_steps=105,
    warmup_steps=30,
    cold_steps=20,
    batches=60,
    prompts=64,
    group=8,
    problems=512,
    learning_rate=5e-4,
  )
