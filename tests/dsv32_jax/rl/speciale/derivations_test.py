import itertools
import random
from typing import get_args

import pytest

from dsv32_jax.rl.speciale.derivations import (
  MAX_STEPS,
  MINOR,
  FaultKind,
  Step,
  Task,
  TaskKind,
  check,
  format_derivation,
  is_simple,
  parse_derivation,
)
from dsv32_jax.rl.speciale.faults import put_fault, put_some_fault
from dsv32_jax.rl.speciale.rules import RULES
from dsv32_jax.rl.speciale.tasks import TaskSize, make_task
from dsv32_jax.rl.speciale.terms import parse_line
from tests.support import line_values

SOLVE = Task(kind='solve', start='2*x+3=7')

# derivation: faults as (step, kind), score.
JUDGED = {
  '1. 2*x=7-3 (move)\n2. 2*x=4 (add)\n3. x=2 (div)': ([], 1),
  '1. 2*x=7-3 (move)\n2. 2*x=5 (add)\n3. 2*x=4 (add)\n4. x=2 (div)': (
    [(2, 'value'), (3, 'value')],
    0,
  ),
  '1. 2*x=7+3 (move)\n2. 2*x=10 (add)\n3. x=5 (div)': ([(1, 'value')], 0),
  '1. 2*x=4 (move)\n2. x=2 (div)': ([(1, 'jump')], 0.5),
  '1. 2*x=7-3 (add)\n2. 2*x=4 (add)\n3. x=2 (div)': ([(1, 'rule')], 0.5),
  '1. 2*x=7-3 (guess)\n2. 2*x=4 (add)\n3. x=2 (div)': ([(1, 'rule')], 0.5),
  '1. 2*x=7-3 (move)\n2. 2*x=4 (add)': ([(2, 'goal')], 0),
  '1. 2*x=4 (move)': ([(1, 'jump'), (1, 'goal')], 0),
  '': ([(0, 'goal')], 0),
  'well\n2. 2*x=7-3 (move)\n3. 2*x=4 (add)\n4. x=2 (div)': (
    [(1, 'form')],
    0,
  ),
  '1. 2*x=7-3 (move)\n3. 2*x=4 (add)': ([(2, 'form'), (2, 'goal')], 0),
  '1. 2*x=7-3 (move)\n2. 2*x==4 (add)\n3. 2*x=4 (add)\n4. x=2 (div)': (
    [(2, 'form')],
    0,
  ),
  # What is asked for came by, but is not the end.
  '1. 2*x=7-3 (move)\n2. 2*x=4 (add)\n3. x=2 (div)\n4. 2=x (flip)': (
    [(4, 'goal')],
    0,
  ),
}


@pytest.mark.parametrize('text', JUDGED)
def test_derivation_has_these_faults_and_no_others(text):
  faults, score = JUDGED[text]
  verdict = check(SOLVE, parse_derivation(text))
  assert [(fault.step, fault.kind) for fault in verdict.faults] == faults
  assert verdict.score == score
  assert len(verdict.notes) == len(faults)


def test_more_steps_than_are_read_are_a_fault():
  flips = [
    f'{n}. {"7=2*x+3" if n % 2 else "2*x+3=7"} (flip)'
    for n in range(1, MAX_STEPS + 50)
  ]
  verdict = check(SOLVE, parse_derivation('\n'.join(flips)))
  assert {fault.kind for fault in verdict.faults} == {'form', 'goal'}
  assert verdict.faults[0].step == MAX_STEPS + 1


def test_line_that_is_too_large_to_compare_is_a_fault_of_form():
  bracket = '(' + '+'.join('abcdefghijklmnopqrstuvwxyz') + ')'
  task = Task(kind='simplify', start='2*(x+1)')
  step = Step(text='*'.join([bracket] * 7), rule='dist')
  assert check(task, [step]).faults[0].kind == 'form'


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('3*x+5', True),
    ('-x-5', True),
    ('x', True),
    ('-4', True),
    ('0', True),
    ('1*x', False),
    ('0*x', False),
    ('x+0', False),
    ('5+3*x', False),
    ('x+x', False),
    ('x*3', False),
    ('2*x+1+1', False),
    ('x=3', False),
  ],
)
def test_simple_is_one_multiple_of_x_then_one_number(text, expected):
  assert is_simple(parse_line(text)) == expected


