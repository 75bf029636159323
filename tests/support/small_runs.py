"""Run configurations that train in seconds, on text made by the test."""

import dataclasses
import pathlib

from dsv32_jax.config import presets
from dsv32_jax.config.data import DataConfig, RecallConfig, SourceConfig
from dsv32_jax.config.model import ModelConfig
from dsv32_jax.config.training import (
  CheckpointConfig,
  EvaluationConfig,
  OptimizerConfig,
  RunConfig,
  StageConfig,
)


def write_corpus(directory: pathlib.Path, *, documents: int = 40) -> str:
  """Text files of a few hundred bytes each; returns the directory."""
  directory.mkdir(parents=True, exist_ok=True)
  for number in range(documents):
    words = ' '.join(f'word{(number * k) % 97}' for k in range(60))
    (directory / f'{number}.txt').write_text(words, encoding='utf-8')
  return str(directory)


def model() -> ModelConfig:
  """Two layers of `tiny`, k 8, no MTP."""
  return dataclasses.replace(
    presets.tiny(),
    num_hidden_layers=2,
    index_topk=8,
    num_nextn_predict_layers=0,
  )


def run_config(corpus: str, *, steps: int = 2, **changes) -> RunConfig:
  """pretrain -> dense_warmup -> sparse_training and a dense control."""
  data = DataConfig(
    seq_len=48,
    batch_size=2,
    sources=(SourceConfig(kind='text', path=corpus),),
    held_out_fraction=0.25,
    recall=RecallConfig(share=0.5, num_keys=4, min_gap=8),
  )
  sparse = StageConfig(
    kind='sparse_training', init_from='dense_warmup', steps=steps, data=data
  )
  stages = {
    'pretrain': StageConfig(kind='pretrain', steps=steps, data=data),
    'dense_warmup': StageConfig(
      kind='dense_warmup',
      init_from='pretrain',
      steps=steps,
      data=data,
      indexer_optimizer=OptimizerConfig(
        peak_learning_rate=1e-2, weight_decay=0.0
      ),
    ),
    'sparse_training': sparse,
    'dense_control': dataclasses.replace(sparse, selector='all'),
  }
  return RunConfig(
    **{
      'model': model(),
      'stages': stages,
      'order': tuple(stages),
      'checkpoint': CheckpointConfig(every_steps=1),
      'evaluation': EvaluationConfig(
        every_steps=0,
        seq_lens=(48,),
        rows=2,
        batch_size=2,
        recall_distances=(12,),
        recall_rows=2,
      ),
      **changes,
    }
  )
