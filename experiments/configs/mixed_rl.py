r"""Mixed RL in one stage (arXiv:2512.02556, section 3), at laptop scale and up.

    python experiments/rl.py --workdir=runs/rl \
      --config=experiments/configs/mixed_rl.py:cpu

Presets:
  smoke    everything once: does it run? A minute.
  cpu      0.46M parameters over bytes reverse words: cold start, then RL. Two
           cores.
  r1_zero  the same straight from the base model, without SFT (R1-Zero's way).
  mini     `mini`, three domains in both modes: one GPU.
  small    `small`, 512 responses of up to 4096 tokens a batch: one H100.

V3.2 gives no sizes for its RL; where R1 does (32 prompts of 16 responses,
learning rate 3e-6, KL strength 1e-3), `small` has them.
"""

import dataclasses
from typing import Any

from dsv32_jax.config import presets
from dsv32_jax.config.data import DataConfig, SourceConfig, TokenizerConfig
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
  OptimizerConfig,
  StageConfig,
)
from dsv32_jax.training import flags


def get_config(preset: str = 'cpu'):
  """The ConfigDict of a preset; see the module's docstring."""
  known = {
    preset.__name__: preset for preset in (smoke, cpu, r1_zero, mini, small)
  }
  if preset not in known:
    raise ValueError(f'preset: got {preset!r}, expected one of {list(known)}')
  return flags.to_config_dict(known[preset]())


def adam(peak: float, **more: Any) -> OptimizerConfig:
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


def gym(family: str, **options: Any) -> ProblemSourceConfig:
  """A family of reasoning-gym in few bytes."""
  return ProblemSourceConfig(
    name=f'gym/{family}', options={'wording': 'short', **options}
  )


def byte_model(**sizes: Any) -> ModelConfig:
  """A small model over bytes; k is below every sequence's length."""
  fields: dict[str, Any] = {
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
  }
  return dataclasses.replace(presets.cpu(), **(fields | sizes))


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
        sources=(gym('spell_backward', min_word_len=3, max_word_len=3),)
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
  """Reverse words and add digits; words are what is evaluated."""
  words = gym('spell_backward', min_word_len=3, max_word_len=5)
  sums = gym('chain_sum', max_digits=1)
  data = conversations('start', seq_len=48, batch_size=32)
  # Deliberately short: it knows the form, and about one word in ten.
  stages = {
    'base': StageConfig(
      kind='pretrain',
      steps=110,
      data=data,
      optimizer=adam(
        3e-3, warmup_steps=20, schedule='linear', final_fraction=0.1
      ),
    ),
    'dense_warmup': StageConfig(
      kind='dense_warmup',
      init_from='base',
      steps=30,
      data=dataclasses.replace(data, seed=1),
      indexer_optimizer=adam(3e-3),
    ),
    'cold_start': StageConfig(
      kind='sft',
      init_from='dense_warmup',
      steps=20,
      data=dataclasses.replace(data, seed=2),
      optimizer=adam(3e-4, warmup_steps=5),
      indexer_optimizer=adam(1e-3),
    ),
  }
  return RLConfig(
    model=byte_model(),
    batches=180,
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
    stages=stages,
    order=tuple(stages),
    # Few of the responses are right, and fewer wrong in one letter only: small
    # batches give gradients that are mostly noise.
    rollout=RolloutConfig(
      prompts_per_batch=128,
      group_size=8,
      max_new_tokens=7,
      max_batch=256,
      prefill_rows=256,
      prefill_chunk=32,
      page_size=32,
      decode_steps=6,
    ),
    grpo=GRPOConfig(domain_kl_strength={'mathematics': 0.0}),
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
      problems=1000,
      every_batches=20,
      problems_on_the_way=256,
    ),
    checkpoint=CheckpointConfig(every_steps=50),
  )


def r1_zero() -> RLConfig:
  """RL straight from a base model, without SFT.

  The base has read answers among its documents with dense attention; warm-up
  gives it an indexer, and RL does the rest.
  """
  config = cpu()
  stages = {name: config.stages[name] for name in ('base', 'dense_warmup')}
  stages['base'] = dataclasses.replace(stages['base'], steps=140)
  return dataclasses.replace(config, stages=stages, order=tuple(stages))


