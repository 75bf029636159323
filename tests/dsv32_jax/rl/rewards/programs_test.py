import pytest

from dsv32_jax.agents.sandbox import Program, Result, Sandbox, why_not
from dsv32_jax.chat import Message
from dsv32_jax.rl.problems import make
from dsv32_jax.rl.rewards import programs
from dsv32_jax.rl.rewards.types import Job

if why_not('bubblewrap') and why_not('unshare'):
  pytest.skip('no sandbox works here', allow_module_level=True)


@pytest.fixture(scope='module')
def sandbox():
  with Sandbox() as made:
    yield made


def marks(sandbox, problem, *answers):
  jobs = [
    Job(problem, Message(role='assistant', content=answer))
    for answer in answers
  ]
  return [mark.score for mark in programs.score(jobs, sandbox.run_many)]


def none(given: list[Program]) -> list[Result]:
  raise AssertionError('nothing is to be run')


@pytest.fixture(scope='module')
def expression():
  return make('programming', level='words', steps=2).problem('train', 0)


@pytest.fixture(scope='module')
def function():
  source = make('programming', level='function', steps=2)
  return next(
    problem
    for problem in (source.problem('train', i) for i in range(100))
    if isinstance(problem.reference['expected'][-1], list)
  )


def test_right_expression_is_worked_out_without_a_sandbox(expression):
  answer = expression.reference['answer']
  jobs = [
    Job(expression, Message(role='assistant', content=content))
    for content in (answer, f' 0+{answer} ', f'{answer}+1', '')
  ]
  found = [mark.score for mark in programs.score(jobs, none)]
  assert found == [1.0, 1.0, 0.0, 0.0]


def test_other_expressions_are_run(sandbox, expression):
  answer = expression.reference['answer']
  found = marks(
    sandbox,
    expression,
    f'int({answer})',
    f'(lambda y: {answer})(1)',
    f'```python\n{answer} if True else 0\n```',
    f'{answer} if x < 40 else 0',
    'x x',
    '__import__("os").system("true")',
    'x) or (x',
  )
  assert found == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_function_is_right_on_every_hidden_input_or_wrong(sandbox, function):
  solution = function.reference['answer']
  found = marks(
    sandbox,
    function,
    solution,
    f'Here:\n```python\n{solution}\n```\nDone.',
    f'{solution}\nprint("noise")',
    solution.replace('return xs', 'return xs if len(xs) != 1 else []'),
    'def g(xs): return xs',
    'def f(xs): return None',
    'def f(xs): raise ValueError',
    'def f(xs): return object()',
    'x' * 30_000,
  )
  assert found[:3] == [1.0, 1.0, 1.0]
  assert found[4:] == [0.0] * 5


CHEATS = {
  'equal to everything': (
    'class All(list):\n'
    '  def __eq__(self, other): return True\n'
    'def f(xs): return All()'
  ),
  'patches json': (
    'import json\njson.dumps = lambda value: "[[0]]"\ndef f(xs): return 0'
  ),
  'writes the verdict': (
    'import sys, os\n'
    'sys.stdout.write("1.0\\n{\\"status\\": \\"ok\\"}")\n'
    'def f(xs): os._exit(0)'
  ),
  'looks for what is expected': (
    'import gc, sys\n'
    'def f(xs):\n'
    '  frame = sys._getframe()\n'
    '  while frame:\n'
    '    for value in list(frame.f_locals.values()):\n'
    '      if isinstance(value, dict) and "expected" in value:\n'
    '        return value["expected"][0]\n'
    '    frame = frame.f_back\n'
    '  for value in gc.get_objects():\n'
    '    if isinstance(value, dict) and "expected" in value:\n'
    '      return value["expected"][0]\n'
  ),
  'ends early': 'import sys\nsys.exit(0)',
  'kills': 'import os\ndef f(xs):\n  os.kill(-1, 9)\n  os.kill(1, 9)',
}
SLOW_CHEATS = {
  'spins': 'def f(xs):\n  while True: pass',
  'forks': (
    'import os\n'
    'def f(xs):\n'
    '  while True:\n'
    '    try: os.fork()\n'
    '    except OSError: pass'
  ),
  'floods': 'def f(xs):\n  while True: print("x" * 999)',
}


@pytest.mark.parametrize(
  'cheats', [CHEATS, pytest.param(SLOW_CHEATS, marks=pytest.mark.slow)]
)
def test_cheats_earn_nothing_and_cost_nobody_else(sandbox, function, cheats):
  solution = function.reference['answer']
  answers = [part for cheat in cheats.values() for part in (cheat, solution)]
  found = marks(sandbox, function, *answers)
  assert dict(zip(cheats, found[::2], strict=True)) == dict.fromkeys(cheats, 0)
  assert found[1::2] == [1.0] * len(cheats)


def test_what_is_expected_never_goes_in(function):
  given = []

  def run(asked):
    given.extend(asked)
    return [Result(status='ok')] * len(asked)

  job = Job(function, Message(role='assistant', content='def f(xs): 1'))
  programs.score([job], run)
  (program,) = given
  assert str(function.reference['inputs']) in program.source
  assert str(function.reference['expected'][-1]) not in program.source


def test_sandbox_that_fails_is_an_error_of_its_job(function):
  job = Job(function, Message(role='assistant', content='def f(xs): 1'))
  (mark,) = programs.score(
    [job], lambda given: [Result(status='error', detail='gone')]
  )
  assert mark.score == 0
  assert mark.error == 'the sandbox failed: gone'


@pytest.mark.parametrize(
  ('found', 'expected', 'is_same'),
  [
    (1, 1, True),
    (1.0, 1, True),
    (True, 1, False),
    (1, True, False),
    ([1, [2]], [1, [2]], True),
    ([1], [1, 2], False),
    ('1', 1, False),
    (None, None, True),
    (0, None, False),
    ({'a': 1}, [1], False),
  ],
)
def test_values_are_the_same_only_with_their_type(found, expected, is_same):
  assert programs._same(found, expected) is is_same
