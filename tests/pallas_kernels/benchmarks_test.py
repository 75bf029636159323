"""What bench_kernels.py counts, compares and prints."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.benchmarks import cases, costs, errors, measure
from pallas_kernels.dense_attention import arg_specs as dense_specs
from pallas_kernels.grouped_matmul import arg_specs as grouped_specs
from pallas_kernels.indexer_kl import arg_specs as kl_specs
from pallas_kernels.lightning_indexer import arg_specs as indexer_specs
from pallas_kernels.sparse_mla_attention import arg_specs as sparse_specs

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


SELECTED = kl_specs.ArgSpec(
  batch=2,
  num_queries=3,
  num_keys=5,
  index_heads=2,
  index_dim=4,
  num_heads=3,
  num_key_heads=1,
  width=6,
  topk=4,
  sees_all_keys=True,
)


def test_selections_of_all_keys_have_k_pairs_a_query():
  assert costs.selected_pairs(SELECTED) == 2 * 3 * 4
  causal = dataclasses.replace(SELECTED, sees_all_keys=False)
  # Queries 2, 3, 4 of 5 keys see 3, 4, 5 of them, at most 4 of which count.
  assert costs.selected_pairs(causal) == 2 * (3 + 4 + 4)
  # A key is missed by a query with 1 in 5, by all three with 1 in 125.
  assert costs.selected_keys(SELECTED) == round(2 * 5 * (1 - 1 / 125))


def test_sparse_attention_costs_match_counts_by_hand():
  spec = sparse_specs.ArgSpec(
    batch=16,
    num_queries=8,
    num_keys=64,
    num_heads=2,
    latent_dim=4,
    rope_dim=2,
    topk=4,
    sees_all_keys=True,
  )
  pairs, rows, keys = 16 * 8 * 4, 16 * 8, costs.selected_keys(spec)
  # About 2 in 5 keys, as each of 8 queries has 1 in 16.
  assert 0.4 < keys / (16 * 64) < 0.41
  forward = costs.sparse_mla_attention(spec, 'forward', 2)
  assert forward.flops == 2 * pairs * 2 * (6 + 4)
  small = 4 * rows * 4 + 4 * rows * 2  # Indices and normalisers.
  q, out = rows * 2 * 6, rows * 2 * 4
  assert forward.bytes == 2 * (q + keys * 6 + out) + small
  backward = costs.sparse_mla_attention(spec, 'backward', 2)
  # Scores again, d_p, d_q, d_k and d_v.
  assert backward.flops == 2 * pairs * 2 * (6 + 4 + 6 + 6 + 4)
  # q, kv, out, d_out in; d_q and every row of d_kv out.
  arrays = q + keys * 6 + out + out + q + 16 * 64 * 6
  assert backward.bytes == 2 * arrays + small
  cached = costs.sparse_mla_attention_fp8(spec, 'forward', 2, row_bytes=9)
  assert cached.flops == forward.flops
  assert cached.bytes == forward.bytes - keys * (2 * 6 - 9)


def test_indexer_fp8_cost_counts_bytes_and_fast_products():
  spec = indexer_specs.ArgSpec(batch=2, queries=3, keys=5, heads=2, dim=4)
  cost = costs.lightning_indexer_fp8(spec, 'forward', 2)
  assert cost.flops == 2 * (2 * 12) * 2 * 4
  assert cost.rate == 2
  q, k, w, scale, scores = 2 * 3 * 2 * 4, 2 * 5 * 4, 2 * 3 * 2, 2 * 5, 2 * 3 * 5
  assert cost.bytes == q + k + 4 * (w + scale + scores)


def test_costs_of_parts_of_the_indexer_loss_match_counts_by_hand():
  q_index, k_index, w = 2 * 3 * 2 * 4, 2 * 5 * 4, 2 * 3 * 2
  q, k, lse, rows = 2 * 3 * 3 * 6, 2 * 5 * 6, 2 * 3 * 3, 2 * 3
  pairs = 2 * 3 * 4
  target = costs.indexer_target(SELECTED, 'forward', 2, is_selected=True)
  assert target.flops == 2 * pairs * (3 * 6 + 2 * 4)
  # Beside the inputs: weights, indices; divergence, gradient of the scores.
  assert target.bytes == 2 * (q_index + k_index + w + q + k) + 4 * (
    lse + rows + pairs + rows + pairs
  )
  alone = costs.indexer_target(SELECTED, 'forward', 2, is_selected=False)
  assert alone.flops == 2 * (2 * 12) * 3 * 6
  assert alone.bytes == 2 * (q + k) + 4 * (lse + 2 * 12)
  gradients = costs.indexer_gradients(SELECTED, 'forward', 2)
  assert gradients.flops == 3 * 2 * pairs * 2 * 4
  # Gradient of the scores and indices in; d_q, d_k and d_w out.
  assert gradients.bytes == 2 * (q_index + k_index + w) + 4 * (
    pairs + pairs
  ) + 2 * q_index + 4 * (k_index + w)


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
    if 'backward' in op.directions:
      forward, backward, both = (
        op.cost(spec, direction, 2)
        for direction in ('forward', 'backward', 'gradients')
      )
      assert forward + backward == both


@pytest.mark.slow
def test_error_of_a_right_result_is_small_and_of_a_wrong_one_is_not(
  monkeypatch,
):
  op = OPS['grouped_matmul']
  spec = grouped_specs.TEST_SPECS['ragged_rows']
  arguments = op.make(spec, jnp.float32, 0)
  out = op.forward('xla', spec)(*arguments)
  assert errors.error(op, spec, 'forward', arguments, out) < 1e-6
  assert errors.error(op, spec, 'forward', arguments, 1.1 * out) > 0.05
  cotangent = op.cotangent(spec, arguments, 0)
  again, gradients = op.gradients('xla', spec)(*arguments, cotangent)
  # Returned, or a compiler would leave the forward pass out.
  np.testing.assert_array_equal(again, out)

  def error_of(gradients):
    return errors.error(op, spec, 'gradients', arguments, gradients, cotangent)

  assert error_of(gradients) < 1e-6
  # Where the definition does not fit, the first rows stand for all.
  row = op.reference_bytes(spec)
  monkeypatch.setattr(errors, 'REFERENCE_BYTES', 40 * row)
  assert errors.error(op, spec, 'forward', arguments, out) < 1e-6
  wrong = out.at[3].set(0.0)
  assert errors.error(op, spec, 'forward', arguments, wrong) > 0.05
  # Of gradients, the first expert's, which depend on no other's rows.
  assert error_of(gradients) < 1e-6
  d_x, d_w = gradients
  assert error_of((d_x, 1.1 * d_w)) > 0.05
  assert error_of((d_x.at[0].set(0.0), d_w)) > 0.05


def test_error_of_last_queries_stands_for_all(monkeypatch):
  op = OPS['dense_attention']
  arguments = op.make(SMALL, jnp.float32, 0)
  out = op.forward('reference', SMALL)(*arguments)
  monkeypatch.setattr(errors, 'REFERENCE_BYTES', 2 * op.reference_bytes(SMALL))
  assert errors.error(op, SMALL, 'forward', arguments, out) < 1e-6
  wrong = jax.tree.map(lambda x: x.at[:, -1].set(0.0), out)
  assert errors.error(op, SMALL, 'forward', arguments, wrong) > 0.1


def test_ceilings_take_the_larger_bound():
  ceilings = measure.Ceilings(flops=10.0, bytes=2.0, dtype='float32', side=8)
  assert ceilings.seconds(costs.Cost(20, 2)) == 2.0
  assert ceilings.bound(costs.Cost(20, 2)) == 'matmul'
  assert ceilings.seconds(costs.Cost(20, 8)) == 4.0
  assert ceilings.bound(costs.Cost(20, 8)) == 'copy'
  # float8 products may be twice as fast.
  assert ceilings.seconds(costs.Cost(20, 1, rate=2)) == 1.0


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
    ('--rows=first', "--rows: got 'first', expected some of: decode_bf16"),
  ],
)
def test_bench_kernels_unknown_name_is_one_line_and_exit_1(argument, message):
  done = _script(argument)
  assert done.returncode == 1
  lines = done.stderr.strip().splitlines()
  assert len(lines) == 1, done.stderr
  assert message in lines[0]
