"""Rows and the table over them."""

import dataclasses

import pytest

from dsv32_jax.agents.sandbox import SandboxPool
from dsv32_jax.evaluation.suites import human_eval, runner

ROW = runner.Row(
  suite='human_eval',
  problem='HumanEval/0',
  mode='chat',
  strategy='none',
  seed=0,
  weights='a1',
  passed=True,
  tokens=10,
  steps=1,
  status='ok',
)


def row(**fields):
  return dataclasses.replace(ROW, **fields)


def test_references_pass_and_mutated_ones_do_not():
  chosen = human_eval.problems()[:4]
  with SandboxPool(sandboxes=1) as pool:
    right = runner.score(
      runner.reference_samples(chosen), pool, weights='reference'
    )
    wrong = runner.score(
      runner.mutated_samples(chosen), pool, weights='mutated'
    )
  assert [one.problem for one in right] == [one.id for one in chosen]
  assert all(one.passed for one in right)
  assert not any(one.passed for one in wrong)
  assert (right[0].weights, right[0].tokens) == ('reference', 0)


def test_rows_survive_their_file(tmp_path):
  rows = [row(), row(seed=1, passed=False)]
  runner.write(tmp_path / 'made' / 'rows.jsonl', rows)
  assert runner.read(tmp_path / 'made' / 'rows.jsonl') == rows


def test_a_line_that_is_no_row_is_named(tmp_path):
  path = tmp_path / 'rows.jsonl'
  runner.write(path, [row()])
  with path.open('a') as file:
    file.write('{"suite": "x"}\n')
  with pytest.raises(ValueError, match=r'rows.jsonl:2: .*expected a row'):
    runner.read(path)


def test_table_has_a_line_for_each_kind_of_run():
  rows = [
    row(),
    row(seed=1, passed=False, tokens=30),
    row(problem='HumanEval/1', passed=False),
    row(problem='HumanEval/1', seed=1, passed=False),
    row(mode='thinking', steps=3),
  ]
  lines = runner.table(rows, (1, 2)).splitlines()
  assert len(lines) == 4
  chat = [cell.strip() for cell in lines[2].split('|')[1:-1]]
  assert chat[:6] == ['human_eval', 'chat', 'none', 'a1', '2', '4']
  assert chat[6].startswith('0.250 (')
  assert chat[7].startswith('0.500 (')
  assert chat[8:] == ['15.0', '1.0']
  thinking = [cell.strip() for cell in lines[3].split('|')[1:-1]]
  assert (thinking[7], thinking[9]) == ('-', '3.0')


def test_a_sample_in_two_rows_is_refused():
  with pytest.raises(ValueError, match='HumanEval/0 with seed 0 twice'):
    runner.table([row(), row()])


def test_no_rows_are_refused():
  with pytest.raises(ValueError, match='rows: got none'):
    runner.table([])
