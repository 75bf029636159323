r"""DeepSeek-V3.2's continued training at laptop scale, and up.

Paper: arXiv:2512.02556, section 2.1.1. A base model is pretrained with dense
attention and extended to the training length with YaRN; then dense warm-up
trains the indexers alone, and sparse training everything. Beside sparse
training run its controls from the same checkpoint on the same batches: dense,
sliding window, random selection.

Half of the rows (three quarters while pretraining) are the recall task, whose
answer lies farther back than k tokens; the rest is the source of the Python
standard library, as bytes.

    python experiments/continued_training.py --workdir=runs/quick \
      --config=experiments/configs/continued_training.py:quick

Presets:
  smoke  `tiny`, a few steps of everything: does it run? A minute.
  quick  `cpu` at T 256, k 32, short schedule: the README's run. Minutes.
  cpu    `cpu` at T 512, k 64, with all controls: the learning results.
  mini   `mini` at T 4096, k 512: one GPU.
"""

import dataclasses

from dsv32_jax.config import presets
from dsv32_jax.config.data import DataConfig, RecallConfig, TokenizerConfig
from dsv32_jax.config.model import ModelConfig, RopeScaling, Selector
from dsv32_jax.config.training import (
  CheckpointConfig,
  EvaluationConfig,
  OptimizerConfig,
  RunConfig,
  StageConfig,
)
from dsv32_jax.training import flags


def get_config(preset: str = 'quick'):
  """The ConfigDict of a preset; see the module's docstring."""
  known = {'smoke': smoke, 'quick': quick, 'cpu': cpu, 'mini': mini}
  if preset not in known:
    raise ValueError(f'preset: got {preset!r}, expected one of {list(known)}')
  return flags.to_config_dict(known[preset]())


def rows(
  seq_len: int, batch_size: int, *, gap: int, keys: int, share: float, **more
) -> DataConfig:
  """Text and recall rows; `gap` is the k that a window would see."""
  return DataConfig(
    seq_len=seq_len,
    batch_size=batch_size,
    recall=RecallConfig(share=share, num_keys=keys, min_gap=gap),
    **more,
  )


def main_optimizer(peak: float, final: float = 0.1, warmup: int = 0):
  """AdamW for the main model, falling linearly to `final` of the peak."""
  return OptimizerConfig(
    peak_learning_rate=peak,
    warmup_steps=warmup,
    schedule='linear',
    final_fraction=final,
  )


def indexer_optimizer(peak: float):
  """AdamW without decay for the indexers."""
  return OptimizerConfig(
    peak_learning_rate=peak,
    schedule='linear',
    final_fraction=0.1,
    weight_decay=0.0,
  )


def sparse_stages(
  data: DataConfig, *, steps: int, controls: tuple[Selector, ...]
) -> dict[str, StageConfig]:
  """Sparse training and its controls, equal but for the selector."""
  sparse = StageConfig(
    kind='sparse_training',
    init_from='dense_warmup',
    steps=steps,
    data=data,
    optimizer=main_optimizer(5e-4, warmup=min(10, steps)),
    indexer_optimizer=indexer_optimizer(3e-3),
  )
  names = {'all': 'dense_control', 'window': 'window_control'}
  names['random'] = 'random_control'
  return {'sparse_training': sparse} | {
    names[selector]: dataclasses.replace(sparse, selector=selector)
    for selector in controls
  }


def recipe(
  model: ModelConfig, stages: dict[str, StageConfig], **more
) -> RunConfig:
  """A run of the stages in the order in which they are written."""
  return RunConfig(model=model, stages=stages, order=tuple(stages), **more)


def smoke() -> RunConfig:
  """Every stage and control of `tiny`, a few steps each."""
  short = rows(64, 4, gap=16, keys=4, share=0.5)
  long = rows(128, 4, gap=16, keys=8, share=0.5)
  stages = {
    'pretrain': StageConfig(
      kind='pretrain',
      steps=4,
      data=short,
      optimizer=main_optimizer(2e-3, warmup=2),
    ),
    'context_extension': StageConfig(
      kind='context_extension',
      init_from='pretrain',
      steps=2,
      data=long,
      optimizer=main_optimizer(1e-3),
      rope_scaling=RopeScaling(factor=2.0, original_max_position_embeddings=64),
      keep_optimizer_state=True,
    ),
    'dense_warmup': StageConfig(
      kind='dense_warmup',
      init_from='context_extension',
      steps=4,
      data=long,
      indexer_optimizer=indexer_optimizer(1e-2),
    ),
    **sparse_stages(long, steps=4, controls=('all',)),
  }
  model = dataclasses.replace(
    presets.tiny(), index_topk=16, num_nextn_predict_layers=0
  )
  return recipe(
    model,
    stages,
    checkpoint=CheckpointConfig(every_steps=2),
    evaluation=EvaluationConfig(
      every_steps=0,
      seq_lens=(128,),
      rows=4,
      batch_size=4,
      recall_distances=(24, 64),
      recall_rows=4,
    ),
  )


