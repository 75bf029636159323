"""Damaged checkpoints: each is refused in one line with file and tensor."""

import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors

from dsv32_jax.checkpoints import check_hf, hf_files
from tests.support import safetensors_files

FIXTURES = pathlib.Path(__file__).parents[2] / 'fixtures'
FP8 = FIXTURES / 'hf_fp8'
O_PROJ = 'model.layers.1.self_attn.o_proj.weight'


@pytest.fixture
def checkpoint(tmp_path):
  """A copy of the FP8 fixture, three shards, that a test may change."""
  path = tmp_path / 'checkpoint'
  shutil.copytree(FP8, path)
  return path


def _home(path, name):
  index = json.loads((path / hf_files.INDEX).read_text())
  return path / index['weight_map'][name]


def _edit(path, name, edit):
  """Changes the tensors of the file that holds one, and the index with it."""
  file = _home(path, name)
  tensors = safetensors_files.load(file)
  edit(tensors)
  safetensors_files.save(tensors, file)
  index = json.loads((path / hf_files.INDEX).read_text())
  index['weight_map'] = {
    tensor: home
    for tensor, home in index['weight_map'].items()
    if home != file.name
  } | dict.fromkeys(tensors, file.name)
  (path / hf_files.INDEX).write_text(json.dumps(index))
  return file


def _refused(path, *parts):
  """The error of the check, which is one line and has all the parts."""
  with pytest.raises((ValueError, FileNotFoundError)) as error:
    check_hf(path)
  line = str(error.value)
  assert '\n' not in line
  for part in parts:
    assert str(part) in line
  return line


def test_scan_agrees_with_safetensors():
  for entry in hf_files.scan(FP8).values():
    with safetensors.safe_open(entry.file, framework='numpy') as reader:
      view = reader.get_slice(entry.name)
      assert list(entry.shape) == view.get_shape()
      assert entry.dtype == view.get_dtype()


def test_reader_rows_are_the_bytes_of_the_tensor():
  stored = hf_files.scan(FP8)[O_PROJ]
  whole = safetensors_files.load(stored.file)[O_PROJ]
  with hf_files.Reader() as reader:
    np.testing.assert_array_equal(
      reader.read(stored, 3, 17).view(np.uint8), whole[3:17].view(np.uint8)
    )
    np.testing.assert_array_equal(
      reader.read(stored).view(np.uint8), whole.view(np.uint8)
    )


def test_check_missing_shard_is_named_with_a_tensor(checkpoint):
  file = _home(checkpoint, O_PROJ)
  lost = json.loads((checkpoint / hf_files.INDEX).read_text())['weight_map']
  first = next(name for name, home in lost.items() if home == file.name)
  file.unlink()
  _refused(checkpoint, file, 'is missing', first)


def test_check_missing_shard_without_an_index_is_named(checkpoint):
  (checkpoint / hf_files.INDEX).unlink()
  check_hf(checkpoint)
  file = _home(FP8, O_PROJ).name
  (checkpoint / file).unlink()
  _refused(checkpoint, checkpoint / file, 'is missing')


def test_check_missing_tensor_is_named(checkpoint):
  _edit(checkpoint, O_PROJ, lambda tensors: tensors.pop(O_PROJ))
  _refused(checkpoint, checkpoint, '1 tensors missing', O_PROJ)


def test_check_missing_scale_is_named(checkpoint):
  scale = f'{O_PROJ}_scale_inv'
  _edit(checkpoint, scale, lambda tensors: tensors.pop(scale))
  _refused(checkpoint, '1 tensors missing', scale)


def test_check_tensor_that_only_the_index_has_is_named(checkpoint):
  file = _home(checkpoint, O_PROJ)
  tensors = safetensors_files.load(file)
  del tensors[O_PROJ]
  safetensors_files.save(tensors, file)
  _refused(checkpoint, f'{file}: {O_PROJ} is missing', hf_files.INDEX)


def test_check_unexpected_tensor_is_named_with_its_file(checkpoint):
  extra = 'model.layers.1.mlp.extra.weight'
  file = _edit(
    checkpoint, O_PROJ, lambda t: t.update({extra: np.ones((2, 2), 'f4')})
  )
  _refused(checkpoint, 'not part of the model', f'{file}: {extra}')


def test_check_scale_of_a_weight_that_is_not_fp8_is_refused(checkpoint):
  def widen(tensors):
    tensors[O_PROJ] = tensors[O_PROJ].astype(np.float32)

  _edit(checkpoint, O_PROJ, widen)
  _refused(checkpoint, 'not part of the model', f'{O_PROJ}_scale_inv')


