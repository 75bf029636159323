"""experiments/evaluate.py on outside suites."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def evaluate(*flags):
  return subprocess.run(
    [sys.executable, ROOT / 'experiments' / 'evaluate.py', *flags],
    capture_output=True,
    text=True,
    env=os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
    timeout=300,
    check=False,
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  ('solutions', 'passed'), [('reference', 5), ('mutated', 0)]
)
def test_solutions_are_scored(tmp_path, solutions, passed):
  path = tmp_path / 'rows.jsonl'
  done = evaluate(
    '--suite=human_eval',
    f'--solutions={solutions}',
    '--problems=5',
    f'--rows_file={path}',
  )
  assert done.returncode == 0, done.stderr
  assert f'{passed} of 5 samples pass' in done.stdout
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert sum(row['passed'] for row in rows) == passed
  assert {row['weights'] for row in rows} == {solutions}


@pytest.mark.slow
@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ((), 'expected --suite or --workdir'),
    (('--suite=human_eval',), 'expected --solutions or --checkpoint'),
    (('--suite=human_eval', '--checkpoint=/x'), 'expected a sealed stage'),
  ],
)
def test_a_wrong_call_is_told_in_one_line(flags, message):
  done = evaluate(*flags)
  assert done.returncode == 1
  lines = done.stderr.strip().splitlines()
  assert len(lines) == 1, done.stderr
  assert message in lines[0]
