import dataclasses
import re

import pytest

from dsv32_jax.config import presets
from dsv32_jax.config.data import DataConfig
from dsv32_jax.config.model import RopeScaling
from dsv32_jax.config.training import (
  CheckpointConfig,
  EvaluationConfig,
  MeshConfig,
  OptimizerConfig,
  RunConfig,
  StageConfig,
)

pytestmark = pytest.mark.usefixtures('without_type_hook')

DATA = DataConfig(seq_len=64, batch_size=8)


def _stage(kind='pretrain', **changes):
  return StageConfig(**({'kind': kind, 'steps': 3, 'data': DATA} | changes))


def _run(stages=None, order=None, **changes):
  stages = stages or {
    'pretrain': _stage(),
    'warmup': _stage('dense_warmup', init_from='pretrain'),
    'sparse': _stage('sparse_training', init_from='warmup'),
  }
  return RunConfig(
    **(
      {
        'model': presets.tiny(),
        'stages': stages,
        'order': order or tuple(stages),
      }
      | changes
    )
  )


def _refuses(build, field, value, expected):
  pattern = (
    rf'{re.escape(field)}: got {re.escape(value)}.*'
    rf'expected.*{re.escape(expected)}'
  )
  with pytest.raises(ValueError, match=pattern):
    build()


@pytest.mark.parametrize(
  ('field', 'value', 'expected'),
  [
    ('peak_learning_rate', 0.0, 'a positive number'),
    ('eps', -1e-8, 'a positive number'),
    ('clip_norm', 0.0, 'a positive number'),
    ('warmup_steps', -1, '0 or more'),
    ('final_fraction', -0.5, '0 or more'),
    ('weight_decay', -0.1, '0 or more'),
    ('b1', 1.0, '0 <= b1 < 1'),
    ('b2', -0.1, '0 <= b2 < 1'),
    ('schedule', 'step', 'cosine'),
    ('warmup_steps', 1.5, 'int'),
    ('peak_learning_rate', '1e-3', 'float'),
  ],
)
def test_optimizer_impossible_values_are_refused(field, value, expected):
  _refuses(
    lambda: OptimizerConfig(**{field: value}), field, repr(value), expected
  )


@pytest.mark.parametrize(
  ('changes', 'field', 'value', 'expected'),
  [
    ({'steps': 0}, 'steps', '0', 'at least 1'),
    ({'micro_batches': 0}, 'micro_batches', '0', 'at least 1'),
    ({'micro_batches': 3}, 'micro_batches', '3', 'data.batch_size 8'),
    ({'index_topk': 0}, 'index_topk', '0', 'at least 1'),
    ({'mtp_loss_weight': -1.0}, 'mtp_loss_weight', '-1.0', '0 or more'),
    (
      {'indexer_kl_coefficient': -1.0},
      'indexer_kl_coefficient',
      '-1.0',
      '0 or more',
    ),
    (
      {'router_bias_update_rate': -1.0},
      'router_bias_update_rate',
      '-1.0',
      '0 or more',
    ),
    ({'selector': 'window'}, 'selector', "'window'", "'indexer'"),
    ({'kind': 'sft'}, 'data.sources', 'no conversations', "'conversations'"),
    ({'kind': 'dense_warmup'}, 'init_from', 'None', 'a trained checkpoint'),
    (
      {'keep_optimizer_state': True},
      'keep_optimizer_state',
      'True without init_from',
      'a stage or checkpoint',
    ),
    ({'kind': 'finetune'}, 'kind', "'finetune'", 'sparse_training'),
    ({'data': None}, 'data', 'None', 'DataConfig'),
  ],
)
def test_stage_impossible_values_are_refused(changes, field, value, expected):
  _refuses(lambda: _stage(**changes), field, value, expected)


