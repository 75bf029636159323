"""bench_layer.py: a process for each step, and what is said when one fails."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def bench(*arguments: str) -> subprocess.CompletedProcess:
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  environment.pop('XLA_FLAGS', None)
  return subprocess.run(
    (sys.executable, 'experiments/bench_layer.py', *arguments),
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.slow
def test_bench_layer_prints_both_modes_and_their_ratio(tmp_path):
  path = tmp_path / 'layer.jsonl'
  done = bench('--preset=tiny', '--lengths=128', '--steps=1', f'--jsonl={path}')
  assert done.returncode == 0, done.stderr
  records = [json.loads(line) for line in path.read_text().splitlines()]
  assert [record['mode'] for record in records] == ['sparse', 'dense']
  assert all(record['finite'] and record['ms'] > 0 for record in records)
  ratio = records[0]['ms'] / records[1]['ms']
  assert f'128 sparse / dense {ratio:.2f}' in done.stdout


@pytest.mark.slow
def test_bench_layer_says_why_a_step_failed_and_goes_on():
  done = bench('--preset=no_such_model', '--lengths=128')
  assert done.returncode == 0, done.stderr
  lines = [line for line in done.stdout.splitlines() if 'failed' in line]
  assert [line.split()[0] for line in lines] == ['sparse', 'dense']
  assert all('no_such_model' in line for line in lines), lines
