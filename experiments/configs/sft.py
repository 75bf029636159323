r"""SFT (arXiv:2512.02556, section 3) at laptop scale.

A base is pretrained on worked answers half of which belong to other problems;
SFT then learns from right ones, in both modes, with sparse attention.

    python experiments/sft.py --workdir=runs/sft \
      --config=experiments/configs/sft.py:cpu

Presets:
  smoke  both stages, a few steps: does it run? A minute.
  cpu    a model of half a million parameters, some minutes on two cores.
"""

import dataclasses

from dsv32_jax.config import presets
from dsv32_jax.config.data import DataConfig, SourceConfig
from dsv32_jax.config.model import ModelConfig
from dsv32_jax.config.problems import (
  DEMONSTRATIONS,
  DemonstrationConfig,
  ProblemSourceConfig,
)
from dsv32_jax.config.sft import SFTRunConfig
from dsv32_jax.config.training import (
  CheckpointConfig,
  EvaluationConfig,
  OptimizerConfig,
  StageConfig,
)
from dsv32_jax.training import flags

_SOURCES = (
  ProblemSourceConfig(name='logic', options={'family': 'order', 'size': 3}),
  ProblemSourceConfig(name='programming', options={'level': 'words'}),
)


def get_config(preset: str = 'smoke'):
  """The ConfigDict of a preset; see the module's docstring."""
  known = {'smoke': smoke, 'cpu': cpu}
  if preset not in known:
    raise ValueError(f'preset: got {preset!r}, expected one of {list(known)}')
  return flags.to_config_dict(known[preset]())


def answers(
  count: int, *, swapped: float = 0.0
) -> tuple[DemonstrationConfig, ...]:
  """So many worked answers of each source in each mode."""
  return tuple(
    DemonstrationConfig(source=source, count=count, mode=mode, swapped=swapped)
    for source in _SOURCES
    for mode in ('thinking', 'chat')
  )


def rows(name: str, *, seq_len: int, batch_size: int) -> DataConfig:
  """Packed rows of the demonstrations of that name."""
  return DataConfig(
    seq_len=seq_len,
    batch_size=batch_size,
    sources=(SourceConfig(kind='conversations', path=DEMONSTRATIONS + name),),
    held_out_fraction=0.1,
  )


def run(
  model: ModelConfig,
  *,
  seq_len: int,
  batch_size: int,
  count: int,
  pretrain: int,
  sft: int,
  peak: float,
) -> SFTRunConfig:
  """Pretraining and SFT, with rows of one shape."""
  shape = {'seq_len': seq_len, 'batch_size': batch_size}
  stages = {
    'pretrain': StageConfig(
      kind='pretrain',
      steps=pretrain,
      data=rows('base', **shape),
      optimizer=OptimizerConfig(
        peak_learning_rate=peak, warmup_steps=min(40, pretrain)
      ),
    ),
    'sft': StageConfig(
      kind='sft',
      init_from='pretrain',
      steps=sft,
      data=rows('right', **shape),
      optimizer=OptimizerConfig(
        peak_learning_rate=peak / 2,
        schedule='linear',
        final_fraction=0.1,
        weight_decay=0.0,
      ),
      indexer_optimizer=OptimizerConfig(
        peak_learning_rate=1e-3, weight_decay=0.0
      ),
    ),
  }
  return SFTRunConfig(
    model=model,
    stages=stages,
    order=tuple(stages),
    demonstrations={
      'base': answers(count, swapped=0.5),
      'right': answers(count),
    },
    checkpoint=CheckpointConfig(every_steps=50),
    evaluation=EvaluationConfig(every_steps=0, batch_size=4),
  )


def smoke() -> SFTRunConfig:
  """A few steps of both stages."""
  model = dataclasses.replace(
    presets.cpu(),
    hidden_size=32,
    num_hidden_layers=2,
    index_topk=16,
    vocab_size=272,
  )
  return run(
    model, seq_len=64, batch_size=4, count=100, pretrain=4, sft=4, peak=3e-3
  )


def cpu() -> SFTRunConfig:
  """What a cpu-scale model learns from demonstrations alone."""
  model = dataclasses.replace(presets.cpu(), index_topk=24, vocab_size=272)
  return run(
    model,
    seq_len=96,
    batch_size=16,
    count=5000,
    pretrain=300,
    sft=300,
    peak=2e-3,
  )
