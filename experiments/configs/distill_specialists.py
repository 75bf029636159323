r"""Specialist distillation (arXiv:2512.02556, section 3) at laptop scale.

Six specialised domains in two modes. Mathematics, logical reasoning and
programming have problems that a program checks offline; the agent domains come
with their environments. The base is pretrained on worked answers of all
domains, and only briefly: it knows their forms and is poor at each.

    python experiments/distill_specialists.py --workdir=runs/distill \
      --config=experiments/configs/distill_specialists.py:cpu --workers=2

Presets:
  smoke  every step of the chain, hardly trained: does it run? Minutes.
  quick  two domains in one mode each, 0.63M parameters.
  cpu    three domains in both modes, half a million parameters: six
         specialists. Hours on two cores; --workers for more.
"""

import dataclasses
from typing import Any

from dsv32_jax.config import presets
from dsv32_jax.config.data import DataConfig, SourceConfig
from dsv32_jax.config.distillation import (
  SPECIALISED_DOMAINS,
  BaseConfig,
  DistillationConfig,
  PairedEvaluationConfig,
  RejectionConfig,
  RLStepConfig,
  SpecialistDomain,
)
from dsv32_jax.config.model import ModelConfig
from dsv32_jax.config.problems import (
  DEMONSTRATIONS,
  DemonstrationConfig,
  ProblemSourceConfig,
)
from dsv32_jax.config.rl import GRPOConfig, UpdateConfig
from dsv32_jax.config.rollout import RolloutConfig
from dsv32_jax.config.sft import SFTConfig
from dsv32_jax.config.training import (
  CheckpointConfig,
  OptimizerConfig,
  StageConfig,
)
from dsv32_jax.training import flags

_AGENT_DOMAINS = ('general_agent', 'agentic_coding', 'agentic_search')


def get_config(preset: str = 'smoke'):
  """The ConfigDict of a preset; see the module's docstring."""
  known = {'smoke': smoke, 'quick': quick, 'cpu': cpu}
  if preset not in known:
    raise ValueError(f'preset: got {preset!r}, expected one of {list(known)}')
  return flags.to_config_dict(known[preset]())


def adam(peak: float, **more) -> OptimizerConfig:
  """AdamW without decay."""
  return OptimizerConfig(peak_learning_rate=peak, weight_decay=0.0, **more)


def source(name: str, **options) -> ProblemSourceConfig:
  """A source of problems."""
  return ProblemSourceConfig(name=name, options=options)


def byte_model(**sizes: Any) -> ModelConfig:
  """A small model over bytes; k is below the length of most sequences."""
  fields: dict[str, Any] = {
    'vocab_size': 272,
    'index_topk': 24,
    'max_position_embeddings': 128,
    **sizes,
  }
  return dataclasses.replace(presets.cpu(), **fields)


def domains(
  **populated: SpecialistDomain,
) -> dict[str, SpecialistDomain]:
  """The six specialised domains, of which some have problems."""
  missing = dict.fromkeys(SPECIALISED_DOMAINS, 'left out of this preset')
  missing |= dict.fromkeys(_AGENT_DOMAINS, 'its tasks come with environments')
  return {
    name: populated.get(name, SpecialistDomain(unpopulated=why))
    for name, why in missing.items()
  }


def base_data(*, seq_len: int, batch_size: int) -> DataConfig:
  """What the base reads in all its stages."""
  return DataConfig(
    seq_len=seq_len,
    batch_size=batch_size,
    sources=(SourceConfig(kind='conversations', path=f'{DEMONSTRATIONS}base'),),
    held_out_fraction=0.0,
  )


