import dataclasses

import jax
import numpy as np
import pytest

from dsv32_jax.checkpoints import maxtext_mapping
from dsv32_jax.config import presets

# Names and shapes that MaxText 0.2.5 has on config T0 (1 dense, 3 MoE layers).
TOP_SHAPES = {
  'token_embedder/embedding': (512, 128),
  'decoder/decoder_norm/scale': (128,),
  'decoder/logits_dense/kernel': (128, 512),
}
BLOCK_SHAPES = {
  'pre_self_attention_layer_norm/scale': (128,),
  'post_self_attention_layer_norm/scale': (128,),
  'self_attention/wq_a/kernel': (128, 64),
  'self_attention/q_norm/scale': (64,),
  'self_attention/wq_b/kernel': (64, 4, 48),
  'self_attention/wkv_a/kernel': (128, 48),
  'self_attention/kv_norm/scale': (32,),
  'self_attention/wkv_b/kernel': (32, 4, 64),
  'self_attention/out/kernel': (4, 32, 128),
  'self_attention/indexer/wq_b/kernel': (64, 4, 32),
  'self_attention/indexer/wk/kernel': (128, 32),
  'self_attention/indexer/k_norm/scale': (32,),
  'self_attention/indexer/k_norm/bias': (32,),
  'self_attention/indexer/weights_proj/kernel': (128, 4),
}
DENSE_SHAPES = {
  'mlp/wi_0/kernel': (128, 256),
  'mlp/wi_1/kernel': (128, 256),
  'mlp/wo/kernel': (256, 128),
}
MOE = 'DeepSeekMoeBlock_0'
MOE_SHAPES = {
  f'{MOE}/MoeBlock_0/gate/kernel': (128, 8),
  f'{MOE}/MoeBlock_0/wi_0': (8, 128, 64),
  f'{MOE}/MoeBlock_0/wi_1': (8, 128, 64),
  f'{MOE}/MoeBlock_0/wo': (8, 64, 128),
  f'{MOE}/shared_experts/wi_0/kernel': (128, 64),
  f'{MOE}/shared_experts/wi_1/kernel': (128, 64),
  f'{MOE}/shared_experts/wo/kernel': (64, 128),
}


@pytest.fixture
def cfg():
  return dataclasses.replace(presets.cpu(), index_n_heads=4)


@pytest.fixture
def arrays():
  """Random numbers under MaxText's names, the layer axis at position 1."""
  shapes = dict(TOP_SHAPES)
  for stack, layers, own in (
    ('dense_layers', 1, DENSE_SHAPES),
    ('moe_layers', 3, MOE_SHAPES),
  ):
    for name, shape in {**BLOCK_SHAPES, **own}.items():
      shapes[f'decoder/{stack}/{name}'] = (shape[0], layers, *shape[1:])
  rng = np.random.default_rng(0)
  return {
    name: rng.standard_normal(shape, np.float32)
    for name, shape in shapes.items()
  }


def test_variables_from_arrays_holds_every_number_of_maxtext_once(cfg, arrays):
  variables = maxtext_mapping.variables_from_arrays(arrays, cfg)

  ours = np.concatenate(
    [np.ravel(leaf) for leaf in jax.tree.leaves(variables['params'])]
  )
  theirs = np.concatenate([np.ravel(value) for value in arrays.values()])
  assert ours.size == 1_153_792
  np.testing.assert_array_equal(np.sort(ours), np.sort(theirs))


def test_variables_from_arrays_starts_router_biases_at_zero(cfg, arrays):
  variables = maxtext_mapping.variables_from_arrays(arrays, cfg)

  biases = jax.tree.leaves(variables['router_bias'])
  assert [bias.shape for bias in biases] == [(3, 8)]
  assert not np.any(biases[0])


