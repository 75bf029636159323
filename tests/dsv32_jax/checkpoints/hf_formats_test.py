"""Checkpoints of other shapes made with transformers; FP8, kept or not.

The fixtures and what they must give come from
tests/support/transformers_checkpoints.py, with none of our code.
"""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax import DENSE, SPARSE, checkpoints, inference
from dsv32_jax.checkpoints import (
  hf_fill,
  hf_import,
  hf_indexers,
  hf_mapping,
)
from dsv32_jax.config.model import Precision
from dsv32_jax.config.training import MeshConfig
from dsv32_jax.functional import quantization
from dsv32_jax.functional.quantization import QuantizedArray
from dsv32_jax.sharding import mesh as mesh_lib
from dsv32_jax.training import state as state_lib
from tests.support import safetensors_files

FIXTURES = pathlib.Path(__file__).parents[2] / 'fixtures'
FP8 = FIXTURES / 'hf_fp8'
V3 = FIXTURES / 'hf_v3'
LOGIT_TOLERANCE = 1e-5
# The indexer's sizes, which a DeepSeek-V3 file does not have.
SMALL_INDEXER = {'index_n_heads': 8, 'index_head_dim': 8, 'index_topk': 7}


def _is_quantized(leaf):
  return isinstance(leaf, QuantizedArray)


def _assert_same_bytes(actual, desired):
  def check(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))

  assert jax.tree.structure(actual) == jax.tree.structure(desired)
  jax.tree.map(check, actual, desired)


def _dequantized(variables):
  return jax.tree.map(
    lambda x: quantization.dequantize(x) if _is_quantized(x) else x,
    variables,
    is_leaf=_is_quantized,
  )


def _logits(model, variables, tokens_BT, mode):
  def run(variables, tokens_BT):
    return model.apply(variables, tokens_BT, attention=mode).logits_BTV

  return np.asarray(jax.jit(run)(variables, tokens_BT))


def _load(name, **options):
  if name == 'hf_v3':
    options |= {'indexer': 'init', 'overrides': SMALL_INDEXER}
  return checkpoints.load_hf(FIXTURES / name, **options)


@pytest.fixture(scope='module')
def kept():
  return checkpoints.load_hf(FP8, quantized='keep')


@pytest.mark.parametrize(
  'name',
  [
    'hf_ungrouped',
    'hf_fp8',
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in ('hf_no_yarn', 'hf_sharded', 'hf_v3')
    ),
  ],
)
def test_load_hf_further_checkpoint_logits_match_transformers(name):
  model, variables = _load(name)
  expected = np.load(FIXTURES / name / 'expected.npz')
  # Without an indexer transformers is dense.
  mode = DENSE if name == 'hf_v3' else SPARSE
  logits = _logits(model, variables, expected['input_ids'], mode)
  error = np.abs(logits - expected['logits']).max()
  print(f'{name}: largest error {error:.2e}')
  assert error < LOGIT_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
  'name',
  [
    'hf_fp8',
    *(
      pytest.param(name, marks=pytest.mark.exhaustive)
      for name in ('hf_no_yarn', 'hf_ungrouped', 'hf_sharded', 'hf_v3')
    ),
  ],
)
def test_load_hf_further_checkpoint_greedy_ids_match_transformers(name):
  model, variables = _load(name)
  expected = np.load(FIXTURES / name / 'expected.npz')
  ids = expected['greedy_ids']
  new = inference.generate(
    model,
    variables,
    expected['input_ids'][:, : int(expected['prompt_len'])].tolist(),
    max_new_tokens=ids.shape[1],
    attention=DENSE if name == 'hf_v3' else SPARSE,
  )
  np.testing.assert_array_equal(new.tokens_BN, ids)