def base_stages(
  data: DataConfig, *, pretrain: int, warmup: int, sparse: int, peak: float
) -> dict[str, StageConfig]:
  """Dense pretraining, then the two stages of continued training."""
  return {
    'pretrain': StageConfig(
      kind='pretrain',
      steps=pretrain,
      data=data,
      optimizer=OptimizerConfig(
        peak_learning_rate=peak,
        warmup_steps=min(40, pretrain),
        schedule='linear',
        final_fraction=0.1,
      ),
    ),
    'dense_warmup': StageConfig(
      kind='dense_warmup',
      init_from='pretrain',
      steps=warmup,
      data=dataclasses.replace(data, seed=1),
      indexer_optimizer=adam(5e-3),
    ),
    'sparse_training': StageConfig(
      kind='sparse_training',
      init_from='dense_warmup',
      steps=sparse,
      data=dataclasses.replace(data, seed=2),
      optimizer=adam(peak / 5),
      indexer_optimizer=adam(1e-3),
    ),
  }


def base_answers_of(
  populated: dict[str, SpecialistDomain], *, count: int, swapped: float = 0.0
) -> dict[str, tuple[DemonstrationConfig, ...]]:
  """The base's demonstrations: so many a domain and mode."""
  return {
    'base': tuple(
      DemonstrationConfig(source=one, count=count, mode=mode, swapped=swapped)
      for domain in populated.values()
      for mode in domain.modes
      for one in domain.sources
    )
  }


def smoke() -> DistillationConfig:
  """Two domains in one mode each, a few steps of everything."""
  populated = {
    'mathematics': SpecialistDomain(
      sources=(source('gym/chain_sum', wording='short', max_digits=1),),
      modes=('thinking',),
      demonstrations=100,
    ),
    'logical_reasoning': SpecialistDomain(
      sources=(
        source(
          'gym/spell_backward', wording='short', min_word_len=3, max_word_len=3
        ),
      ),
      modes=('chat',),
      demonstrations=100,
    ),
  }
  data = base_data(seq_len=64, batch_size=16)
  rl = RLStepConfig(
    batches=2,
    rollout=RolloutConfig(
      prompts_per_batch=4,
      group_size=4,
      top_p=0.95,
      max_new_tokens=24,
      max_batch=16,
      prefill_rows=16,
      prefill_chunk=32,
      page_size=16,
      decode_steps=8,
    ),
    grpo=GRPOConfig(kl_strength=1e-4),
    update=UpdateConfig(
      minibatches=2,
      max_prompt_tokens=24,
      optimizer=adam(3e-4),
      indexer_optimizer=adam(1e-3),
    ),
    evaluate_problems=8,
  )
  sft = SFTConfig(steps=10, seq_len=64, batch_size=16, optimizer=adam(2e-3))
  stages = base_stages(data, pretrain=120, warmup=4, sparse=4, peak=5e-3)
  return DistillationConfig(
    model=byte_model(
      hidden_size=32, num_hidden_layers=2, index_topk=16, index_n_heads=4
    ),
    base=BaseConfig(
      stages=stages,
      order=tuple(stages),
      demonstrations=base_answers_of(populated, count=300, swapped=0.5),
    ),
    domains=domains(**populated),
    specialist_sft=sft,
    specialist_rl=rl,
    rejection=RejectionConfig(prompts=16, samples=16, part_prompts=8),
    student_sft=sft,
    mixed_rl=rl,
    evaluation=PairedEvaluationConfig(problems=16, part_problems=8),
    max_batch=64,
    checkpoint=CheckpointConfig(every_steps=40, keep=1),
  )