@pytest.mark.parametrize(
  ('arguments', 'complaint'),
  [
    ({'kind': 'compute', 'start': '1+'}, "start: '1\\+'"),
    ({'kind': 'compute', 'start': 'x=1'}, 'expected a term'),
    ({'kind': 'solve', 'start': 'x+1'}, 'expected an equation'),
    ({'kind': 'prove', 'start': 'a', 'target': ''}, 'target:'),
    ({'kind': 'compute', 'start': '1+1', 'target': '2'}, 'expected none'),
  ],
)
def test_task_that_is_none_is_refused(arguments, complaint):
  with pytest.raises(ValueError, match=complaint):
    Task(**arguments)


@pytest.mark.parametrize('kind', get_args(TaskKind))
def test_generated_derivations_are_right_by_python_too(kind):
  rng = random.Random(kind)
  for _ in range(12):
    task, steps = make_task(kind, TaskSize(), rng)
    lines = [task.start, *(step.text for step in steps)]
    for one, other in itertools.pairwise(lines):
      assert line_values.mean_the_same(one, other), (task, steps)
    assert check(task, steps).faults == ()
    assert parse_derivation(format_derivation(steps)) == steps
    if kind == 'compute':
      assert int(lines[-1]) == eval(task.start)
    elif kind == 'solve':
      assert lines[-1] == f'x={line_values.root(task.start)}'
    elif kind == 'prove':
      assert lines[-1] == task.target


@pytest.mark.parametrize('fault', get_args(FaultKind))
@pytest.mark.parametrize('kind', get_args(TaskKind))
def test_made_faults_are_there_by_python_too(kind, fault):
  rng = random.Random(f'{kind}{fault}')
  found = 0
  for _ in range(8):
    task, right = make_task(kind, TaskSize(), rng)
    judged = put_fault(task, right, fault, rng)
    if judged is None:
      continue
    found += 1
    assert fault in {one.kind for one in judged.verdict.faults}
    agree_with_python(task, judged.steps, judged.verdict)
  assert found >= 2


def agree_with_python(task, steps, verdict):
  """Every step's verdict against values, not against our polynomials."""
  kinds = {}
  for fault in verdict.faults:
    if fault.kind != 'goal':
      kinds[fault.step] = fault.kind
  line = task.start
  for number, step in enumerate(steps, 1):
    if kinds.get(number) == 'form':
      continue
    same = line_values.mean_the_same(line, step.text)
    assert same == (kinds.get(number) != 'value'), (task, steps, verdict)
    if same:
      ways = [
        name
        for name, rule in RULES.items()
        if step.text in map(str, rule.results(parse_line(line)))
      ]
      expected = None if step.rule in ways else 'rule' if ways else 'jump'
      assert kinds.get(number) == expected
    line = step.text
  bad = {fault.kind for fault in verdict.faults}
  assert verdict.score == (0.5 if bad <= MINOR else 0.0)


@pytest.mark.parametrize(
  'count', [15, pytest.param(400, marks=pytest.mark.slow)]
)
def test_every_step_of_random_flawed_derivations_is_judged_as_by_python(count):
  rng = random.Random(count)
  for _ in range(count):
    task, right = make_task(rng.choice(get_args(TaskKind)), TaskSize(), rng)
    once = put_some_fault(task, right, rng)
    twice = put_some_fault(task, once.steps, rng, ('rule', 'form', 'value'))
    for judged in (once, twice):
      if judged.verdict.faults:
        agree_with_python(task, judged.steps, judged.verdict)
