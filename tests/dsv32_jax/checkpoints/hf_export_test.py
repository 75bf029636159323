"""Exports: what is in the files, that they read back, and what stops them."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

from dsv32_jax import checkpoints
from dsv32_jax.checkpoints import hf_export, hf_files, hf_import, hf_mapping
from dsv32_jax.config import presets
from dsv32_jax.config.training import MeshConfig
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.sharding import mesh as mesh_lib
from tests.support import safetensors_files

ROOT = pathlib.Path(__file__).parents[3]
FIXTURES = ROOT / 'tests' / 'fixtures'
FP8 = FIXTURES / 'hf_fp8'


def _assert_same_bytes(actual, desired):
  def check(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))

  assert jax.tree.structure(actual) == jax.tree.structure(desired)
  jax.tree.map(check, actual, desired)


def _tensors(path):
  found = {}
  for file in sorted(path.glob('*.safetensors')):
    found |= safetensors_files.load(file)
  return found


def _same_files(one, other):
  names = sorted(file.name for file in one.iterdir())
  assert names == sorted(file.name for file in other.iterdir())
  return all(
    (one / name).read_bytes() == (other / name).read_bytes() for name in names
  )


@pytest.mark.parametrize(
  ('name', 'scan_layers'),
  [
    ('hf_fp8', True),
    ('hf_sharded', False),
    *(
      pytest.param(name, scan_layers, marks=pytest.mark.slow)
      for name, scan_layers in (
        ('hf_tiny_v32', True),
        ('hf_tiny_v32', False),
        ('hf_no_yarn', True),
        ('hf_ungrouped', True),
        ('hf_fp8', False),
      )
    ),
  ],
)
def test_save_hf_and_load_hf_are_bit_identical(tmp_path, name, scan_layers):
  model, variables = checkpoints.load_hf(
    FIXTURES / name, scan_layers=scan_layers
  )
  path = tmp_path / 'export'
  checkpoints.save_hf(model, variables, path, max_shard_bytes=50_000)
  again, read = checkpoints.load_hf(path, scan_layers=scan_layers)
  assert again.cfg == model.cfg
  _assert_same_bytes(read, variables)
  if name != 'hf_fp8':
    # And the very tensors of transformers.
    found, desired = _tensors(path), _tensors(FIXTURES / name)
    assert set(found) == set(desired)
    for key, value in desired.items():
      np.testing.assert_array_equal(found[key], value)


def test_save_hf_kept_fp8_writes_the_files_own_bytes(tmp_path):
  model, variables = checkpoints.load_hf(FP8, quantized='keep')
  path = tmp_path / 'export'
  checkpoints.save_hf(model, variables, path, quantize='fp8')
  found, desired = _tensors(path), _tensors(FP8)
  assert set(found) == set(desired)
  for name, value in desired.items():
    if name.endswith('_scale_inv') or value.dtype == ml_dtypes.float8_e4m3fn:
      assert found[name].dtype == value.dtype
      np.testing.assert_array_equal(
        found[name].view(np.uint8), value.view(np.uint8)
      )
  _assert_same_bytes(checkpoints.load_hf(path, quantized='keep')[1], variables)


def test_save_hf_quantises_as_the_published_checkpoint_is(tmp_path):
  """Blocks in numpy as in spec section 3.6; names and dtypes of section 7."""
  model, variables = checkpoints.load_hf(FP8)
  path = tmp_path / 'export'
  checkpoints.save_hf(model, variables, path, quantize='fp8', dtype='published')
  plain = tmp_path / 'plain'
  checkpoints.save_hf(model, variables, plain)
  found, wide = _tensors(path), _tensors(plain)
  for tensor in hf_mapping.tensors(model.cfg):
    value = found[tensor.name]
    if not tensor.fp8:
      assert value.dtype == np.dtype(
        np.float32 if tensor.fp32 else ml_dtypes.bfloat16
      )
      np.testing.assert_array_equal(
        value, wide[tensor.name].astype(value.dtype)
      )
      continue
    scale = found[f'{tensor.name}_scale_inv']
    for i, j in np.ndindex(*scale.shape):
      at = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
      block = wide[tensor.name][at]
      amax = np.float64(max(np.abs(block).max(), 1e-4))
      assert scale[i, j] == 2.0 ** np.ceil(np.log2(amax / 448))
      rounded = np.clip(block / scale[i, j], -448, 448)
      np.testing.assert_array_equal(
        value[at].astype(np.float32),
        rounded.astype(ml_dtypes.float8_e4m3fn).astype(np.float32),
      )
  raw = json.loads((path / 'config.json').read_text())
  assert raw['quantization_config']['weight_block_size'] == [128, 128]
  assert raw['quantization_config']['scale_fmt'] == 'ue8m0'
  assert raw['torch_dtype'] == 'bfloat16'


def test_save_hf_in_small_chunks_writes_the_same(tmp_path, monkeypatch):
  model, variables = checkpoints.load_hf(FP8)
  options = {'quantize': 'fp8', 'max_shard_bytes': 40_000}
  checkpoints.save_hf(model, variables, tmp_path / 'one', **options)
  monkeypatch.setattr(hf_export, '_CHUNK', 4 * 3000)
  checkpoints.save_hf(model, variables, tmp_path / 'other', **options)
  assert _same_files(tmp_path / 'one', tmp_path / 'other')


@pytest.mark.multidevice
@pytest.mark.slow
def test_save_hf_from_a_layout_writes_the_same(tmp_path):
  parallel = mesh_lib.make_parallel(
    MeshConfig(rules='fsdp_expert', data=-1, fsdp=2, expert=2)
  )
  for quantized, quantize in (('dequantize', None), ('keep', 'fp8')):
    for layout in (None, parallel):
      model, variables = checkpoints.load_hf(
        FP8, quantized=quantized, parallel=layout
      )
      path = tmp_path / f'{quantized}_{layout is None}'
      checkpoints.save_hf(model, variables, path, quantize=quantize)
    assert _same_files(
      tmp_path / f'{quantized}_True', tmp_path / f'{quantized}_False'
    )


def _random_model(cfg):
  model = DeepSeekV32(cfg)
  rng = np.random.default_rng(0)
  return model, jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype),
    hf_import.variable_shapes(model),
  )


def test_save_hf_writes_the_mtp_layer_with_its_copies(tmp_path):
  model, variables = _random_model(presets.tiny())
  path = tmp_path / 'export'
  checkpoints.save_hf(model, variables, path)
  found = _tensors(path)
  prefix = 'model.layers.3.'
  np.testing.assert_array_equal(
    found[f'{prefix}embed_tokens.weight'], variables['params']['embedding']
  )
  np.testing.assert_array_equal(
    found[f'{prefix}shared_head.head.weight'],
    variables['params']['lm_head'].T,
  )
  again, read = checkpoints.load_hf(path)
  assert again.cfg == model.cfg
  _assert_same_bytes(read, jax.tree.map(np.asarray, variables))


def test_save_hf_puts_the_tokenizers_files_beside_the_weights(tmp_path):
  model, variables = checkpoints.load_hf(FIXTURES / 'hf_no_yarn')
  home = tmp_path / 'tokenizer'
  home.mkdir()
  for name in ('tokenizer.json', 'config.json', 'model.safetensors'):
    (home / name).write_text(f'"{name}"')
  path = tmp_path / 'export'
  checkpoints.save_hf(model, variables, path, tokenizer=home)
  assert (path / 'tokenizer.json').read_text() == '"tokenizer.json"'
  assert json.loads((path / 'config.json').read_text())['hidden_size'] == 32
  assert not path.with_name('export.partial').exists()


def test_save_hf_into_something_that_exists_is_refused(tmp_path):
  model, variables = checkpoints.load_hf(FIXTURES / 'hf_no_yarn')
  with pytest.raises(ValueError, match='exists, expected the path of a new'):
    checkpoints.save_hf(model, variables, tmp_path)
  with pytest.raises(ValueError, match="dtype: got 'int8'"):
    checkpoints.save_hf(model, variables, tmp_path / 'new', dtype='int8')
  wrong = {**variables, 'params': {**variables['params'], 'more': np.ones(2)}}
  with pytest.raises(ValueError, match=r'params/more has shape \(2,\)'):
    checkpoints.save_hf(model, wrong, tmp_path / 'new')
  assert not list(tmp_path.iterdir())


def test_save_hf_goes_on_from_the_shards_that_are_right(tmp_path):
  model, variables = checkpoints.load_hf(FIXTURES / 'hf_sharded')
  whole = tmp_path / 'whole'
  options = {'max_shard_bytes': 30_000}
  checkpoints.save_hf(model, variables, whole, **options)
  shards = sorted(whole.glob('*.safetensors'))
  assert len(shards) > 3
  # An interrupted export: one shard right, one altered, one cut, others not
  # begun, one in the middle of being written.
  partial = tmp_path / 'again.partial'
  partial.mkdir()
  right, altered, cut = (partial / shard.name for shard in shards[:3])
  right.write_bytes(shards[0].read_bytes())
  changed = bytearray(shards[1].read_bytes())
  changed[-9] ^= 1
  altered.write_bytes(changed)
  cut.write_bytes(shards[2].read_bytes()[:-1])
  (partial / f'{shards[3].name}.part').write_bytes(b'half')
  (partial / 'stale.safetensors').write_bytes(b'of another plan')
  before = right.stat().st_ino, right.stat().st_mtime_ns
  checkpoints.save_hf(model, variables, tmp_path / 'again', **options)
  assert _same_files(whole, tmp_path / 'again')
  after = (tmp_path / 'again' / shards[0].name).stat()
  assert (after.st_ino, after.st_mtime_ns) == before
  assert not partial.exists()


_LIMITED = """
import resource, sys
from dsv32_jax import checkpoints
model, variables = checkpoints.load_hf(sys.argv[1])
if sys.argv[3] != '0':
  resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
  checkpoints.save_hf(model, variables, sys.argv[2], max_shard_bytes=45_000)