def trained(
  model: ModelConfig,
  populated: dict[str, SpecialistDomain],
  *,
  batch_size: int,
  base: tuple[int, int, int],
  base_answers: int,
  sft: int,
  student: int,
  rl: tuple[int, int],
  prompts: int,
) -> DistillationConfig:
  """A chain that learns.

  Args:
    model: the architecture.
    populated: domains with problems.
    batch_size: rows of 96 tokens a step of pretraining and SFT.
    base: steps of its three stages.
    base_answers: worked answers that it sees, a domain and mode.
    sft: steps of a specialist's cold start.
    student: steps of the student's SFT.
    rl: rollout batches of a specialist, and of mixed RL.
    prompts: that specialists answer, a domain and mode.
  """
  shape = {'seq_len': 96, 'batch_size': batch_size}
  pretrain, warmup, sparse = base
  stages = base_stages(
    base_data(**shape),
    pretrain=pretrain,
    warmup=warmup,
    sparse=sparse,
    peak=3e-3,
  )
  falling = OptimizerConfig(
    peak_learning_rate=2e-3,
    warmup_steps=20,
    schedule='linear',
    final_fraction=0.05,
    weight_decay=0.01,
  )

  def reinforced(
    batches: int, optimizer: OptimizerConfig, **truncation: Any
  ) -> RLStepConfig:
    return RLStepConfig(
      batches=batches,
      rollout=RolloutConfig(
        prompts_per_batch=64,
        group_size=8,
        max_new_tokens=36,
        max_batch=256,
        prefill_rows=64,
        prefill_chunk=32,
        page_size=32,
        decode_steps=6,
        **truncation,
      ),
      grpo=GRPOConfig(kl_strength=1e-3, domain_kl_strength={}),
      update=UpdateConfig(
        minibatches=2,
        max_prompt_tokens=28,
        optimizer=optimizer,
        indexer_optimizer=adam(1e-3, b2=0.98),
        reference_every=0,
      ),
      evaluate_problems=256,
    )

  return DistillationConfig(
    model=model,
    base=BaseConfig(
      stages=stages,
      order=tuple(stages),
      demonstrations=base_answers_of(populated, count=base_answers),
    ),
    domains=domains(**populated),
    specialist_sft=SFTConfig(
      steps=sft, optimizer=falling, indexer_optimizer=adam(1e-3), **shape
    ),
    specialist_rl=reinforced(
      rl[0],
      adam(1e-4, warmup_steps=10, b2=0.98),
      top_p=0.95,
      top_k=32,
    ),
    rejection=RejectionConfig(
      prompts=prompts, samples=4, keep_per_prompt=2, part_prompts=500
    ),
    student_sft=SFTConfig(
      steps=student, optimizer=falling, indexer_optimizer=adam(1e-3), **shape
    ),
    # What is left to learn lies in the tails, which a nucleus would cut off;
    # few groups differ in their rewards, and a larger rate is mostly noise.
    mixed_rl=reinforced(
      rl[1],
      adam(
        3e-5, warmup_steps=10, b2=0.98, schedule='linear', final_fraction=0.1
      ),
    ),
    evaluation=PairedEvaluationConfig(problems=2000, part_problems=500),
    max_batch=256,
    checkpoint=CheckpointConfig(every_steps=50, keep=1),
  )


def order(**more) -> SpecialistDomain:
  """Letters to be put in a row by what is told of neighbours."""
  return SpecialistDomain(
    sources=(source('logic', family='order', size=3),),
    demonstrations=4000,
    **more,
  )


def words(**more) -> SpecialistDomain:
  """Expressions in x, spelt out."""
  return SpecialistDomain(
    sources=(source('programming', level='words'),),
    demonstrations=4000,
    **more,
  )


def quick() -> DistillationConfig:
  """Two domains in one mode each."""
  return trained(
    byte_model(
      hidden_size=96, num_hidden_layers=3, index_n_heads=4, index_topk=16
    ),
    {
      'logical_reasoning': order(modes=('thinking',)),
      'programming': words(modes=('chat',)),
    },
    batch_size=16,
    base=(150, 20, 30),
    base_answers=3000,
    sft=250,
    student=400,
    rl=(15, 15),
    prompts=1500,
  )


def cpu() -> DistillationConfig:
  """Three domains in both modes."""
  sums = SpecialistDomain(
    sources=(
      source(
        'gym/chain_sum', wording='short', min_terms=4, max_terms=4, max_digits=1
      ),
    ),
    demonstrations=12000,
    sft_steps=1000,
    distilled_prompts=12000,
    # The hardest, without thinking above all.
    weight=3.0,
  )
  return trained(
    byte_model(
      hidden_size=96, num_hidden_layers=3, index_n_heads=4, index_topk=16
    ),
    {
      'mathematics': sums,
      'logical_reasoning': order(),
      'programming': words(),
    },
    batch_size=16,
    base=(300, 30, 40),
    base_answers=4000,
    sft=600,
    student=5000,
    rl=(20, 60),
    prompts=2000,
  )
