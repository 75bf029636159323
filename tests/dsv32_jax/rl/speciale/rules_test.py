import itertools

import pytest

from dsv32_jax.rl.speciale.rules import RULES
from dsv32_jax.rl.speciale.terms import parse_line
from tests.support import line_values

# rule: line: every different result.
RESULTS = {
  'add': {
    '1+2+3': ['3+3', '1+5'],
    '7-3': ['4'],
    '2*x+3-3': ['2*x+0'],
    '2*(3+4)=x': ['2*7=x'],
    'x+1': [],
    '2*3': [],
  },
  'mul': {
    '2*3*4': ['6*4', '2*12'],
    '5-2*3': ['5-6'],
    '2*x*3': [],
    '2*(-3)': ['-6'],
  },
  'swap': {
    'a+b': ['b+a'],
    # `-b` is (-1)*b.
    'a-b': ['-b+a', 'a+b*(-1)'],
    'a*b*c': ['b*a*c', 'a*c*b'],
    'a': [],
  },
  'dist': {
    'a*(b+c)': ['a*b+a*c'],
    '(a+b)*c': ['a*c+b*c'],
    '2*(x-3)': ['2*x+2*(-3)'],
    'a-(b+c)': ['a-b-c'],
    '-(x-3)': ['-x+3'],
    '2*(a+b)*c': ['(2*a+2*b)*c', '2*(a*c+b*c)'],
    'a*b': [],
  },
  'fact': {
    'a*c+b*c': ['(a+b)*c'],
    'c*a+c*b': ['c*(a+b)'],
    'x+2*x': ['(1+2)*x'],
    '3*x-x': ['(3-1)*x'],
    'x+x': ['(1+1)*x', 'x*(1+1)'],
    'a*b+c': [],
  },
  'zero': {
    'a+0': ['a'],
    '0+0': ['0'],
    '0*x': ['0'],
    'x*(a+0)=0': ['x*a=0'],
    'a': [],
  },
  'one': {'1*a': ['a'], 'a*1*b': ['a*b'], '1*1': ['1'], '1': []},
  'move': {
    '2*x+3=7': ['3=7-2*x', '2*x=7-3', '2*x+3-7=0'],
    'x=-2': ['0=-2-x', 'x+2=0'],
    'a+b': [],
  },
  'div': {
    '2*x=6': ['x=3'],
    '2*x=7': [],
    '-x=3': ['x=-3'],
    '0*x=0': [],
    'x*2=6': [],
    'x=3': [],
  },
  'flip': {'a=b': ['b=a'], 'a+b': []},
}


@pytest.mark.parametrize('name', RULES)
def test_rule_gives_exactly_these_results(name):
  for line, expected in RESULTS[name].items():
    found = RULES[name].results(parse_line(line))
    assert list(dict.fromkeys(map(str, found))) == expected, line


def small_terms():
  """Every term of up to three of these under + and * with brackets, a text."""
  atoms = ('0', '1', '2', '-1', 'a', 'x')
  pairs = [
    f'{one}{sign}{bracket(other)}'
    for one, other in itertools.product(atoms, repeat=2)
    for sign in '+*'
  ]
  triples = [
    text
    for pair in pairs
    for atom in atoms[1:]
    for text in (
      f'({pair})*{bracket(atom)}',
      f'{atom}*({pair})',
      f'{atom}-({pair})',
      f'{pair}+{bracket(atom)}',
    )
  ]
  return [*atoms, *pairs, *triples]


def bracket(text):
  return f'({text})' if text.startswith('-') else text


@pytest.mark.parametrize('every', [15, pytest.param(1, marks=pytest.mark.slow)])
def test_rules_of_terms_never_change_a_value_on_small_terms(every):
  applied = 0
  for text in small_terms()[::every]:
    line = parse_line(text)
    before = line_values.term_values(text, 'ax')
    for rule in RULES.values():
      for result in set(rule.results(line)):
        applied += 1
        after = line_values.term_values(str(result), 'ax')
        assert after == before, (rule.name, text, str(result))
        assert parse_line(str(result)) == result
  assert applied > 2000 // every


def test_rules_of_equations_never_change_the_solution_on_all_small_ones():
  sides = ('0', '3', 'x', '2*x', '-x', '2*x+3', '3-x', 'x+x')
  applied = 0
  for left, right in itertools.product(sides, repeat=2):
    text = f'{left}={right}'
    before = line_values.root(text)
    for rule in RULES.values():
      for result in set(rule.results(parse_line(text))):
        applied += 1
        assert line_values.root(str(result)) == before, (rule.name, text)
  assert applied > 200
