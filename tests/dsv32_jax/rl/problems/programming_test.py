import random

import pytest

from dsv32_jax.rl.problems import expressions
from dsv32_jax.rl.problems.programming import ProgrammingSource


def test_words_say_what_the_expression_does():
  source = ProgrammingSource(level='words', steps=3)
  for index in range(50):
    problem = source.problem('train', index)
    value = 6
    words = problem.prompt.split()
    for word, number in zip(words[::2], map(int, words[1::2]), strict=True):
      if word == 'plus':
        value += number
      elif word == 'minus':
        value -= number
      else:
        assert word == 'times'
        value *= number
    answer = problem.reference['answer']
    assert eval(answer, {'x': 6}) == value, (problem.prompt, answer)


def test_examples_are_those_of_the_answer_and_fix_it():
  source = ProgrammingSource(level='examples')
  for index in range(50):
    problem = source.problem('train', index)
    pairs = [map(int, pair.split('>')) for pair in problem.prompt.split()]
    pairs = [tuple(pair) for pair in pairs]
    for x, y in pairs:
      assert eval(problem.reference['answer'], {'x': x}) == y
    assert len({x for x, _ in pairs}) >= 2  # Two points fix a line.


def test_hidden_inputs_are_not_those_of_the_examples():
  source = ProgrammingSource(level='examples')
  shown = set(range(20))
  hidden = {x for (x,) in source.problem('train', 0).reference['inputs']}
  assert len(hidden - shown) >= 3


def test_solution_of_a_function_gives_what_is_expected():
  source = ProgrammingSource(level='function', steps=3)
  for index in range(50):
    reference = source.problem('train', index).reference
    names: dict = {}
    exec(reference['answer'], names)
    found = [names['f'](*arguments) for arguments in reference['inputs']]
    assert found == reference['expected']


def test_demonstration_thinks_in_thinking_mode_only():
  for level in ('words', 'examples', 'function'):
    source = ProgrammingSource(level=level, mode='thinking')
    problem = source.problem('train', 0)
    reply = source.demonstration(problem, random.Random(0))
    assert reply.reasoning
    assert not source.demonstration(problem, random.Random(0), 'chat').reasoning


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'level': 'hard'}, "level: got 'hard'"),
    ({'steps': 0}, 'steps: got 0'),
    ({'most': 1}, 'most: got 1'),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    ProgrammingSource(**options)


def test_expression_has_the_value_that_python_gives():
  rng = random.Random(0)
  inputs = [0, 1, -7, 40]
  for _ in range(500):
    text = 'x'
    for _ in range(rng.randint(0, 5)):
      sign = rng.choice(['+', '-', '*', '//', '%'])
      number = rng.choice(['x', str(rng.randint(0, 99))])
      text = rng.choice(
        [f'{text}{sign}{number}', f'({text}){sign}{number}', f'-({text})']
      )
    try:
      expected = [eval(text, {'x': x}) for x in inputs]
    except ZeroDivisionError:
      expected = None
    assert expressions.values(text, inputs) == expected, text


@pytest.mark.parametrize(
  'text',
  [
    '',
    'y',
    'x +',
    '2**99999999',
    'x**x',
    '(x)(x)',
    '1 if x else 2',
    '__import__("os")',
    'x/2',
    '[x]',
    '9' * 30,
    '0x10',
    '(' * 150 + 'x' + ')' * 150,
    'x' * 201,
    'x, x',
    '1_0',
  ],
)
def test_anything_else_is_no_expression(text):
  assert expressions.values(text, [1]) is None


def test_nonsense_is_what_python_cannot_read():
  for text in ('x +', 'a b c', '1x', 'def f(x): return x', '\0', '((x)'):
    assert expressions.is_nonsense(text)
  for text in ('x', 'f(x)[1]', '1if x else 2', '(' * 250, '-' * 199 + 'x'):
    assert not expressions.is_nonsense(text)
