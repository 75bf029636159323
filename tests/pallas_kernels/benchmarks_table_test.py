"""The rows of the table: every one runs, at a size that a CPU can do."""

import dataclasses
import itertools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.benchmarks import (
  cases,
  errors,
  programs,
  records,
  rivals,
  runner,
  table,
)

OPS = cases.ops()
ROWS = {row.name: row for row in table.ROWS}
# Fields of the specs, and what a CPU does in no time. The 8-bit cache knows one
# width only.
SMALL = {
  'num_queries': 8,
  'queries': 8,
  'num_keys': 24,
  'keys': 24,
  'num_heads': 2,
  'heads': 2,
  'index_heads': 2,
  'index_dim': 8,
  'dim': 8,
  'width': 12,
  'topk': 6,
  'k': 6,
  'num_rows': 64,
  'input_dim': 16,
  'output_dim': 8,
  'num_experts': 4,
  'batch': 2,
}


def shrunk(spec):
  sizes = {
    field.name: min(SMALL[field.name], getattr(spec, field.name))
    for field in dataclasses.fields(spec)
    if field.name in SMALL
  }
  if hasattr(spec, 'indexer'):
    sizes['indexer'] = shrunk(spec.indexer)
  return dataclasses.replace(spec, **sizes)


def small_case(name, implementations=('reference',), rivals=()):
  (case,) = runner.table_cases(OPS, [ROWS[name]])
  op = dataclasses.replace(case.op, specs={case.shape: shrunk(case.spec)})
  return dataclasses.replace(
    case,
    op=op,
    implementations=implementations,
    rivals=rivals,
    dtype='float32',
    calls=min(case.calls, 2),
  )


def one_of_each():
  """A row for each op and direction; of the shapes the last."""
  return {(row.op, row.direction): name for name, row in ROWS.items()}.values()


@pytest.mark.slow
@pytest.mark.parametrize('name', one_of_each())
def test_row_of_the_table_runs_at_a_small_size(name):
  case = small_case(name)
  plain = 'xla' if 'xla' in case.op.implementations else 'reference'
  arguments = case.op.make(case.spec, jnp.float32, 0)
  cotangent = None
  if case.direction != 'forward':
    cotangent = case.op.cotangent(case.spec, arguments, 0)
  outputs = case.build(plain)(arguments, cotangent)()
  assert len(outputs) == case.calls
  error = errors.error(
    case.op, case.spec, case.direction, arguments, outputs[0], cotangent
  )
  assert error < 2e-6
  assert case.cost.bytes > 0


@pytest.mark.parametrize(
  'name',
  ['sparse_backward_4k', 'grouped_gradients'],
)
def test_backward_alone_gives_the_gradients_of_jax_grad(name):
  case = dataclasses.replace(small_case(name), direction='backward')
  op, spec = case.op, case.spec
  arguments = op.make(spec, jnp.float32, 0)
  cotangent = op.cotangent(spec, arguments, 0)

  def loss(*some):
    whole = dict(enumerate(arguments)) | dict(
      zip(op.differentiable, some, strict=True)
    )
    out = jax.tree.leaves(op.call('xla', spec, *whole.values()))[0]
    return jnp.sum(out * cotangent)

  some = [arguments[i] for i in op.differentiable]
  gradient = jax.grad(loss, argnums=tuple(range(len(some))))
  desired = jax.jit(gradient)(*some)
  program = programs.build(op, 'xla', spec, 'backward', dtype=jnp.float32)
  (actual,) = program(arguments, cotangent)()
  for a, d in zip(actual, desired, strict=True):
    assert np.linalg.norm(d) > 0.1
    np.testing.assert_allclose(a, d, rtol=1e-5, atol=1e-5)
  # Its error is the same where the definition is asked for parts.
  small = dataclasses.replace(op, reference_bytes=lambda spec: 2**29)
  error = errors.error(small, spec, 'backward', arguments, actual, cotangent)
  assert error < 2e-6
  wrong = (actual[0], 1.1 * actual[1])
  assert errors.error(small, spec, 'backward', arguments, wrong, cotangent) > (
    0.05
  )


def test_selection_that_sees_all_keys_has_no_missing_ones():
  case = small_case('sparse_backward_4k')
  *_, indices = case.op.make(case.spec, jnp.float32, 0)
  assert indices.min() >= 0
  # A causal one does: the first query sees its own key only, of all 24.
  causal = dataclasses.replace(case.spec, sees_all_keys=False, num_queries=24)
  *_, indices = case.op.make(causal, jnp.float32, 0)
  assert (np.asarray(indices[0, 0]) >= 0).sum() == 1
  (scores,) = OPS['select_topk'].make(
    shrunk(OPS['select_topk'].specs['rows_4096_32k']), jnp.float32, 0
  )
  assert np.isfinite(scores).all()


def test_equal_groups_are_equal():
  case = small_case('grouped_forward')
  assert case.op.make(case.spec, jnp.float32, 0)[2].tolist() == [16] * 4


def test_calls_of_one_program_are_different_calls():
  case = small_case('decode_bf16')
  assert case.calls == 2
  arguments = case.op.make(case.spec, jnp.float32, 0)
  outs = [out for out, _ in case.build('reference')(arguments, None)()]
  assert all(np.abs(a - b).max() > 1e-3 for a, b in itertools.pairwise(outs))