def test_check_wrong_shape_is_named_with_both_shapes(checkpoint):
  def cut(tensors):
    tensors[O_PROJ] = tensors[O_PROJ][:7].copy()

  file = _edit(checkpoint, O_PROJ, cut)
  _refused(checkpoint, f'{file}: {O_PROJ} (7, 144)', '(40, 144) in the model')


def test_check_wrong_shape_of_scales_is_refused(checkpoint):
  scale = f'{O_PROJ}_scale_inv'
  file = _edit(
    checkpoint, scale, lambda t: t.update({scale: np.ones((2, 2), 'f4')})
  )
  _refused(checkpoint, f'{file}: {scale} (2, 2)', '(1, 2) in the model')


@pytest.mark.parametrize(
  ('dtype', 'spelt'),
  [('int32', 'I32'), ('float64', 'F64'), (ml_dtypes.float8_e5m2, 'F8_E5M2')],
)
def test_check_wrong_dtype_is_named(checkpoint, dtype, spelt):
  name = 'model.layers.0.mlp.up_proj.weight'
  _edit(checkpoint, name, lambda t: t.update({name: t[name].astype(dtype)}))
  # Its scale is one too many then, too.
  file = _home(checkpoint, name)
  _refused(checkpoint, f'{file}: {name} is {spelt}, expected F32 or BF16')


def test_check_fp8_norm_is_refused(checkpoint):
  name = 'model.norm.weight'
  _edit(
    checkpoint,
    name,
    lambda t: t.update({name: t[name].astype(ml_dtypes.float8_e4m3fn)}),
  )
  _refused(checkpoint, name, 'is F8_E4M3')


@pytest.mark.parametrize('lost', [1, 100, 30_000])
def test_check_truncated_file_is_named_with_a_tensor(checkpoint, lost):
  file = _home(checkpoint, O_PROJ)
  file.write_bytes(file.read_bytes()[:-lost])
  line = _refused(checkpoint, file, 'not a whole safetensors file', 'trunc')
  assert 'model.' in line


def test_check_file_cut_in_its_header_is_named(checkpoint):
  file = _home(checkpoint, O_PROJ)
  for count in (0, 5, 100):
    file.write_bytes(_home(FP8, O_PROJ).read_bytes()[:count])
    _refused(checkpoint, file, 'not a whole safetensors file')


def test_check_file_with_bytes_behind_is_named(checkpoint):
  file = _home(checkpoint, O_PROJ)
  file.write_bytes(file.read_bytes() + b'x')
  _refused(checkpoint, file, 'its header describes')


def test_check_flipped_bit_anywhere_in_a_header_is_refused(checkpoint):
  """Or it stands where nobody reads: then nothing is read differently."""
  file = _home(checkpoint, O_PROJ)
  good = file.read_bytes()
  length = 8 + int.from_bytes(good[:8], 'little')
  entries = hf_files.read_header(file)
  taken = refused = 0
  for position in range(0, length, 9):
    bad = bytearray(good)
    bad[position] ^= 1 << (position % 7)
    file.write_bytes(bad)
    message = _problem(checkpoint)
    if message is None:
      taken += 1
      assert hf_files.read_header(file) == entries
    else:
      refused += 1
      assert '\n' not in message
      assert str(checkpoint) in message
  print(f'{refused} refused, {taken} taken of {length} bytes')
  # What is taken is the metadata's text, and blanks at the end.
  assert taken < 12 < refused


def _problem(path):
  try:
    check_hf(path)
  except (ValueError, FileNotFoundError) as error:
    return str(error)
  return None


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('{', 'not JSON'),
    ('[]', 'got list'),
    ('{}', "no 'weight_map'"),
    ('{"weight_map": {"a": "../b"}}', "a is in '../b'"),
  ],
)
def test_scan_damaged_index_is_refused(checkpoint, content, message):
  (checkpoint / hf_files.INDEX).write_text(content)
  _refused(checkpoint, checkpoint / hf_files.INDEX, message)


def test_scan_tensor_in_two_files_is_refused(checkpoint):
  (checkpoint / hf_files.INDEX).unlink()
  copy = checkpoint / 'more.safetensors'
  shutil.copy(_home(FP8, O_PROJ), copy)
  _refused(checkpoint, 'is also in', copy)


def test_check_blocks_of_another_size_are_refused(checkpoint):
  raw = json.loads((checkpoint / 'config.json').read_text())
  raw['quantization_config']['weight_block_size'] = [64, 64]
  (checkpoint / 'config.json').write_text(json.dumps(raw))
  _refused(checkpoint, 'config.json', 'blocks of [64, 64]')
