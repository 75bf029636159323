"""bench_attention_blocks.py and cost_curve.py run at `tiny` on a CPU."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  environment.pop('XLA_FLAGS', None)
  return subprocess.run(
    (sys.executable, f'experiments/{script}', *arguments),
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.slow
def test_bench_attention_blocks_prints_both_modes_and_their_ratio(tmp_path):
  path = tmp_path / 'blocks.jsonl'
  done = run(
    'bench_attention_blocks.py',
    '--preset=tiny',
    '--phases=decode',
    '--context=128',
    '--batch=2',
    '--layers=1',
    '--rounds=1',
    '--calls=1',
    f'--jsonl={path}',
  )
  assert done.returncode == 0, done.stderr
  records = [json.loads(line) for line in path.read_text().splitlines()]
  sparse, dense, ratio = records
  assert (sparse['mode'], dense['mode']) == ('sparse', 'dense')
  for record in (sparse, dense):
    assert record['finite']
    assert 0 < record['of_floor'] < 1
  expected = dense['ms'] / sparse['ms']
  assert ratio['dense_over_sparse'] == pytest.approx(expected)
  assert f'dense / sparse {expected:.2f}' in done.stdout


@pytest.mark.slow
def test_cost_curve_measures_extrapolates_and_plots(tmp_path):
  done = run(
    'cost_curve.py',
    '--preset=tiny',
    '--phases=decode',
    '--positions=64,128',
    '--batch=2',
    '--decode_gpus=4',
    '--rounds=1',
    '--calls=1',
    f'--directory={tmp_path}',
  )
  assert done.returncode == 0, done.stderr
  lines = (tmp_path / 'cost_curve.jsonl').read_text().splitlines()
  records = [json.loads(line) for line in lines]
  assert [(r['position'], r['mode']) for r in records] == [
    (64, 'sparse'),
    (64, 'dense'),
    (128, 'sparse'),
    (128, 'dense'),
  ]
  found = json.loads((tmp_path / 'cost_curve.json').read_text())
  last = records[-1]
  seconds = 1e-6 * (last['attention_us'] + last['experts_us'])
  dollars = 1e6 * seconds * 3 * 2 / 3600
  assert found['summary']['decode']['dense'] == pytest.approx(dollars)
  assert 'decode: at 128 tokens' in done.stdout
  assert (tmp_path / 'cost_curve.png').stat().st_size > 10_000


@pytest.mark.parametrize(
  'script', ['bench_attention_blocks.py', 'cost_curve.py']
)
def test_unknown_phase_is_refused_before_work_starts(script):
  done = run(script, '--phases=decoding')
  assert done.returncode != 0
  assert "--phases: got ['decoding']" in done.stderr + done.stdout
