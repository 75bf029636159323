r"""Mixed RL in one stage (arXiv:2512.02556, section 3), at laptop scale and up.

python experiments/rl.py --workdir=runs/rl \
      --config=experiments/configs/mixed_rl.py:cpu
"""

import dataclasses

from dsv32_jax.config import presets
from dsv32_jax.config.data import DataConfig, SourceConfig
from dsv32_jax.config.model import ModelConfig
from dsv32_jax.config.rl import (
  DEMONSTRATIONS,
  DemonstrationConfig,
  DomainConfig,
  GRPOConfig,
  ProblemSourceConfig,
  RLConfig,
  RLEvaluationConfig,
  RolloutConfig,
  UpdateConfig,
)
from dsv32_jax.config.training import (
  CheckpointConfig,
  OptimizerConfig,
  StageConfig,
)
from dsv32_jax.training import flags


def get_config(preset: str = 'cpu'):
  """The ConfigDict of a preset; see the module's docstring."""
  known = {'smoke': smoke, 'cpu': cpu}
  if preset not in known:
    raise ValueError(f'preset: got {preset!r}, expected one of {list(known)}')
  return flags.to_config_dict(known[preset]())


def adam(peak: float, **more) -> OptimizerConfig:
  """AdamW without decay."""
  return OptimizerConfig(peak_learning_rate=peak, weight_decay=0.0, **more)


def conversations(name: str, *, seq_len: int, batch_size: int) -> DataConfig:
  """Rows of the demonstrations of that name."""
  return DataConfig(
    seq_len=seq_len,
    batch_size=batch_size,
    sources=(SourceConfig(kind='conversations', path=DEMONSTRATIONS + name),),
    held_out_fraction=0.0,
  )


def gym(family: str, **options) -> ProblemSourceConfig:
  """A family of reasoning-gym in few bytes."""
  return ProblemSourceConfig(
    name=f'gym/{family}', options={'wording': 'short', **options}
  )


def byte_model(**sizes) -> ModelConfig:
  """A small model over bytes; k is below every sequence's length."""
  return dataclasses.replace(
    presets.cpu(),
    **{
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
      'index_n_heads': 4,
      'index_head_dim': 16,
      'index_topk': 12,
      'max_position_embeddings': 64,
      **sizes,
    },
  )


def smoke() -> RLConfig:
  """Everything once, a few steps each: does it run? A minute."""
  rows = {'seq_len': 48, 'batch_size': 8}
  source = gym('chain_sum', max_digits=1)
  return RLConfig(
    model=byte_model(hidden_size=32, num_hidden_layers=2, index_topk=8),
    batches=3,
    domains={
      'mathematics': DomainConfig(sources=(source,)),
      'logical_reasoning': DomainConfig(
        sources=(gym('isomorphic_strings', max_string_length=3),)
      ),
    },
    demonstrations={'start': (DemonstrationConfig(source=source, count=200),)},
    stages={
      'base': StageConfig(
        kind='pretrain',
        steps=4,
        data=conversations('start', **rows),
        optimizer=adam(3e-3),
      ),
      'cold_start': StageConfig(
        kind='sft',
        init_from='base',
        steps=2,
        data=conversations('start', **rows),
        optimizer=adam(1e-3),
        indexer_optimizer=adam(1e-3),
      ),
    },
    order=('base', 'cold_start'),
    rollout=RolloutConfig(
      prompts_per_batch=4,
      group_size=4,
      top_p=0.95,
      max_new_tokens=6,
      max_batch=16,
      prefill_rows=16,
      prefill_chunk=32,
      page_size=16,
      decode_steps=6,
    ),
    grpo=GRPOConfig(domain_kl_strength={'mathematics': 1e-4}),
    update=UpdateConfig(
      minibatches=2,
      row_tokens=48,
      max_prompt_tokens=28,
      optimizer=adam(1e-3),
      indexer_optimizer=adam(1e-3),
      reference_every=2,
    ),
    evaluation=RLEvaluationConfig(
      problems=8, every_batches=2, problems_on_the_way=4
    ),
    checkpoint=CheckpointConfig(every_steps=1),
  )


def cpu() -> RLConfig:
  """To be tuned."""
  rows = {'seq_len': 48, 'batch_size': 32}
  words = gym('spell_backward', min_word_len=3, max_word_len=5)
  sums = gym('chain_sum', max_digits=1)
  return RLConfig(
    model=byte_model(),
    batches=200,
    domains={
      'logical_reasoning': DomainConfig(sources=(words,), weight=7.0),
      'mathematics': DomainConfig(sources=(sums,)),
    },
    demonstrations={
      'start': (
        DemonstrationConfig(source=words, count=7000),
        DemonstrationConfig(source=sums, count=1000),
      )
    },
    stages={
      'base': StageConfig(
        kind='pretrain',
        steps=80,
        data=conversations('start', **rows),
        optimizer=adam(3e-3, warmup_steps=20),
      ),
      'cold_start': StageConfig(
        kind='sft',
        init_from='base',
        steps=30,
        data=conversations('start', **rows),
        optimizer=adam(1e-3),
        indexer_optimizer=adam(3e-3),
      ),
    },
    order=('base', 'cold_start'),
    rollout=RolloutConfig(
      prompts_per_batch=64,
      group_size=8,
      max_new_tokens=7,
      max_batch=128,
      prefill_rows=128,
      prefill_chunk=32,
      page_size=32,
      decode_steps=6,
    ),
    grpo=GRPOConfig(),
    update=UpdateConfig(
      minibatches=2,
      row_tokens=46,
      max_prompt_tokens=17,
      optimizer=adam(3e-4, warmup_steps=10, b2=0.98),
      indexer_optimizer=adam(1e-3, b2=0.98),
      reference_every=50,
    ),
    evaluation=RLEvaluationConfig(
      domains=('logical_reasoning',),
      problems=512, every_batches=25, problems_on_the_way=128
    ),
    checkpoint=CheckpointConfig(every_steps=50),
  )