def text_stages(
  demonstrations: str,
  *,
  steps: tuple[int, int, int],
  seq_len: int,
  batch_size: int,
  peak: float,
  **more: Any,
) -> dict[str, StageConfig]:
  """Pretraining on program text, dense warm-up, SFT on demonstrations."""
  tokenizer = TokenizerConfig(kind='bpe')
  text = DataConfig(seq_len=seq_len, batch_size=batch_size, tokenizer=tokenizer)
  chats = dataclasses.replace(
    conversations(demonstrations, seq_len=seq_len, batch_size=batch_size),
    tokenizer=tokenizer,
  )
  return {
    'base': StageConfig(
      kind='pretrain',
      steps=steps[0],
      data=text,
      optimizer=adam(peak, warmup_steps=100),
      **more,
    ),
    'dense_warmup': StageConfig(
      kind='dense_warmup',
      init_from='base',
      steps=steps[1],
      data=text,
      indexer_optimizer=adam(1e-3),
      **more,
    ),
    'cold_start': StageConfig(
      kind='sft',
      init_from='dense_warmup',
      steps=steps[2],
      data=chats,
      optimizer=adam(peak / 3),
      indexer_optimizer=adam(1e-3),
      **more,
    ),
  }


def reasoning(count: int, **options: Any) -> dict[str, Any]:
  """Domains with sources that work offline, both modes, and a cold start."""
  sources = {
    'mathematics': ProblemSourceConfig(name='mathematics', options=options),
    'logical_reasoning': ProblemSourceConfig(
      name='logic', options={'family': 'mixed', **options}
    ),
    'programming': ProblemSourceConfig(name='programming', options=options),
  }
  modes = ('thinking', 'chat')
  return {
    'domains': {
      name: DomainConfig(sources=(source,), modes=modes)
      for name, source in sources.items()
    },
    'demonstrations': {
      'start': tuple(
        DemonstrationConfig(source=source, count=count, mode=mode)
        for source in sources.values()
        for mode in modes
      )
    },
  }


def mini() -> RLConfig:
  """28M parameters, three domains in both modes; one GPU."""
  stages = text_stages(
    'start', steps=(3000, 300, 300), seq_len=1024, batch_size=64, peak=1e-3
  )
  return RLConfig(
    model=dataclasses.replace(presets.mini(), index_topk=128),
    batches=400,
    **reasoning(4000),
    stages=stages,
    order=tuple(stages),
    rollout=RolloutConfig(
      prompts_per_batch=32,
      group_size=16,
      top_p=0.95,
      top_k=256,
      max_new_tokens=256,
      precision='bfloat16',
      max_batch=256,
      decode_steps=16,
      chunk_prompts=16,
    ),
    rewards=RewardConfig(
      default=DomainReward(
        format_weight=0.1,
        language_weight=0.1,
        length_penalty=0.2,
        length_buffer=64,
      ),
      workers=8,
    ),
    grpo=GRPOConfig(domain_kl_strength={'mathematics': 0.0}),
    update=UpdateConfig(
      minibatches=4,
      micro_batches=2,
      max_prompt_tokens=256,
      optimizer=adam(1e-5, warmup_steps=20),
      indexer_optimizer=adam(1e-4),
      reference_every=100,
    ),
    evaluation=RLEvaluationConfig(problems=1000, every_batches=25),
  )


def small() -> RLConfig:
  """423M parameters, 512 responses of up to 4096 tokens a batch; one H100."""
  model = dataclasses.replace(presets.small(), query_chunk=512)
  stages = text_stages(
    'start',
    steps=(2000, 200, 200),
    seq_len=4096,
    batch_size=16,
    peak=3e-4,
    micro_batches=4,
  )
  return RLConfig(
    model=model,
    batches=200,
    **reasoning(4000),
    stages=stages,
    order=tuple(stages),
    rollout=RolloutConfig(
      prompts_per_batch=32,
      group_size=16,
      top_p=0.95,
      top_k=256,
      max_new_tokens=3584,
      precision='bfloat16',
      max_batch=256,
      decode_steps=32,
      run_ahead=True,
      least_rows=64,
      prefill_rows=8,
      release_caches=True,
      chunk_prompts=16,
    ),
    rewards=RewardConfig(
      default=DomainReward(
        format_weight=0.1,
        language_weight=0.1,
        length_penalty=0.2,
        length_buffer=512,
      ),
      workers=8,
    ),
    # K keys a layer and token would be 34 GB a batch.
    grpo=GRPOConfig(
      keep_selection=False, domain_kl_strength={'mathematics': 0.0}
    ),
    update=UpdateConfig(
      minibatches=4,
      micro_batches=32,
      row_tokens=4096,
      logits_chunk=1024,
      max_prompt_tokens=512,
      optimizer=adam(3e-6, warmup_steps=20),
      indexer_optimizer=adam(1e-5),
    ),
    evaluation=RLEvaluationConfig(problems=500, every_batches=20),
    checkpoint=CheckpointConfig(every_steps=20),
  )
