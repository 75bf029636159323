import pytest

from dsv32_jax.agents.synthesis.general import solution
from dsv32_jax.agents.synthesis.general.tools import FunctionTool

TOOL = FunctionTool(
  name='double',
  description='Twice.',
  properties={'n': {'type': 'integer'}},
  function=lambda n: 2 * n,
)


def test_solution_calls_tools_and_the_trace_has_the_calls():
  trace = solution.run(
    'for n in [1, 2]:\n  double(n=double(n=n))', {'double': TOOL}
  )
  assert [arguments['n'] for _, arguments in trace] == [1, 2, 2, 4]


@pytest.mark.parametrize(
  'source',
  [
    'import sqlite3',
    'from os import system',
    'open("x")',
    'eval("1")',
    '__import__("os")',
    'double.__globals__',
    '().__class__.__bases__',
    'f = lambda: 1',
    'while True:\n  double(n=1)',
    'class A:\n  a = 1',
    'with x:\n  double(n=1)',
    'try:\n  double(n=1)\nexcept x:\n  double(n=2)',
    'global x',
    'f"{double.func}"',
    '@double\ndef f():\n  return 1',
    'database.execute("SELECT 1")',
    'del double',
    'x = yield 1',
    'getattr(double, "x")',
    'no python at all',
  ],
)
def test_solution_that_reaches_beyond_the_tools_is_refused(source):
  with pytest.raises(solution.SolutionError):
    solution.check(source, ['double'])
  with pytest.raises(solution.SolutionError):
    solution.run(source, {'double': TOOL})


def test_error_in_a_solution_is_told_with_its_kind():
  with pytest.raises(solution.SolutionError, match='ToolError: double'):
    solution.run('double(m=1)', {'double': TOOL})
