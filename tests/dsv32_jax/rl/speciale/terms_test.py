import random

import pytest

from dsv32_jax.rl.speciale.terms import (
  Number,
  TermError,
  Variable,
  add,
  means_the_same,
  multiply,
  negate,
  parse,
  parse_line,
  polynomial,
)
from tests.support import line_values


def random_term(rng, depth=3):
  if depth == 0 or rng.random() < 0.3:
    return (
      Variable(rng.choice('abx'))
      if rng.random() < 0.5
      else Number(rng.randint(-3, 12))
    )
  join = rng.choice((add, multiply))
  parts = [random_term(rng, depth - 1) for _ in range(rng.randint(2, 3))]
  term = join(parts)
  return negate(term) if rng.random() < 0.2 else term


# text: how it is printed.
READ = {
  'a-(b+3)*2': 'a-(b+3)*2',
  '-1*3': '-1*3',
  '2*(-3)': '2*(-3)',
  '-(a+b)*c': '-(a+b)*c',
  'a*(-2*b)': 'a*(-2)*b',
  '((a))': 'a',
  '-0': '0',
  '-(2*b)': '-2*b',
  '-(-b)': 'b',
  'a-(-b)': 'a+b',
  '(a+b)+c': 'a+b+c',
  '2*(a*b)': '2*a*b',
  ' 2 * x + 3 = 7 ': '2*x+3=7',
  '007': '7',
}


@pytest.mark.parametrize('text', READ)
def test_line_prints_without_needless_brackets(text):
  assert str(parse_line(text)) == READ[text]
  assert parse_line(READ[text]) == parse_line(text)


# text: part of the complaint.
REFUSED = {
  '': 'got the end',
  'a+': 'got the end',
  '+a': "got '+'",
  'a--b': "got '-'",
  '2*-3': "got '-'",
  'a b': "got 'b' behind a term",
  '2a': "got 'a' behind a term",
  '(a': 'expected a bracket',
  'a)': "got ')' behind",
  '()': "got ')'",
  'A': "got 'A'",
  'a/b': "got '/'",
  '1.5': "got '.'",
  '1=2=3': "2 signs '='",
  '=1': 'got the end',
  '9' * 10: '10 digits',
  '(' * 30 + 'a' + ')' * 30: 'brackets in each other',
  'a+' * 300 + 'a': '601 characters',
  '٣': "got '٣'",
}


@pytest.mark.parametrize('text', REFUSED)
def test_text_that_is_no_line_is_refused(text):
  with pytest.raises(TermError) as error:
    parse_line(text)
  assert REFUSED[text] in str(error.value)


def test_random_terms_read_back_as_printed_and_mean_what_python_says():
  rng = random.Random(0)
  for _ in range(60):
    term = random_term(rng)
    text = str(term)
    assert parse(text) == term, text
    grid = line_values.term_values(text, 'abx')
    form = polynomial(term)
    points = [
      (a, b, x)
      for a in line_values.VALUES
      for b in line_values.VALUES
      for x in line_values.VALUES
    ]
    for point, value in list(zip(points, grid, strict=True))[::17]:
      names = dict(zip('abx', point, strict=True))
      total = 0
      for letters, factor in form.items():
        for letter in letters:
          factor = factor * names[letter]
        total += factor
      assert total == value, (text, point)


def test_terms_mean_the_same_exactly_where_values_agree():
  rng = random.Random(1)
  same = 0
  for _ in range(150):
    one = str(random_term(rng, depth=2))
    other = one if rng.random() < 0.2 else str(random_term(rng, depth=2))
    agrees = line_values.mean_the_same(one, other)
    same += agrees
    assert means_the_same(parse(one), parse(other)) == agrees, (one, other)
  assert 20 < same < 130


def test_linear_equations_mean_the_same_exactly_where_roots_agree():
  rng = random.Random(2)
  same = 0
  for _ in range(150):
    a, b, c, k = (rng.choice((-3, -2, -1, 1, 2, 3)) for _ in range(4))
    one = f'{a}*x-({b})={c}'
    if rng.random() < 0.5:
      other = f'{c * k}+({k})*({b})={a * k}*x'
    else:
      other = f'{b}*x+({a})={k}'
    agrees = line_values.root(one) == line_values.root(other)
    same += agrees
    assert means_the_same(parse_line(one), parse_line(other)) == agrees
  assert 60 < same < 140


def test_equation_and_term_never_mean_the_same():
  assert not means_the_same(parse_line('x=3'), parse_line('x-3'))
  assert not means_the_same(parse_line('0=0'), parse_line('0=1'))
  assert means_the_same(parse_line('x=x'), parse_line('0=0'))


def test_polynomial_of_a_short_text_with_many_parts_is_refused():
  bracket = '(' + '+'.join('abcdefghijklmnopqrstuvwxyz') + ')'
  text = '*'.join([bracket] * 7)
  assert len(text) <= 400
  with pytest.raises(TermError, match='more than 500 products'):
    polynomial(parse(text))
