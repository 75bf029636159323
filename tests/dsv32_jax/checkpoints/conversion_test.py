"""Hugging Face directories to stages and back; kill -9 on the way."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from dsv32_jax import checkpoints
from dsv32_jax.checkpoints import conversion
from dsv32_jax.config.model import Precision

ROOT = pathlib.Path(__file__).parents[3]
FIXTURES = ROOT / 'tests' / 'fixtures'
SHARDED = FIXTURES / 'hf_sharded'
FP8 = FIXTURES / 'hf_fp8'


def _assert_same_bytes(actual, desired):
  def check(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))

  assert jax.tree.structure(actual) == jax.tree.structure(desired)
  jax.tree.map(check, actual, desired)


def _same_files(one, other):
  names = sorted(file.name for file in one.iterdir())
  assert names == sorted(file.name for file in other.iterdir())
  return all(
    (one / name).read_bytes() == (other / name).read_bytes() for name in names
  )


def test_hf_to_stage_and_back_is_bit_identical(tmp_path):
  source = tmp_path / 'source'
  shutil.copytree(FP8, source)
  (source / 'tokenizer.json').write_text('{"kind": "bytes"}')
  stage = tmp_path / 'run' / 'stages' / 'imported'
  lines = []
  conversion.hf_to_stage(source, stage, report=lines.append)
  assert '83 tensors in 3 files' in lines[0]
  assert '32 of them FP8' in lines[0]
  model, variables = checkpoints.load_stage(stage)
  direct, desired = checkpoints.load_hf(source)
  assert model.cfg == direct.cfg
  _assert_same_bytes(variables, desired)
  tokenizer = tmp_path / 'run' / 'tokenizer' / 'tokenizer.json'
  assert tokenizer.read_text() == '{"kind": "bytes"}'
  # The same again has nothing to do; another source is refused.
  lines.clear()
  conversion.hf_to_stage(source, stage, report=lines.append)
  assert lines[-1].endswith('imported already')
  with pytest.raises(ValueError, match='is not of this import'):
    conversion.hf_to_stage(SHARDED, stage, report=lines.append)
  export = tmp_path / 'export'
  conversion.stage_to_hf(stage, export, report=lines.append)
  _assert_same_bytes(checkpoints.load_hf(export)[1], desired)
  assert (export / 'tokenizer.json').read_text() == '{"kind": "bytes"}'
  with pytest.raises(ValueError, match='exists, expected'):
    conversion.stage_to_hf(stage, export, report=lines.append)


def test_hf_to_stage_in_a_precision_holds_parameters_in_it(tmp_path):
  precision = Precision(param='float32', compute='bfloat16')
  conversion.hf_to_stage(
    FIXTURES / 'hf_no_yarn',
    tmp_path,
    precision=precision,
    report=lambda line: None,
  )
  model, variables = checkpoints.load_stage(tmp_path)
  assert model.cfg.precision == precision
  assert variables['params']['embedding'].dtype == np.float32


def test_hf_to_hf_changes_dtype_and_shards(tmp_path):
  conversion.hf_to_hf(
    FP8, tmp_path / 'wide', max_shard_bytes=50_000, report=lambda line: None
  )
  plan = checkpoints.check_hf(tmp_path / 'wide')
  assert not any(e.dtype == 'F8_E4M3' for e in plan.stored.values())
  assert len({entry.file for entry in plan.stored.values()}) > 3
  _assert_same_bytes(
    checkpoints.load_hf(tmp_path / 'wide')[1], checkpoints.load_hf(FP8)[1]
  )


# The process kills itself where the test says: SIGKILL cannot be caught.
_KILLED = """
import os, signal, sys
from dsv32_jax import checkpoints
from dsv32_jax.checkpoints import conversion, integrity

kind, source, target, where = sys.argv[1:]

def die(*args):
  os.kill(os.getpid(), signal.SIGKILL)

def progress(done, total, what):
  if where != 'never' and where != 'seal' and done >= float(where) * total:
    die()

if where == 'seal':
  integrity.seal = die