def test_load_hf_fp8_is_values_times_scales():
  """Every matrix, block by block in numpy, across heads and cuts."""
  model, variables = checkpoints.load_hf(FP8)
  files = {}
  for file in FP8.glob('*.safetensors'):
    files |= safetensors_files.load(file)
  count = 0
  for tensor in hf_mapping.tensors(model.cfg):
    value = files[tensor.name].astype(np.float32)
    scale = files.get(f'{tensor.name}_scale_inv')
    if scale is not None:
      count += 1
      for i, j in np.ndindex(*value.shape):
        value[i, j] *= scale[i // 128, j // 128]
    for target, part in zip(tensor.targets, tensor.split(value), strict=True):
      leaf = variables
      for key in target.path:
        leaf = leaf[key]
      np.testing.assert_array_equal(leaf[target.index], part)
  # 7 of attention and 3 of the dense layer; 7, 4 x 3 and 3 of the other.
  assert count == 32


def test_load_hf_kept_fp8_holds_the_files_values_and_scales(kept):
  _, variables = kept
  mla = variables['params']['moe_layers']['layers']['attention']['mla']
  experts = variables['params']['moe_layers']['layers']['moe']['experts']
  # q_b has 40 rows a head, which straddle blocks: a scale each. The columns
  # keep their blocks.
  assert mla['w_uq'].block == (128, 1, 1)
  assert mla['w_uq'].scale.shape == (1, 1, 4, 24)
  # The cut of kv_a at row 120 is inside a block; its first part starts one.
  assert mla['w_dkv'].block == (128, 128)
  assert mla['w_kr'].block == (128, 1)
  assert mla['w_kr'].scale.shape == (1, 1, 16)
  assert mla['w_o'].block == (1, 1, 128)
  assert experts['w_gate'].block == (128, 128)
  assert experts['w_gate'].scale.shape == (1, 4, 1, 1)
  assert experts['w_gate'].values.dtype == jnp.float8_e4m3fn
  assert not _is_quantized(variables['params']['embedding'])
  _assert_same_bytes(_dequantized(variables), checkpoints.load_hf(FP8)[1])


@pytest.mark.slow
def test_load_hf_kept_fp8_computes_the_same(kept):
  """Scanned, unrolled by hand and unrolled for decoding."""
  model, variables = kept
  tokens_BT = np.load(FP8 / 'expected.npz')['input_ids']
  wide = _logits(*checkpoints.load_hf(FP8), tokens_BT, SPARSE)
  np.testing.assert_array_equal(
    _logits(model, variables, tokens_BT, SPARSE), wide
  )
  unrolled = inference.unroll(model, variables)
  direct = checkpoints.load_hf(FP8, scan_layers=False, quantized='keep')
  _assert_same_bytes(unrolled[1], direct[1])
  error = np.abs(_logits(*unrolled, tokens_BT, SPARSE) - wide).max()
  assert error < LOGIT_TOLERANCE


def test_load_hf_kept_fp8_refuses_to_be_trained(kept):
  model, variables = kept
  tokens_BT = jnp.zeros((1, 4), jnp.int32)

  def loss(params):
    whole = {**variables, 'params': params}
    return model.apply(whole, tokens_BT, attention=DENSE).logits_BTV.sum()

  with pytest.raises(ValueError, match=r'mla/w_dq: got an FP8 matrix.*dequant'):
    jax.eval_shape(jax.grad(loss), variables['params'])

  def of_embedding(embedding):
    return loss({**variables['params'], 'embedding': embedding})

  # What is not trained may be quantised.
  embedding = variables['params']['embedding']
  shape = jax.eval_shape(jax.grad(of_embedding), embedding)
  assert shape.shape == embedding.shape


@pytest.mark.parametrize(
  'quantized', ['dequantize', pytest.param('keep', marks=pytest.mark.slow)]
)
def test_load_hf_large_leaves_in_small_chunks_are_the_same(
  monkeypatch, quantized
):
  """Filled on the device, a few rows at a time, as large parameters are."""
  desired = checkpoints.load_hf(FP8, quantized=quantized)[1]
  # Few, as each is compiled for its shapes.
  monkeypatch.setattr(hf_fill, 'HOST_BYTES', 4000)
  monkeypatch.setattr(hf_import, '_CHUNK', 3000)
  monkeypatch.setattr(hf_fill, '_MAX_SENT', 5000)
  actual = checkpoints.load_hf(FP8, quantized=quantized)[1]
  _assert_same_bytes(actual, desired)


@pytest.mark.multidevice
@pytest.mark.slow
@pytest.mark.parametrize('quantized', ['dequantize', 'keep'])
def test_load_hf_into_a_layout_gives_each_device_its_part(
  monkeypatch, quantized
):
  desired = checkpoints.load_hf(FP8, quantized=quantized)[1]
  parallel = mesh_lib.make_parallel(
    MeshConfig(rules='fsdp_expert', data=-1, fsdp=2, expert=2)
  )
  monkeypatch.setattr(hf_fill, 'HOST_BYTES', 4000)
  _, variables = checkpoints.load_hf(
    FP8, quantized=quantized, parallel=parallel
  )
  _assert_same_bytes(jax.tree.map(np.asarray, variables), desired)
  layers = variables['params']['moe_layers']['layers']
  w_down = layers['moe']['experts']['w_down']
  values = w_down.values if quantized == 'keep' else w_down
  assert values.sharding.shard_shape(values.shape)[1] == 2


def test_load_hf_reports_scales_that_are_no_powers_of_two(tmp_path):
  path = tmp_path / 'checkpoint'
  shutil.copytree(FP8, path)
  lines = []
  checkpoints.load_hf(path, report=lines.append)
  assert lines == [
    '47 block scales, all powers of two (config.json says ue8m0)'
  ]
  name = 'model.layers.1.self_attn.o_proj.weight_scale_inv'
  file = _change(path, name, lambda scale: scale * np.float32([1, 1.5]))
  lines.clear()
  checkpoints.load_hf(path, report=lines.append)
  assert '1 of 47 block scales are not powers of two' in lines[0]
  assert f'{file}: {name}' in lines[0]


@pytest.mark.parametrize('bad', [0.0, -1.0, np.nan, np.inf])
def test_load_hf_impossible_scale_is_refused(tmp_path, bad):
  path = tmp_path / 'checkpoint'
  shutil.copytree(FP8, path)
  name = 'model.layers.1.self_attn.o_proj.weight_scale_inv'
  file = _change(path, name, lambda scale: scale * np.float32([1, 0]) + bad)
  with pytest.raises(ValueError, match=f'{file}: {name} holds values'):
    checkpoints.load_hf(path)


def _change(path, name, edit):
  index = json.loads((path / 'model.safetensors.index.json').read_text())
  file = path / index['weight_map'][name]
  tensors = safetensors_files.load(file)
  tensors[name] = edit(tensors[name]).astype(tensors[name].dtype)
  safetensors_files.save(tensors, file)
  return file


@pytest.mark.slow
def test_load_hf_v3_starts_the_indexers_of_a_fresh_model():
  model, variables = _load('hf_v3', seed=3)
  assert model.cfg.index_n_heads == 8
  fresh = state_lib.init_variables(model, jax.random.key(3))
  found = hf_indexers.only(variables['params'])
  _assert_same_bytes(found, hf_indexers.only(fresh['params']))
  assert jax.tree.structure(variables) == jax.tree.structure(fresh)
  other = _load('hf_v3', seed=4)[1]
  path = ('params', 'moe_layers', 'layers', 'attention')
  for key in path:
    variables, other = variables[key], other[key]
  assert np.any(variables['indexer']['w_iq'] != other['indexer']['w_iq'])
  _assert_same_bytes(variables['mla'], other['mla'])


def test_load_hf_v3_without_being_asked_is_refused():
  with pytest.raises(ValueError, match='missing index_n_heads'):
    checkpoints.load_hf(V3)
  with pytest.raises(ValueError, match=r"indexer\.wq_b.*indexer='init'"):
    checkpoints.load_hf(V3, overrides=SMALL_INDEXER)


def test_load_hf_part_of_an_indexer_is_refused(tmp_path):
  path = tmp_path / 'checkpoint'
  shutil.copytree(FIXTURES / 'hf_no_yarn', path)
  file = path / 'model.safetensors'
  tensors = safetensors_files.load(file)
  name = 'model.layers.1.self_attn.indexer.k_norm.bias'
  del tensors[name]
  safetensors_files.save(tensors, file)
  with pytest.raises(ValueError, match=f'1 tensors missing: .*{name}'):
    checkpoints.load_hf(path)
  with pytest.raises(ValueError, match=r"got 'init', but .*indexer.* is there"):
    checkpoints.load_hf(path, indexer='init')


def test_load_hf_with_a_precision_holds_parameters_in_it():
  precision = Precision(param='bfloat16', compute='bfloat16')
  model, variables = checkpoints.load_hf(FP8, precision=precision)
  assert model.cfg.precision == precision
  assert variables['params']['embedding'].dtype == jnp.bfloat16
  norm = variables['params']['final_norm']['scale']
  assert norm.dtype == jnp.float32


def test_load_hf_overrides_that_the_files_contradict_are_refused():
  with pytest.raises(ValueError, match='of another shape'):
    checkpoints.load_hf(FP8, overrides={'hidden_size': 41})
