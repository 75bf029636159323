import dataclasses

import pytest

from dsv32_jax.config.data import DataConfig, SourceConfig
from dsv32_jax.config.model import DENSE, DENSE_WARMUP, SPARSE_TRAINING
from dsv32_jax.config.training import StageConfig
from dsv32_jax.training import stages
from tests.support import tiny_configs

CFG = tiny_configs.config(num_nextn_predict_layers=1)


CONVERSATIONS = DataConfig(
  sources=(SourceConfig(kind='conversations', path='some.jsonl'),)
)


def _build(kind, cfg=CFG, **changes):
  init_from = None if kind == 'pretrain' else 'somewhere'
  config = StageConfig(
    kind=kind,
    steps=3,
    data=CONVERSATIONS if kind == 'sft' else DataConfig(),
    init_from=init_from,
    mtp_loss_weight=0.3,
    indexer_kl_coefficient=0.7,
    router_bias_update_rate=0.01,
    **changes,
  )
  return stages.build(config, cfg)


@pytest.mark.parametrize('kind', ['pretrain', 'context_extension'])
def test_stage_dense_training_moves_the_main_model_on_the_lm_loss(kind):
  assert _build(kind) == stages.Stage(
    attention=DENSE,
    trainable=('main',),
    lm_loss=True,
    indexer_kl_coefficient=0.0,
    mtp_loss_weight=0.3,
    router_bias_update_rate=0.01,
  )


def test_stage_dense_warmup_moves_the_indexers_alone():
  """T10: the router bias is frozen, whatever rate the config gives."""
  stage = _build('dense_warmup')
  assert stage.attention == DENSE_WARMUP
  assert stage.trainable == ('indexer',)
  assert not stage.lm_loss
  assert stage.indexer_kl_coefficient == 0.7
  assert stage.router_bias_update_rate == 0


def test_stage_sparse_training_moves_everything_on_both_losses():
  stage = _build('sparse_training')
  assert stage.attention == SPARSE_TRAINING
  assert set(stage.trainable) == {'main', 'indexer'}
  assert stage.lm_loss
  assert stage.indexer_kl_coefficient == 0.7
  assert stage.router_bias_update_rate == 0.01


@pytest.mark.parametrize('selector', ['all', 'window', 'random', 'oracle'])
def test_stage_controls_train_the_main_model_without_an_indexer_loss(selector):
  stage = _build('sparse_training', selector=selector)
  assert stage.attention.selector == selector
  assert stage.attention.indexer_kl == 'none'
  assert stage.trainable == ('main',)
  assert stage.indexer_kl_coefficient == 0
  # All else as in the stage that it is compared with.
  same = {'attention': DENSE, 'trainable': (), 'indexer_kl_coefficient': 0.0}
  assert dataclasses.replace(stage, **same) == dataclasses.replace(
    _build('sparse_training'), **same
  )


@pytest.mark.parametrize('selector', ['indexer', 'all'])
def test_stage_sft_trains_as_sparse_training_does(selector):
  """Post-training attends and detaches in the manner of the sparse stage."""
  assert _build('sft', selector=selector) == _build(
    'sparse_training', selector=selector
  )


def test_stage_without_mtp_module_takes_no_mtp_loss():
  for kind in ('pretrain', 'sparse_training'):
    assert _build(kind, tiny_configs.config()).mtp_loss_weight == 0


def test_stage_that_needs_an_indexer_refuses_a_model_without_q_latent():
  cfg = tiny_configs.config(q_lora_rank=None)
  for kind in ('dense_warmup', 'sparse_training'):
    with pytest.raises(ValueError, match='q_lora_rank: got None, expected'):
      _build(kind, cfg)
  assert _build('pretrain', cfg).attention == DENSE


def test_stage_is_static_under_jit():
  assert hash(_build('sparse_training')) == hash(_build('sparse_training'))