if kind == 'import':
  conversion.hf_to_stage(source, target, progress=progress)
else:
  model, variables = checkpoints.load_hf(source, quantized='keep')
  checkpoints.save_hf(
    model, variables, target, quantize='fp8', max_shard_bytes=40_000,
    progress=progress,
  )
"""


def _run(kind, source, target, where):
  return subprocess.run(
    (sys.executable, '-c', _KILLED, kind, source, target, where),
    capture_output=True,
    text=True,
    env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
  )


@pytest.mark.slow
def test_export_killed_and_run_again_is_bit_identical(tmp_path):
  model, variables = checkpoints.load_hf(FP8, quantized='keep')
  whole = tmp_path / 'whole'
  checkpoints.save_hf(
    model, variables, whole, quantize='fp8', max_shard_bytes=40_000
  )
  target = tmp_path / 'export'
  for where in ('0.3', '0.9'):
    killed = _run('export', FP8, target, where)
    assert killed.returncode == -signal.SIGKILL
    assert not target.exists()
  done = _run('export', FP8, target, 'never')
  assert done.returncode == 0, done.stderr
  assert _same_files(whole, target)


@pytest.mark.slow
def test_import_killed_and_run_again_is_bit_identical(tmp_path):
  target = tmp_path / 'run' / 'stages' / 'imported'
  for where in ('0.5', 'seal'):
    killed = _run('import', SHARDED, target, where)
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(checkpoints.CheckpointError):
      checkpoints.load_stage(target)
  done = _run('import', SHARDED, target, 'never')
  assert done.returncode == 0, done.stderr
  _assert_same_bytes(
    checkpoints.load_stage(target)[1], checkpoints.load_hf(SHARDED)[1]
  )


def _convert(*flags):
  return subprocess.run(
    (sys.executable, 'experiments/convert_checkpoint.py', *flags),
    cwd=ROOT,
    capture_output=True,
    text=True,
    env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
  )


@pytest.mark.slow
def test_convert_checkpoint_commands_and_their_status(tmp_path):
  hf, stage = tmp_path / 'hf', tmp_path / 'run' / 'stages' / 'imported'
  made = _convert(f'--synthesize={hf}', '--preset=tiny', '--shards=6')
  assert made.returncode == 0, made.stderr
  assert 'GB' in made.stderr
  verified = _convert(f'--verify={hf}')
  assert verified.returncode == 0, verified.stderr
  assert 'every name, shape and dtype fits' in verified.stdout
  imported = _convert(
    f'--source={hf}', f'--target={stage}', '--param_dtype=float32'
  )
  assert imported.returncode == 0, imported.stderr
  assert 'ETA' in imported.stderr
  exported = _convert(
    f'--source={stage}',
    f'--target={tmp_path / "out"}',
    '--dtype=published',
    '--quantize=fp8',
    '--max_shard_gb=0.0001',
  )
  assert exported.returncode == 0, exported.stderr
  _assert_same_bytes(
    checkpoints.load_hf(tmp_path / 'out')[1], checkpoints.load_hf(hf)[1]
  )
  index = json.loads((hf / 'model.safetensors.index.json').read_text())
  lost = hf / index['weight_map']['lm_head.weight']
  lost.write_bytes(lost.read_bytes()[:-5])
  for flags in (
    (f'--verify={hf}',),
    (f'--source={hf}', f'--target={tmp_path / "new"}', '--to=hf'),
  ):
    failed = _convert(*flags)
    assert failed.returncode == 1
    (line,) = failed.stderr.strip().splitlines()
    assert line.startswith(f'error: {lost}: not a whole safetensors file: ')
    assert not (tmp_path / 'new').exists()
  for flags, message in (
    ((), 'expected --source with --target, --verify or --synthesize'),
    ((f'--source={stage}', '--target=x', '--to=stage'), 'no Hugging Face'),
    ((f'--source={hf}', '--target=x', '--overrides=['), 'overrides: not JSON'),
  ):
    failed = _convert(*flags)
    assert failed.returncode == 1
    assert message in failed.stderr
    assert 'Traceback' not in failed.stderr
