r"""V3.2-Speciale at laptop scale: derivations that are written and checked.

Paper: arXiv:2512.02556, section 3.3: reasoning data only, a reduced length
penalty, and DeepSeekMath-V2's data and rewards for proofs (arXiv:2511.22570).
Four roles share one model: it writes derivations and says what is wrong with
them, mends them, checks those of others, and judges checks (docs/speciale.md).

    python experiments/rl.py --workdir=runs/speciale \
      --config=experiments/configs/speciale.py:cpu

Presets:
  smoke      a few steps of everything: does it run? A minute.
  cpu        thinking, small length penalty, long budget: the Speciale way.
  cpu_plain  the same with the length penalty and budget of the plain model.
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

ROLES = {
  'speciale/proof': 3.0,
  'speciale/refinement': 1.0,
  'speciale/review': 3.0,
  'speciale/meta': 1.0,
}
"""Share of the prompts of each role."""


def get_config(preset: str = 'cpu'):
  """The ConfigDict of a preset; see the module's docstring."""
  known = {'smoke': smoke, 'cpu': cpu, 'cpu_plain': cpu_plain}
  if preset not in known:
    raise ValueError(f'preset: got {preset!r}, expected one of {list(known)}')
  return flags.to_config_dict(known[preset]())


def adam(peak: float, **more) -> OptimizerConfig:
  """AdamW without decay."""
  return OptimizerConfig(peak_learning_rate=peak, weight_decay=0.0, **more)


def sources(**size) -> tuple[ProblemSourceConfig, ...]:
  """All roles over tasks of one size."""
  return tuple(
    ProblemSourceConfig(
      name=name, options={'mode': 'thinking', **size}, weight=weight
    )
    for name, weight in ROLES.items()
  )


def run(
  *,
  model: ModelConfig,
  size: dict,
  prompt: int,
  new: int,
  penalty: float,
  buffer: int,
  demonstrations: int,
  base_steps: int,
  warmup_steps: int,
  cold_steps: int,
  rows: int,
  batches: int,
  prompts: int,
  group: int,
  problems: int,
) -> RLConfig:
  """A whole run; `penalty` and `new` are what makes it Speciale or plain."""
  parts = sources(**size)
  data = DataConfig(
    seq_len=prompt + new,
    batch_size=rows,
    sources=(
      SourceConfig(kind='conversations', path=DEMONSTRATIONS + 'roles'),
    ),
    held_out_fraction=0.0,
  )
  return RLConfig(
    model=model,
    batches=batches,
    domains={'mathematics': DomainConfig(sources=parts, modes=('thinking',))},
    demonstrations={
      'roles': tuple(
        DemonstrationConfig(
          source=part,
          count=int(demonstrations * ROLES[part.name]),
          mode='thinking',
        )
        for part in parts
      )
    },
    stages={
      'base': StageConfig(
        kind='pretrain',
        steps=base_steps,
        data=data,
        optimizer=adam(
          3e-3,
          warmup_steps=min(20, base_steps),
          schedule='linear',
          final_fraction=0.1,
        ),
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
        optimizer=adam(3e-4, warmup_steps=min(5, cold_steps)),
        indexer_optimizer=adam(1e-3),
      ),
    },
    order=('base', 'dense_warmup', 'cold_start'),
    rollout=RolloutConfig(
      prompts_per_batch=prompts,
      group_size=group,
      max_new_tokens=new,
      max_batch=prompts * group,
      prefill_rows=prompts * group,
      prefill_chunk=64,
      page_size=16,
      decode_steps=16,
    ),
    rewards=RewardConfig(
      # The reward algebra's own value, not a 0 or 1 made of it.
      default=DomainReward(
        threshold=0.0, length_penalty=penalty, length_buffer=buffer
      ),
      workers=0,
    ),
    grpo=GRPOConfig(kl_strength=1e-3),
    update=UpdateConfig(
      minibatches=2,
      row_tokens=prompt + new,
      max_prompt_tokens=prompt,
      optimizer=adam(3e-4),
      indexer_optimizer=adam(1e-3),
      reference_every=20,
    ),
    evaluation=RLEvaluationConfig(
      problems=problems, every_batches=20, problems_on_the_way=min(64, problems)
    ),
    checkpoint=CheckpointConfig(every_steps=20),
  )


def byte_model(**sizes) -> ModelConfig:
  """About 0.7M parameters over bytes."""
  changes: dict = {
    'vocab_size': 272,
    'index_topk': 48,
    'max_position_embeddings': 512,
    **sizes,
  }
  return dataclasses.replace(presets.cpu(), **changes)


def smoke() -> RLConfig:
  """Everything once, a few steps each."""
  return run(
    model=byte_model(hidden_size=32, num_hidden_layers=2, index_topk=8),
    size={'kinds': ('compute',), 'numbers': 2, 'largest': 4},
    prompt=96,
    new=16,
    penalty=0.05,
    buffer=8,
    demonstrations=20,
    base_steps=3,
    warmup_steps=2,
    cold_steps=2,
    rows=4,
    batches=2,
    prompts=4,
    group=2,
    problems=4,
  )


def cpu() -> RLConfig:
  """Reduced length penalty, longer budget."""
  return run(
    model=byte_model(),
    size={'kinds': ('compute',), 'numbers': 3, 'largest': 5},
    prompt=128,
    new=96,
    penalty=0.05,
    buffer=32,
    demonstrations=2000,
    base_steps=600,
    warmup_steps=60,
    cold_steps=100,
    rows=32,
    batches=60,
    prompts=16,
    group=8,
    problems=256,
  )


def cpu_plain() -> RLConfig:
  """The penalty of the plain model: ten times as much, from half as long on."""
  plain = cpu()
  reward = dataclasses.replace(
    plain.rewards.default, length_penalty=0.5, max_length=64
  )
  return dataclasses.replace(
    plain,
    rewards=dataclasses.replace(plain.rewards, default=reward),
    rollout=dataclasses.replace(plain.rollout, max_new_tokens=64),
  )