FAKE = """
import json, sys
for line in sys.stdin:
  question = json.loads(line)
  what = question['do']
  print('chatter')
  other_work = 'num_rows' in question.get('spec', ())
  remarks = {'remark': 'a fake', 'other_work': other_work}
  answer = {'make': remarks, 'time': {'seconds': 1e-3}}
  print(json.dumps(answer.get(what, {})), flush=True)
"""


def fake_worker(tmp_path: pathlib.Path, text: str = FAKE) -> tuple[str, str]:
  path = tmp_path / 'fake.py'
  path.write_text(text)
  return sys.executable, str(path)


def test_run_takes_turns_with_a_rival_and_renders_the_table(tmp_path):
  names = ('topk_4096x32k', 'grouped_forward')
  todo = [small_case(name, rivals=('torch',)) for name in names]
  todo[1] = dataclasses.replace(todo[1], implementations=('mosaic_gpu',))
  said = []
  settings = runner.Settings(
    worker=fake_worker(tmp_path), rounds=2, is_prepared=True
  )
  measured = list(runner.run(todo, settings, said.append))
  ours, rival, missing, other = measured
  assert ours['row'] == 'topk_4096x32k'
  assert ours['error'] == 0.0
  assert rival['ms'] == pytest.approx(1.0)
  assert rival['remark'] == 'a fake'
  assert ours['ratio'] == pytest.approx(ours['ms'])
  assert len(rival['ms_of_rounds']) == 2
  assert 'Mosaic GPU' in missing['unavailable']
  assert other['ms'] == pytest.approx(1.0)
  # No rate of one that does other work.
  assert 'fraction' in rival
  assert 'fraction' not in other
  assert '1.0000 ms (a fake)' in records.describe(other)
  assert any('ours compiled' in text for text in said)
  lines = table.render(measured).splitlines()
  assert len(lines) == 4
  assert 'top-k 2048, 4096x32k (reference)' in lines[2]
  assert ' 0.60 | 0.33 |' in lines[2]
  assert 'Mosaic GPU' in lines[3]
  path = tmp_path / 'records.jsonl'
  records.append(str(path), ours)
  assert 'ms_of_rounds' in path.read_text()


def test_row_without_its_rival_has_ours_and_the_reason(tmp_path):
  worker = fake_worker(
    tmp_path, 'import sys\nsys.stderr.write("no such GPU\\n")\nsys.exit(3)\n'
  )
  case = small_case('topk_4096x32k', rivals=('torch',))
  settings = runner.Settings(worker=worker, rounds=1, is_prepared=True)
  ours, rival = runner.run([case], settings)
  assert ours['ms'] > 0
  assert 'status 3' in rival['unavailable']
  assert 'no such GPU' in rival['unavailable']
  assert 'no such GPU' in table.render([ours, rival])


def test_table_says_what_a_ratio_reaches():
  row = ROWS['topk_4096x32k']

  def cell(ms):
    measured = [
      {'implementation': 'mosaic_gpu', 'ms': ms, 'fraction': 0.5},
      {'implementation': 'torch', 'is_rival': True, 'ms': 2.0},
    ]
    table.add_ratios(measured, row)
    return table.line(measured[0])[3]

  assert cell(0.5) == '0.25 reaches aim'
  assert cell(1.0) == '0.50 within must'
  assert cell(1.5) == '0.75 misses must'


def test_every_row_names_what_there_is():
  assert len(ROWS) == len(table.ROWS)
  for row in table.ROWS:
    op = OPS[row.op]
    assert row.shape in op.specs
    assert row.direction in op.directions
    assert set(row.implementations) <= set(op.implementations)
    assert (row.rival, row.op, row.direction) in rivals.RIVALS


@pytest.mark.slow
def test_parts_of_the_indexer_loss_make_the_whole():
  spec = shrunk(OPS['indexer_target_selected'].specs['v32_selected_32k'])
  arguments = OPS['indexer_target_selected'].make(spec, jnp.float32, 0)
  q_index, k_index, w_index, q, k, lse, weight, indices = arguments
  g, kl = OPS['indexer_target_selected'].call('reference', spec, *arguments)
  gradients = OPS['indexer_gradients'].call(
    'reference', spec, q_index, k_index, w_index, g, indices
  )
  whole = OPS['indexer_kl_selected']

  @jax.jit
  def loss_and_gradients(*indexer):
    def loss(*indexer):
      others = (q, k[:, :, None], lse, weight, indices)
      return whole.call('xla', spec, *indexer, *others)

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*indexer)

  (_, desired_kl), desired = loss_and_gradients(q_index, k_index, w_index)
  np.testing.assert_allclose(kl, desired_kl, rtol=1e-4, atol=1e-6)
  for a, d in zip(gradients, desired, strict=True):
    assert np.linalg.norm(d) > 1e-3
    assert np.linalg.norm(a - d) < 1e-5 * np.linalg.norm(d)


def test_target_of_all_keys_has_mass_1_on_those_that_are_seen():
  op = OPS['indexer_target_all']
  spec = shrunk(op.specs['v32_4k'])
  (p,) = op.call('reference', spec, *op.make(spec, jnp.float32, 0))
  is_seen = np.isfinite(p)
  assert is_seen.sum(axis=-1)[0].tolist() == [*range(17, 25)]
  np.testing.assert_allclose(np.nansum(p, axis=-1), 1.0, rtol=1e-5)