except checkpoints.CheckpointError as error:
  sys.exit(f'error: {error}')
"""


@pytest.mark.slow
def test_save_hf_on_a_full_disk_leaves_nothing_that_looks_whole(tmp_path):
  """The system refuses to write on, as it does when the disk is full."""
  target = tmp_path / 'export'

  def export(limit):
    return subprocess.run(
      (
        sys.executable, '-c', _LIMITED, FIXTURES / 'hf_sharded', target,
        str(limit),
      ),
      capture_output=True,
      text=True,
      env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
    )  # fmt: skip

  failed = export(20_000)
  assert failed.returncode == 1
  (line,) = failed.stderr.strip().splitlines()
  assert line.startswith(f'error: {target}.partial/model-00001-of-')
  assert 'model.' in line
  assert 'File too large' in line
  assert not target.exists()
  left = list((tmp_path / 'export.partial').iterdir())
  assert not [file for file in left if not file.name.endswith('.safetensors')]
  assert export(0).returncode == 0
  _assert_same_bytes(
    checkpoints.load_hf(target)[1],
    checkpoints.load_hf(FIXTURES / 'hf_sharded')[1],
  )


def test_save_hf_without_room_is_refused_before_it_writes(
  tmp_path, monkeypatch
):
  model, variables = checkpoints.load_hf(FIXTURES / 'hf_no_yarn')
  real = hf_export.shutil.disk_usage

  def nearly_full(path):
    return real(path)._replace(free=1000)

  monkeypatch.setattr(hf_export.shutil, 'disk_usage', nearly_full)
  with pytest.raises(checkpoints.CheckpointError, match='MB free, expected at'):
    checkpoints.save_hf(model, variables, tmp_path / 'export')
  assert not (tmp_path / 'export').exists()


def test_exported_headers_are_read_by_the_safetensors_package(tmp_path):
  import safetensors

  model, variables = checkpoints.load_hf(FP8)
  path = tmp_path / 'export'
  checkpoints.save_hf(model, variables, path, quantize='fp8')
  file = path / 'model.safetensors'
  with safetensors.safe_open(file, framework='numpy') as reader:
    assert set(reader.keys()) == {e.name for e in hf_files.read_header(file)}
    assert reader.metadata() == {'format': 'pt'}