def quick() -> RunConfig:
  """The README's run; figures to expect are in docs/reproduce.md."""
  base = rows(256, 8, gap=32, keys=16, share=0.75)
  later = rows(256, 8, gap=32, keys=16, share=0.5)
  stages = {
    'pretrain_short': StageConfig(
      kind='pretrain',
      steps=80,
      data=rows(64, 32, gap=16, keys=8, share=0.5),
      optimizer=main_optimizer(4e-3, final=1.0, warmup=20),
    ),
    'pretrain': StageConfig(
      kind='pretrain',
      init_from='pretrain_short',
      steps=150,
      data=base,
      optimizer=main_optimizer(4e-3),
      keep_optimizer_state=True,
    ),
    'dense_warmup': StageConfig(
      kind='dense_warmup',
      init_from='pretrain',
      steps=100,
      data=later,
      indexer_optimizer=indexer_optimizer(1e-2),
    ),
    **sparse_stages(
      dataclasses.replace(later, seed=1), steps=40, controls=('all',)
    ),
  }
  model = dataclasses.replace(presets.cpu(), index_topk=32)
  return recipe(
    model,
    stages,
    checkpoint=CheckpointConfig(every_steps=50),
    evaluation=EvaluationConfig(
      every_steps=0,
      seq_lens=(256,),
      rows=32,
      batch_size=8,
      recall_distances=(40, 64, 96, 128, 192, 224),
      recall_rows=32,
    ),
  )


def cpu() -> RunConfig:
  """The learning results: T 512, k = T/8, all controls, two cores."""
  base = {'keys': 16, 'share': 0.75}
  later = rows(512, 4, gap=64, keys=16, share=0.5)
  stages = {
    'pretrain_short': StageConfig(
      kind='pretrain',
      steps=80,
      data=rows(64, 32, gap=16, keys=8, share=0.5),
      optimizer=main_optimizer(4e-3, final=1.0, warmup=20),
    ),
    'pretrain': StageConfig(
      kind='pretrain',
      init_from='pretrain_short',
      steps=150,
      data=rows(256, 8, gap=32, **base),
      optimizer=main_optimizer(4e-3, final=0.5),
      keep_optimizer_state=True,
    ),
    'context_extension': StageConfig(
      kind='context_extension',
      init_from='pretrain',
      steps=150,
      data=rows(512, 8, gap=64, **base),
      optimizer=main_optimizer(2e-3),
      rope_scaling=RopeScaling(
        factor=2.0, original_max_position_embeddings=256
      ),
      keep_optimizer_state=True,
    ),
    'dense_warmup': StageConfig(
      kind='dense_warmup',
      init_from='context_extension',
      steps=400,
      data=later,
      indexer_optimizer=indexer_optimizer(1e-2),
    ),
    **sparse_stages(
      dataclasses.replace(later, seed=1),
      steps=100,
      controls=('all', 'window', 'random'),
    ),
  }
  return recipe(
    presets.cpu(),
    stages,
    checkpoint=CheckpointConfig(every_steps=50),
    evaluation=EvaluationConfig(
      every_steps=50,
      seq_lens=(256, 512, 1024),
      rows=64,
      batch_size=8,
      recall_distances=(72, 96, 128, 192, 256, 320, 400, 448),
      recall_rows=64,
    ),
  )


def mini() -> RunConfig:
  """`mini` on one GPU, k = T/8 at T 4096, trained BPE."""
  more = {'tokenizer': TokenizerConfig(kind='bpe')}
  later = rows(4096, 8, gap=512, keys=16, share=0.25, **more)
  stages = {
    'pretrain': StageConfig(
      kind='pretrain',
      steps=4000,
      data=rows(1024, 64, gap=128, keys=16, share=0.25, **more),
      optimizer=main_optimizer(1e-3, warmup=200),
      micro_batches=2,
    ),
    'context_extension': StageConfig(
      kind='context_extension',
      init_from='pretrain',
      steps=500,
      data=rows(4096, 16, gap=512, keys=16, share=0.25, **more),
      optimizer=main_optimizer(3e-4),
      rope_scaling=RopeScaling(
        factor=4.0, original_max_position_embeddings=1024
      ),
      micro_batches=2,
    ),
    'dense_warmup': StageConfig(
      kind='dense_warmup',
      init_from='context_extension',
      steps=500,
      data=later,
      indexer_optimizer=indexer_optimizer(1e-3),
    ),
    **sparse_stages(
      dataclasses.replace(later, seed=1),
      steps=1000,
      controls=('all', 'window', 'random'),
    ),
  }
  return recipe(
    presets.mini(),
    stages,
    evaluation=EvaluationConfig(
      every_steps=100,
      seq_lens=(1024, 2048, 4096),
      rows=32,
      batch_size=4,
      recall_distances=(640, 1024, 2048, 3072, 4000),
      recall_rows=16,
    ),
  )
