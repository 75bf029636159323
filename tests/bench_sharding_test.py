"""experiments/bench_sharding.py on two virtual devices."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def bench(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    (sys.executable, 'experiments/bench_sharding.py', *arguments),
    cwd=ROOT,
    env={
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
      'PYTHONPATH': str(ROOT),
    },
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_bench_sharding_prints_and_records_a_case(tmp_path):
  path = tmp_path / 'figures.jsonl'
  done = bench(
    *('--preset=tiny', '--cases=expert', '--stages=pretrain', '--rows=1'),
    *('--length=64', '--rounds=1', '--steps=1', '--notrace', f'--jsonl={path}'),
  )
  assert done.returncode == 0, done.stderr
  assert 'efficiency' in done.stdout
  (figures,) = map(json.loads, path.read_text().splitlines())
  assert figures['experts_moved'] == []
  assert figures['bytes']['all-to-all'] > 0
  assert figures['rows'] == 2
  ratio = figures['one_ms'] / figures['many_ms']
  assert figures['efficiency'] == pytest.approx(ratio)


@pytest.mark.slow
def test_bench_sharding_profile_without_a_gpu_is_refused():
  done = bench('--preset=tiny')
  assert done.returncode == 1
  assert '--trace: needs GPUs; give --notrace' in done.stdout + done.stderr
