import random
import re
from fractions import Fraction

import pytest

from dsv32_jax.rl.problems.mathematics import KINDS, MathematicsSource


def is_right(kind, prompt, answer):
  """Puts the answer into the problem, by another way than it was made."""
  if kind == 'linear':
    a, b, c = re.fullmatch(r'(\d+)x([+-]\d+)=(-?\d+)', prompt).groups()
    return int(a) * int(answer) + int(b) == int(c)
  if kind == 'quadratic':
    left = prompt.removesuffix('=0').replace('x^2', '1x^2')
    left = re.sub(r'([+-])x', r'\g<1>1x', left)
    a, b, c = 0, 0, 0
    for number, power in re.findall(r'([+-]?\d+)(x\^2|x|)', left):
      a += int(number) * (power == 'x^2')
      b += int(number) * (power == 'x')
      c += int(number) * (power == '')
    roots = [int(root) for root in answer.split(',')]
    return len(set(roots)) == 2 and not any(
      a * x * x + b * x + c for x in roots
    )
  if kind == 'fractions':
    parts = re.findall(r'([+-]?)(\d+)/(\d+)', prompt)
    return Fraction(answer) == sum(
      Fraction(int(sign + above), int(below)) for sign, above, below in parts
    )
  if kind == 'system':
    total, difference = map(int, re.findall(r'=(-?\d+)', prompt))
    x, y = map(int, answer.strip('()').split(','))
    return (x + y, x - y) == (total, difference)
  if kind == 'percent':
    share, number = map(int, re.findall(r'\d+', prompt))
    return int(answer) == Fraction(share, 100) * number
  base, first, again, second, added = map(int, re.findall(r'\d+', prompt))
  return base == again and int(answer) == base**first * base**second + added


@pytest.mark.parametrize('kind', KINDS)
def test_answer_solves_the_problem(kind):
  source = MathematicsSource(kinds=(kind,), wording='short', most=30)
  for index in range(60):
    problem = source.problem('train', index)
    answer = problem.reference['answer']
    assert is_right(kind, problem.prompt, answer), (problem.prompt, answer)


@pytest.mark.parametrize('kind', KINDS)
def test_steps_are_true_equations(kind):
  source = MathematicsSource(kinds=(kind,), wording='short', mode='thinking')
  for index in range(30):
    problem = source.problem('train', index)
    steps = problem.reference['steps']
    assert len(steps) >= 1 + (kind != 'fractions')
    for step in steps:
      sides = step.split('=')
      if all(re.fullmatch(r'[-+*/^\d]+', side) for side in sides):
        values = {
          eval(re.sub(r'(\d+)', r'Fraction(\1)', side.replace('^', '**')))
          for side in sides
        }
        assert len(values) == 1, step


def test_full_wording_asks_for_a_box_and_the_demonstration_has_one():
  source = MathematicsSource(mode='thinking')
  problem = source.problem('held_out', 0)
  reply = source.demonstration(problem, random.Random(0))
  assert r'\boxed{}' in problem.prompt
  assert rf'\boxed{{{problem.reference["answer"]}}}' in reply.content
  assert reply.reasoning.startswith('Step 1: ')
  assert not source.demonstration(problem, random.Random(0), 'chat').reasoning


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'kinds': ('topology',)}, "kinds: got 'topology'"),
    ({'kinds': ()}, 'kinds: got none'),
    ({'wording': 'long'}, "wording: got 'long'"),
    ({'most': 1}, 'most: got 1'),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    MathematicsSource(**options)
