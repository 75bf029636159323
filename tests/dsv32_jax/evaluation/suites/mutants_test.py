"""What mutants change, and what is concluded from their calls."""

import pytest

from dsv32_jax.evaluation.suites import mutants


def value_of(program, *arguments):
  names = {}
  exec(program, names)
  return names['f'](*arguments)


@pytest.mark.parametrize(
  'value',
  [True, False, 0, -3, 2.5, '', 'ab', [], [1], (1, 2), {}, {'a': 1}, None],
)
def test_returned_value_is_another_of_the_same_type(value):
  program = mutants.off_by_a_little('def f(x): return x\n', 'f')
  found = value_of(program, value)
  assert found != value
  assert type(found) is type(value) or value is None


def test_each_mutant_changes_one_place():
  program = (
    'def g(x): return x == 7\n'
    'def f(x):\n'
    '  """Not 1 here."""\n'
    '  if x < 1 and x != 5:\n'
    '    return x + 2\n'
    '  return "a"\n'
  )
  found = mutants.mutants(program, 'f')
  for expected in (
    'if not (x < 1 and x != 5):',
    'if x < 1 or x != 5:',
    'if x <= 1 and x != 5:',
    'if x < 1 and x == 5:',
    'if x < 2 and x != 5:',
    'if x < 1 and x != 6:',
    'return x - 2',
    'return x + 3',
    "return 'ax'",
  ):
    assert sum(expected in mutant for mutant in found) == 1, expected
  assert len(found) == len(set(found)) == 9
  assert all('return x == 7' in mutant for mutant in found)
  assert all('Not 1 here.' in mutant for mutant in found)


def test_a_function_that_is_not_there_is_refused():
  with pytest.raises(ValueError, match="got 'h'"):
    mutants.mutants('def f(x): return x', 'h')


@pytest.mark.parametrize(
  ('other', 'passed', 'has_ended', 'expected'),
  [
    ([1, 2, 3], True, False, 'same'),
    ([1, 9], False, False, 'caught'),
    ([1], False, True, 'caught'),
    ([1, 9, 3], True, False, 'missed'),
    ([1, 2], False, False, 'unfounded'),
  ],
)
def test_verdicts_are_held_against_values(other, passed, has_ended, expected):
  found = mutants.compare([1, 2, 3], other, passed=passed, has_ended=has_ended)
  assert found == expected
