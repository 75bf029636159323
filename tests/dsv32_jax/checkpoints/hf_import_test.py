"""Loading Hugging Face checkpoints: parity with transformers, and refusals."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from dsv32_jax import SPARSE, AttentionMode, checkpoints
from dsv32_jax.checkpoints import hf_mapping
from dsv32_jax.config import presets
from dsv32_jax.functional import rotary

FIXTURE = pathlib.Path(__file__).parents[2] / 'fixtures' / 'hf_tiny_v32'
# Bar 3 of the parity with transformers; measured 1.5e-6.
LOGIT_TOLERANCE = 1e-5


@pytest.fixture(scope='module')
def expected():
  return dict(np.load(FIXTURE / 'expected.npz'))


@pytest.fixture(scope='module')
def weights():
  return safetensors.numpy.load_file(FIXTURE / 'model.safetensors')


@pytest.fixture
def checkpoint(tmp_path):
  """A copy of the fixture that a test may change."""
  path = tmp_path / 'checkpoint'
  path.mkdir()
  for name in ('config.json', 'model.safetensors'):
    shutil.copy(FIXTURE / name, path / name)
  return path


def _edit_config(path, **changes):
  raw = json.loads((path / 'config.json').read_text())
  raw.update(changes)
  raw = {name: value for name, value in raw.items() if value is not ...}
  (path / 'config.json').write_text(json.dumps(raw))


def _edit_weights(path, edit):
  file = path / 'model.safetensors'
  tensors = safetensors.numpy.load_file(file)
  edit(tensors)
  safetensors.numpy.save_file(tensors, file)


def _logits(model, variables, tokens_BT, mode=SPARSE):
  def run(variables, tokens_BT):
    return model.apply(variables, tokens_BT, attention=mode).logits_BTV

  return np.asarray(jax.jit(run)(variables, tokens_BT))


def _assert_trees_equal(actual, desired):
  assert jax.tree.structure(actual) == jax.tree.structure(desired)
  jax.tree.map(np.testing.assert_array_equal, actual, desired)


@pytest.mark.parametrize('absorbed', [False, True])
def test_load_hf_logits_match_transformers(expected, absorbed):
  model, variables = checkpoints.load_hf(FIXTURE)
  logits = _logits(
    model, variables, expected['input_ids'], AttentionMode(absorbed=absorbed)
  )
  error = np.abs(logits - expected['logits']).max()
  print(f'absorbed={absorbed}: largest error {error:.2e}')
  assert error < LOGIT_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize('absorbed', [False, True])
@pytest.mark.parametrize('length', [1, 7, 8, 9, 24])
def test_load_hf_prompt_of_any_length_matches_transformers(
  expected, length, absorbed
):
  model, variables = checkpoints.load_hf(FIXTURE)
  logits = _logits(
    model,
    variables,
    expected['input_ids'][:, :length],
    AttentionMode(absorbed=absorbed),
  )
  error = np.abs(logits - expected['logits'][:, :length]).max()
  assert error < LOGIT_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize('length', [1, 8])
def test_load_hf_bypassed_indexer_equals_indexer_up_to_k(expected, length):
  """T6: with no more than k tokens every one of them is selected."""
  model, variables = checkpoints.load_hf(FIXTURE)
  assert length <= model.cfg.index_topk
  tokens_BT = expected['input_ids'][:, :length]
  sparse, dense = (
    _logits(model, variables, tokens_BT, AttentionMode(selector=selector))
    for selector in ('indexer', 'all')
  )
  assert np.abs(sparse - dense).max() < LOGIT_TOLERANCE


def test_load_hf_rows_before_k_equal_dense_attention(expected):
  """T6, the other half: and from k on they differ, or nothing was selected."""
  model, variables = checkpoints.load_hf(FIXTURE)
  dense = _logits(
    model,
    variables,
    expected['input_ids'],
    AttentionMode(selector='all'),
  )
  error_T = np.abs(dense - expected['logits']).max(axis=(0, 2))
  k = model.cfg.index_topk
  assert error_T[:k].max() < LOGIT_TOLERANCE
  assert error_T[k:].max() > 0.1


@pytest.mark.parametrize('swapped', ['mla', 'indexer'])
def test_load_hf_swapped_rotary_layout_fails_parity(
  expected, monkeypatch, swapped
):
  """T2: the two layouts are not interchangeable."""
  model, variables = checkpoints.load_hf(FIXTURE)
  apply = rotary.apply

  def swap(x, positions_BT, inv_freq, *, interleaved):
    return apply(
      x,
      positions_BT,
      inv_freq,
      interleaved=(not interleaved)
      if interleaved == (swapped == 'mla')
      else interleaved,
    )

  monkeypatch.setattr(rotary, 'apply', swap)
  logits = _logits(model, variables, expected['input_ids'])
  assert np.abs(logits - expected['logits']).max() > 1e-2


def test_load_hf_unrolled_variables_hold_the_same_numbers():
  _, scanned = checkpoints.load_hf(FIXTURE)
  model, unrolled = checkpoints.load_hf(FIXTURE, scan_layers=False)
  assert not model.cfg.scan_layers
  for layer in (0, 1):
    _assert_trees_equal(
      unrolled['params']['moe_layers'][f'layer_{layer}'],
      jax.tree.map(
        lambda leaf, i=layer: leaf[i],
        scanned['params']['moe_layers']['layers'],
      ),
    )


def test_load_hf_computes_in_the_dtype_of_the_checkpoint(checkpoint):
  _edit_config(checkpoint, dtype='bfloat16')
  model, variables = checkpoints.load_hf(checkpoint)
  assert model.cfg.precision.compute == 'bfloat16'
  layer = variables['params']['moe_layers']['layers']
  assert layer['attention']['mla']['w_o'].dtype == 'bfloat16'
  assert layer['attention_norm']['scale'].dtype == 'float32'
  bias = variables['router_bias']['moe_layers']['layers']['moe']['router']
  assert bias['e_score_correction_bias'].dtype == 'float32'


def test_load_hf_without_a_dtype_takes_that_of_the_tensors(checkpoint):
  _edit_config(checkpoint, dtype=...)
  model, _ = checkpoints.load_hf(checkpoint)
  assert model.cfg.precision.compute == 'float32'


def test_load_hf_reads_both_spellings_of_the_rotary_settings(checkpoint):
  raw = json.loads((checkpoint / 'config.json').read_text())
  rope = raw['rope_parameters']
  theta = rope.pop('rope_theta')
  rope['type'] = rope.pop('rope_type')
  original = presets.from_hf_json(checkpoint / 'config.json')
  _edit_config(
    checkpoint, rope_parameters=..., rope_scaling=rope, rope_theta=theta
  )
  assert presets.from_hf_json(checkpoint / 'config.json') == original
  _edit_config(checkpoint, rope_theta=50000.0)
  changed = presets.from_hf_json(checkpoint / 'config.json')
  assert changed.rope_theta == 50000.0


def test_load_hf_shards_equal_one_file(checkpoint, weights):
  names = sorted(weights)
  weight_map = {}
  for shard in range(3):
    file = f'model-{shard + 1:05d}-of-00003.safetensors'
    part = {name: weights[name] for name in names[shard::3]}
    safetensors.numpy.save_file(part, checkpoint / file)
    weight_map |= dict.fromkeys(part, file)
  (checkpoint / 'model.safetensors').unlink()
  index = checkpoint / 'model.safetensors.index.json'
  index.write_text(json.dumps({'metadata': {}, 'weight_map': weight_map}))
  _assert_trees_equal(
    checkpoints.load_hf(checkpoint)[1], checkpoints.load_hf(FIXTURE)[1]
  )
  (checkpoint / 'model-00002-of-00003.safetensors').unlink()
  with pytest.raises(FileNotFoundError, match='model-00002-of-00003'):
    checkpoints.load_hf(checkpoint)


def test_load_hf_fused_experts_equal_separate_ones(checkpoint):
  def fuse(tensors):
    for layer in (1, 2):
      prefix = f'model.layers.{layer}.mlp.experts.'
      gate, up, down = (
        np.stack(
          [
            tensors.pop(f'{prefix}{expert}.{kind}_proj.weight')
            for expert in range(8)
          ]
        )
        for kind in ('gate', 'up', 'down')
      )
      tensors[f'{prefix}gate_up_proj'] = np.concatenate([gate, up], axis=1)
      tensors[f'{prefix}down_proj'] = down

  _edit_weights(checkpoint, fuse)
  _assert_trees_equal(
    checkpoints.load_hf(checkpoint)[1], checkpoints.load_hf(FIXTURE)[1]
  )


MTP_COPIES = {
  'model.layers.3.embed_tokens.weight': 'model.embed_tokens.weight',
  'model.layers.3.shared_head.head.weight': 'lm_head.weight',
}


def _add_mtp(tensors):
  """Layer 3 of the published layout: a copy of layer 2 and its own tensors."""
  rng = np.random.default_rng(0)
  for name in [name for name in tensors if '.layers.2.' in name]:
    tensors[name.replace('.layers.2.', '.layers.3.')] = tensors[name]
  for name, shape in {
    'enorm.weight': (64,),
    'hnorm.weight': (64,),
    'shared_head.norm.weight': (64,),
    'eh_proj.weight': (64, 128),
  }.items():
    tensors[f'model.layers.3.{name}'] = rng.normal(size=shape).astype('f4')
  for copy, original in MTP_COPIES.items():
    tensors[copy] = tensors[original].copy()


def test_load_hf_mtp_layer_is_skipped_or_loaded(checkpoint):
  _edit_weights(checkpoint, _add_mtp)
  plain = checkpoints.load_hf(FIXTURE)[1]
  # The config has no MTP module: its tensors are skipped.
  _assert_trees_equal(checkpoints.load_hf(checkpoint)[1], plain)
  _edit_config(checkpoint, num_nextn_predict_layers=1)
  _assert_trees_equal(checkpoints.load_hf(checkpoint, mtp=False)[1], plain)
  model, variables = checkpoints.load_hf(checkpoint)
  assert model.cfg.num_nextn_predict_layers == 1
  tensors = safetensors.numpy.load_file(checkpoint / 'model.safetensors')
  mtp = variables['params']['mtp']
  np.testing.assert_array_equal(
    mtp['w_eh'], tensors['model.layers.3.eh_proj.weight'].T
  )
  np.testing.assert_array_equal(
    mtp['block']['moe']['experts']['w_down'][3],
    tensors['model.layers.2.mlp.experts.3.down_proj.weight'].T,
  )
  assert 'mtp' in variables['router_bias']


@pytest.mark.parametrize('copy', sorted(MTP_COPIES))
def test_load_hf_mtp_copy_may_be_left_out_but_not_differ(checkpoint, copy):
  def change(tensors):
    _add_mtp(tensors)
    tensors[copy][77, 3] += 1

  _edit_config(checkpoint, num_nextn_predict_layers=1)
  _edit_weights(checkpoint, change)
  original = MTP_COPIES[copy].replace('.', r'\.')
  with pytest.raises(ValueError, match=rf'{copy} differs from {original} in'):
    checkpoints.load_hf(checkpoint)
  checkpoints.load_hf(checkpoint, mtp=False)
  _edit_weights(checkpoint, lambda tensors: tensors.pop(copy))
  assert 'mtp' in checkpoints.load_hf(checkpoint)[1]['params']


def test_load_hf_config_with_mtp_but_files_without_loads_the_rest(checkpoint):
  _edit_config(checkpoint, num_nextn_predict_layers=1)
  model, variables = checkpoints.load_hf(checkpoint)
  assert model.cfg.num_nextn_predict_layers == 0
  assert 'mtp' not in variables['params']
  with pytest.raises(ValueError, match=r'mtp: got True.*model\.layers\.3\.'):
    checkpoints.load_hf(checkpoint, mtp=True)


def test_load_hf_missing_and_unexpected_tensors_are_named(checkpoint):
  def rename(tensors):
    tensors['model.layers.0.mlp.extra.weight'] = tensors.pop(
      'model.layers.0.mlp.up_proj.weight'
    )

  _edit_weights(checkpoint, rename)
  with pytest.raises(
    ValueError,
    match=r'1 tensors missing: \S+: model\.layers\.0\.mlp\.up_proj\.weight\. '
    r'1 tensors not part of the model: \S+model\.safetensors: '
    r'model\.layers\.0\.mlp\.extra\.weight',
  ):
    checkpoints.load_hf(checkpoint)


def test_load_hf_wrong_shape_is_refused_with_both_shapes(checkpoint):
  def cut(tensors):
    name = 'model.layers.1.self_attn.q_b_proj.weight'
    tensors[name] = tensors[name][:48].copy()

  _edit_weights(checkpoint, cut)
  with pytest.raises(
    ValueError, match=r'q_b_proj\.weight \(48, 32\) .* \(96, 32\) in the model'
  ):
    checkpoints.load_hf(checkpoint)


def test_load_hf_directory_without_a_checkpoint_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'config\.json'):
    checkpoints.load_hf(tmp_path)
  shutil.copy(FIXTURE / 'config.json', tmp_path)
  with pytest.raises(FileNotFoundError, match='no safetensors file'):
    checkpoints.load_hf(tmp_path)


def test_load_hf_holds_every_number_of_the_file(weights):
  _, variables = checkpoints.load_hf(FIXTURE)
  size = sum(leaf.size for leaf in jax.tree.leaves(variables))
  assert size == sum(value.size for value in weights.values())
  cfg = presets.from_hf_json(FIXTURE / 'config.json')
  assert {tensor.name for tensor in hf_mapping.tensors(cfg)} == set(weights)