@pytest.mark.parametrize(
  ('source', 'parts'),
  [('wq_b', ('w_uq', 'w_qr')), ('wkv_a', ('w_dkv', 'w_kr')),
   ('wkv_b', ('w_uk', 'w_uv'))],
)  # fmt: skip
def test_variables_from_arrays_splits_fused_projections_in_order(
  cfg, arrays, source, parts
):
  variables = maxtext_mapping.variables_from_arrays(arrays, cfg)

  mla = variables['params']['moe_layers']['layers']['attention']['mla']
  fused = arrays[f'decoder/moe_layers/self_attention/{source}/kernel']
  for layer in range(3):
    joined = np.concatenate([mla[part][layer] for part in parts], axis=-1)
    np.testing.assert_array_equal(joined, fused[:, layer])


@pytest.mark.parametrize(
  ('ours', 'theirs'),
  [
    ('ffn_norm/scale', 'post_self_attention_layer_norm/scale'),
    ('attention/mla/w_o', 'self_attention/out/kernel'),
    ('attention/indexer/w_iw', 'self_attention/indexer/weights_proj/kernel'),
    ('attention/indexer/k_norm/bias', 'self_attention/indexer/k_norm/bias'),
    ('moe/router/w_router', f'{MOE}/MoeBlock_0/gate/kernel'),
    ('moe/experts/w_gate', f'{MOE}/MoeBlock_0/wi_0'),
    ('moe/experts/w_up', f'{MOE}/MoeBlock_0/wi_1'),
    ('moe/experts/w_down', f'{MOE}/MoeBlock_0/wo'),
    ('moe/shared/w_gate', f'{MOE}/shared_experts/wi_0/kernel'),
  ],
)
def test_variables_from_arrays_moves_the_layer_axis_to_the_front(
  cfg, arrays, ours, theirs
):
  variables = maxtext_mapping.variables_from_arrays(arrays, cfg)

  value = variables['params']['moe_layers']['layers']
  for name in ours.split('/'):
    value = value[name]
  np.testing.assert_array_equal(
    value, np.moveaxis(arrays[f'decoder/moe_layers/{theirs}'], 1, 0)
  )


def test_variables_from_arrays_without_indexer_fills_zeros_only_if_asked(
  cfg, arrays
):
  arrays = {k: v for k, v in arrays.items() if '/indexer/' not in k}

  with pytest.raises(ValueError, match=r'indexer/.*: missing'):
    maxtext_mapping.variables_from_arrays(arrays, cfg)
  variables = maxtext_mapping.variables_from_arrays(
    arrays, cfg, indexer='zeros'
  )
  block = variables['params']['dense_layers']['layers']['attention']
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(block['indexer']))
  assert np.any(block['mla']['w_o'])


def test_variables_from_arrays_with_part_of_an_indexer_is_refused(cfg, arrays):
  name = 'decoder/moe_layers/self_attention/indexer/wk/kernel'
  del arrays[name]

  with pytest.raises(ValueError, match=f'{name}: missing'):
    maxtext_mapping.variables_from_arrays(arrays, cfg, indexer='zeros')


def test_variables_from_arrays_of_another_shape_names_both_shapes(cfg, arrays):
  name = 'decoder/logits_dense/kernel'
  arrays[name] = arrays[name][:, :500]

  with pytest.raises(
    ValueError, match=rf'{name}: got \(128, 500\).*\(128, 512\)'
  ):
    maxtext_mapping.variables_from_arrays(arrays, cfg)


def test_variables_from_arrays_with_an_unknown_array_is_refused(cfg, arrays):
  arrays['decoder/moe_layers/bias'] = np.zeros((8, 3), np.float32)

  with pytest.raises(ValueError, match='decoder/moe_layers/bias: left over'):
    maxtext_mapping.variables_from_arrays(arrays, cfg)


def test_variables_from_arrays_for_unrolled_layers_is_refused(cfg, arrays):
  cfg = dataclasses.replace(cfg, scan_layers=False)

  with pytest.raises(ValueError, match='scan_layers: got False'):
    maxtext_mapping.variables_from_arrays(arrays, cfg)