@pytest.mark.parametrize(
  ('build', 'field', 'value', 'expected'),
  [
    (lambda: MeshConfig(data=0), 'mesh.data', '0', '-1 or at least 1'),
    (lambda: MeshConfig(expert=-2), 'mesh.expert', '-2', '-1 or at least 1'),
    (lambda: MeshConfig(fsdp=-1), 'mesh', '-1 for data and fsdp', 'one'),
    (
      lambda: MeshConfig(rules='fastest'),  # pyrefly: ignore
      'MeshConfig.rules',
      "'fastest'",
      'fsdp_expert',
    ),
    (lambda: CheckpointConfig(keep=0), 'checkpoint.keep', '0', '>= 1'),
    (
      lambda: CheckpointConfig(every_steps=0),
      'checkpoint.every_steps',
      '0',
      '>= 1',
    ),
    (lambda: EvaluationConfig(rows=0), 'evaluation.rows', '0', '>= 1'),
    (
      lambda: EvaluationConfig(every_steps=-1),
      'evaluation.every_steps',
      '-1',
      '>= 0',
    ),
    (
      lambda: EvaluationConfig(seq_lens=()),
      'evaluation.seq_lens',
      'none',
      'at least one length',
    ),
    (
      lambda: EvaluationConfig(seq_lens=(256, 0)),
      'evaluation.seq_lens',
      '0',
      'at least 1',
    ),
    (
      lambda: EvaluationConfig(recall_distances=('far',)),
      'evaluation.recall_distances',
      "'far'",
      'at least 1',
    ),
  ],
)
def test_run_settings_impossible_values_are_refused(
  build, field, value, expected
):
  _refuses(build, field, value, expected)


def test_run_accepts_the_papers_order():
  run = _run()
  assert run.stage_model('sparse') == presets.tiny()


@pytest.mark.parametrize(
  ('build', 'field', 'value', 'expected'),
  [
    (lambda: _run(order=()), 'order', 'none', 'stage names'),
    (lambda: _run(order=('rl',)), 'order', "'rl'", "'pretrain'"),
    (
      lambda: _run(order=('pretrain', 'pretrain')),
      'order',
      "'pretrain' twice",
      'once',
    ),
    (
      lambda: _run(order=('warmup', 'pretrain')),
      'stages.warmup.init_from',
      "'pretrain'",
      "comes before 'warmup'",
    ),
  ],
)
def test_run_impossible_orders_are_refused(build, field, value, expected):
  if field == 'order' and value == 'none':
    build = lambda: RunConfig(  # noqa: E731
      model=presets.tiny(), stages={'pretrain': _stage()}, order=()
    )
  _refuses(build, field, value, expected)


def test_run_refuses_stages_that_need_an_indexer_without_q_latent():
  model = dataclasses.replace(presets.tiny(), q_lora_rank=None)
  pattern = r'stages\.warmup: q_lora_rank: got None, expected an integer'
  with pytest.raises(ValueError, match=pattern):
    _run(model=model)
  control = _stage('sparse_training', init_from='pretrain', selector='window')
  _run(model=model, stages={'pretrain': _stage(), 'control': control})


def test_run_refuses_sparse_training_that_would_select_every_token():
  stages = {
    'pretrain': _stage(),
    'sparse': _stage('sparse_training', init_from='pretrain', index_topk=64),
  }
  pattern = (
    r'stages\.sparse: index_topk: got 64, expected less than data\.seq_len 64'
  )
  with pytest.raises(ValueError, match=pattern):
    _run(stages=stages)


def test_run_stage_model_inherits_yarn_and_k_from_its_ancestors():
  scaling = RopeScaling(factor=8.0)
  run = _run(
    stages={
      'pretrain': _stage(),
      'extension': _stage(
        'context_extension', init_from='pretrain', rope_scaling=scaling
      ),
      'warmup': _stage('dense_warmup', init_from='extension', index_topk=16),
      'sparse': _stage('sparse_training', init_from='warmup'),
      'control': _stage(
        'sparse_training', init_from='pretrain', selector='all'
      ),
    }
  )
  tiny = presets.tiny()
  assert run.stage_model('pretrain') == tiny
  assert run.stage_model('extension') == dataclasses.replace(
    tiny, rope_scaling=scaling
  )
  assert run.stage_model('sparse') == dataclasses.replace(
    tiny, rope_scaling=scaling, index_topk=16
  )
  assert run.stage_model('control') == tiny
