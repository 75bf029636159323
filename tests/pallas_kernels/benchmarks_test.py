"""What bench_kernels.py counts, compares and prints."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.benchmarks import cases, costs, measure
from pallas_kernels.dense_attention import arg_specs as dense_specs
from pallas_kernels.grouped_matmul import arg_specs as grouped_specs

ROOT = pathlib.Path(__file__).resolve().parents[2]
OPS = cases.ops()
SMALL = dense_specs.ArgSpec(
  batch=2,
  num_queries=3,
  num_keys=5,
  num_heads=2,
  width=4,
  value_width=3,
  dtype='float32',
)


def test_limited_pairs_match_a_count_by_hand():
  # Queries 2, 3, 4 of 5 keys see 3, 4, 5 of them.
  assert costs.causal_pairs(3, 5) == 12
  assert costs.limited_pairs(3, 5, 4) == 11
  assert costs.limited_pairs(3, 5, 100) == 12


def test_dense_attention_cost_counts_causal_products_and_arrays():
  forward = costs.dense_attention(SMALL, 'forward', 4)
  assert forward.flops == 2 * (2 * 12) * 2 * (4 + 3)
  q, k, v, out = 2 * 3 * 2 * 4, 2 * 5 * 2 * 4, 2 * 5 * 2 * 3, 2 * 3 * 2 * 3
  assert forward.bytes == 4 * (q + k + v + out)
  both = costs.dense_attention(SMALL, 'gradients', 4)
  # Scores twice, and d_p, d_q, d_k, d_v.
  assert both.flops == 2 * (2 * 12) * 2 * (4 + 3 + 3 * 4 + 2 * 3)


def test_grouped_matmul_cost_does_not_depend_on_experts():
  spec = grouped_specs.TEST_SPECS['ragged_rows']
  forward = costs.grouped_matmul(spec, 'forward', 2)
  assert forward.flops == 2 * 301 * 12 * 20
  assert costs.grouped_matmul(spec, 'gradients', 2).flops == 3 * forward.flops


@pytest.mark.parametrize('name', OPS)
def test_every_shape_has_a_cost(name):
  op = OPS[name]
  for spec in op.specs.values():
    for direction in op.directions:
      cost = op.cost(spec, direction, 2)
      assert cost.bytes > 0
      assert cost.flops > 0 or name == 'select_topk'


def test_error_of_a_right_result_is_small_and_of_a_wrong_one_is_not(
  monkeypatch,
):
  op = OPS['grouped_matmul']
  spec = grouped_specs.TEST_SPECS['ragged_rows']
  arguments = op.make(spec, jnp.float32, 0)
  out = op.function('xla', spec, 'forward')(*arguments)
  assert cases.error(op, spec, 'forward', arguments, out) < 1e-6
  assert cases.error(op, spec, 'forward', arguments, 1.1 * out) > 0.05
  gradients = op.function('xla', spec, 'gradients')(*arguments)
  assert cases.error(op, spec, 'gradients', arguments, gradients) < 1e-6
  # Where the definition does not fit, the first rows stand for all.
  row = op.reference_bytes(spec)
  monkeypatch.setattr(cases, 'REFERENCE_BYTES', 40 * row)
  assert cases.error(op, spec, 'forward', arguments, out) < 1e-6
  wrong = out.at[3].set(0.0)
  assert cases.error(op, spec, 'forward', arguments, wrong) > 0.05
  assert cases.error(op, spec, 'gradients', arguments, gradients) is None


def test_error_of_last_queries_stands_for_all(monkeypatch):
  op = OPS['dense_attention']
  arguments = op.make(SMALL, jnp.float32, 0)
  out = op.function('reference', SMALL, 'forward')(*arguments)
  monkeypatch.setattr(cases, 'REFERENCE_BYTES', 2 * op.reference_bytes(SMALL))
  assert cases.error(op, SMALL, 'forward', arguments, out) < 1e-6
  wrong = jax.tree.map(lambda x: x.at[:, -1].set(0.0), out)
  assert cases.error(op, SMALL, 'forward', arguments, wrong) > 0.1


def test_ceilings_take_the_larger_bound():
  ceilings = measure.Ceilings(flops=10.0, bytes=2.0, dtype='float32', side=8)
  assert ceilings.seconds(20, 2) == 2.0
  assert ceilings.bound(20, 2) == 'matmul'
  assert ceilings.seconds(20, 8) == 4.0
  assert ceilings.bound(20, 8) == 'copy'


def _script(*arguments):
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  environment.pop('XLA_FLAGS', None)
  return subprocess.run(
    (sys.executable, 'experiments/bench_kernels.py', *arguments),
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )


def test_bench_kernels_writes_figures_and_a_plot(tmp_path):
  pytest.importorskip('matplotlib')
  jsonl, plot = tmp_path / 'kernels.jsonl', tmp_path / 'kernels.png'
  done = _script(
    '--ops=grouped_matmul,dense_attention',
    '--shapes=cpu_512',
    '--directions=forward',
    '--rounds=1',
    '--rivals=none',
    f'--jsonl={jsonl}',
    f'--plot={plot}',
  )
  assert done.returncode == 0, done.stderr
  records = [json.loads(line) for line in jsonl.read_text().splitlines()]
  timed = {r['op']: r for r in records if r['implementation'] == 'xla'}
  assert set(timed) == {'grouped_matmul', 'dense_attention'}
  for record in timed.values():
    assert record['ms'] > 0
    assert np.isfinite(record['fraction'])
    assert record['error'] < 1e-5
    assert record['copy_gbps'] > 0
  reasons = {
    r['implementation']: r['unavailable'] for r in records if 'ms' not in r
  }
  assert 'mosaic_gpu' in reasons
  assert plot.stat().st_size > 1000


@pytest.mark.parametrize(
  ('argument', 'message'),
  [
    ('--ops=matmul', "--ops: got 'matmul', expected some of: dense_attention"),
    ('--shapes=huge', "--shapes: got 'huge', expected some of: "),
    ('--implementations=cuda', "got 'cuda', expected some of: "),
    ('--rivals=nobody', "--rivals: got 'nobody', expected some of: "),
  ],
)
def test_bench_kernels_unknown_name_is_one_line_and_exit_1(argument, message):
  done = _script(argument)
  assert done.returncode == 1
  lines = done.stderr.strip().splitlines()
  assert len(lines) == 1, done.stderr
  assert message in lines[0]
