import dataclasses
import re

import pytest

from dsv32_jax.config import presets
from dsv32_jax.config.model import (
  DENSE,
  DENSE_WARMUP,
  SPARSE,
  SPARSE_TRAINING,
  AttentionMode,
  Precision,
  RopeScaling,
)
from tests.support import tiny_configs

pytestmark = pytest.mark.usefixtures('without_type_hook')

TINY = presets.tiny()


def _refused(field, value, expected):
  """Pattern of a message with field, value and expectation."""
  return (
    rf'{re.escape(field)}: got {re.escape(repr(value))}.*'
    rf'expected.*{re.escape(expected)}'
  )


@pytest.mark.parametrize(
  'field',
  (
    'vocab_size hidden_size num_hidden_layers num_attention_heads q_lora_rank '
    'kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim '
    'intermediate_size moe_intermediate_size n_routed_experts '
    'num_experts_per_tok index_n_heads index_head_dim index_topk n_group '
    'topk_group max_position_embeddings'
  ).split(),
)
def test_model_sizes_below_one_are_refused(field):
  for value in (0, -1):
    with pytest.raises(ValueError, match=_refused(field, value, 'at least 1')):
      dataclasses.replace(TINY, **{field: value})


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    ({'qk_rope_head_dim': 7}, 'an even number'),
    ({'index_head_dim': 6}, 'at least qk_rope_head_dim 8'),
    ({'index_head_dim': 24, 'index_hadamard': True}, 'a power of two'),
    ({'first_k_dense_replace': 4}, '0 to num_hidden_layers 3'),
    ({'first_k_dense_replace': -1}, '0 to num_hidden_layers 3'),
    ({'num_nextn_predict_layers': 2}, '0 or 1'),
    ({'n_group': 3}, 'a divisor of n_routed_experts 8'),
    ({'topk_group': 5}, 'at most n_group 4'),
    ({'num_experts_per_tok': 5}, 'at most 4'),
    ({'n_group': 8, 'topk_group': 8}, 'at least 2 experts a group'),
    ({'n_shared_experts': -1}, '0 or more'),
    ({'rms_norm_eps': 0.0}, 'a positive number'),
    ({'rms_norm_eps': float('nan')}, 'a positive number'),
    ({'rope_theta': -1.0}, 'a positive number'),
    ({'initializer_range': 0.0}, 'a positive number'),
    ({'remat': 'some'}, 'one of'),
    ({'scoring_func': 'tanh'}, 'sigmoid'),
    ({'topk_method': 'best'}, 'noaux_tc'),
  ],
)
def test_model_impossible_values_are_refused(changes, expected):
  field, value = next(iter(changes.items()))
  with pytest.raises(ValueError, match=_refused(field, value, expected)):
    dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize(
  ('field', 'value', 'expected'),
  [
    ('hidden_size', '64', 'int'),
    ('hidden_size', 64.0, 'int'),
    ('hidden_size', True, 'int'),
    ('q_lora_rank', 'none', 'int or None'),
    ('rms_norm_eps', 'small', 'float'),
    ('scan_layers', 1, 'bool'),
    ('rope_scaling', {'factor': 40}, 'RopeScaling or None'),
    ('precision', 'float32', 'Precision'),
  ],
)
def test_model_values_of_another_type_are_refused(field, value, expected):
  with pytest.raises(
    ValueError, match=_refused(f'ModelConfig.{field}', value, expected)
  ):
    dataclasses.replace(TINY, **{field: value})


def test_model_whole_numbers_serve_as_floats():
  assert dataclasses.replace(TINY, rope_theta=500000).rope_theta == 500000


def test_model_without_experts_does_not_check_them():
  cfg = dataclasses.replace(
    TINY,
    first_k_dense_replace=3,
    num_nextn_predict_layers=0,
    num_experts_per_tok=99,
  )
  assert cfg.num_moe_layers == 0


@pytest.mark.parametrize(
  ('changes', 'field', 'expected'),
  [
    ({'factor': 0.5}, 'factor', 'at least 1'),
    (
      {'original_max_position_embeddings': 0},
      'original_max_position_embeddings',
      'at least 1',
    ),
    ({'beta_fast': 1.0}, 'beta_fast', 'beta_fast > beta_slow > 0'),
    ({'mscale': 0.7}, 'mscale', 'equal'),
  ],
)
def test_rope_scaling_impossible_values_are_refused(changes, field, expected):
  value = changes[field]
  with pytest.raises(
    ValueError, match=_refused(f'rope_scaling.{field}', value, expected)
  ):
    RopeScaling(**changes)


def test_rope_scaling_other_kinds_are_refused():
  with pytest.raises(ValueError, match=r"rope_type: got 'linear'.*yarn"):
    RopeScaling(rope_type='linear')


@pytest.mark.parametrize('field', ['param', 'compute', 'logits'])
def test_precision_unknown_dtype_is_refused(field):
  with pytest.raises(
    ValueError, match=_refused(f'precision.{field}', 'int8', 'float32')
  ):
    Precision(**{field: 'int8'})


def test_attention_mode_losses_that_do_not_fit_the_selector_are_refused():
  with pytest.raises(ValueError, match=_refused(
    'attention.indexer_kl', 'all', "selector 'all'"
  )):  # fmt: skip
    AttentionMode(selector='indexer', indexer_kl='all')
  with pytest.raises(ValueError, match=_refused(
    'attention.indexer_kl', 'selected', 'a selector that selects'
  )):  # fmt: skip
    AttentionMode(selector='all', indexer_kl='selected')
  with pytest.raises(ValueError, match=r"selector: got 'best', expected one"):
    AttentionMode(selector='best')
  with pytest.raises(ValueError, match=r"absorbed: got 'yes', expected bool"):
    AttentionMode(absorbed='yes')


def test_attention_modes_of_the_paper():
  assert not DENSE.is_sparse
  assert not DENSE_WARMUP.is_sparse
  assert SPARSE.is_sparse
  assert DENSE_WARMUP.indexer_kl == 'all'
  assert SPARSE_TRAINING.indexer_kl == 'selected'


def test_model_derived_sizes():
  cfg = presets.deepseek_v32_671b()
  assert (cfg.num_moe_layers, cfg.qk_head_dim, cfg.latent_dim) == (58, 192, 576)
  assert cfg.has_router_bias
  assert not presets.v2_lite_dsa().has_router_bias


def test_model_require_indexer_names_the_field():
  tiny_configs.config().require_indexer()
  with pytest.raises(
    ValueError, match='q_lora_rank: got None, expected an integer'
  ):
    tiny_configs.config(q_lora_rank=None).require_indexer()


def test_model_is_frozen_hashable_and_comparable():
  assert hash(TINY) == hash(presets.tiny())
  assert presets.tiny() == TINY
  assert dataclasses.replace(TINY, index_topk=31) != TINY
  with pytest.raises(dataclasses.FrozenInstanceError):
    TINY.index_topk = 3
