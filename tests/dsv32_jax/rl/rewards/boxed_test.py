import pytest

from dsv32_jax.chat import Message
from dsv32_jax.config.rewards import RewardConfig
from dsv32_jax.rl.problems import Problem
from dsv32_jax.rl.rewards import boxed
from dsv32_jax.rl.rewards.scorers import find
from dsv32_jax.rl.rewards.tools import Tools
from dsv32_jax.rl.rewards.types import Job


def job(reference, content):
  problem = Problem(
    id='p',
    domain='mathematics',
    mode='chat',
    messages=(Message(role='user', content='?'),),
    reference={'answer': reference},
    scorer='boxed',
  )
  return Job(problem, Message(role='assistant', content=content))


PLAIN = [
  ('5', r'\boxed{5}', 1.0),
  ('5', r'So it is \boxed{ 5 }.', 1.0),
  ('5', r'\boxed{4}, no, \boxed{5}', 1.0),
  ('5', r'\boxed{5}, no, \boxed{4}', 0.0),
  ('5', r'\boxed{5.0}', 1.0),
  ('5', r'\boxed{10/2}', 1.0),
  ('1/2', r'\boxed{\frac{2}{4}}', 1.0),
  ('1/2', r'\boxed{0.5}', 1.0),
  ('-1/2', r'\boxed{-0.5}', 1.0),
  ('-1/2', r'\boxed{0.5}', 0.0),
  ('5', '5', 0.0),
  ('5', r'\boxed{5', 0.0),
  ('5', r'\boxed{}', 0.0),
  ('5', r'\boxed{' + '5' * 400 + '}', 0.0),
  ('2,3', r'\boxed{2,3}', 1.0),
]
# Arithmetic that is left to do is no answer: it may be the question itself.
UNFINISHED = [
  ('5', r'\boxed{2+3}', 0.0),
  ('5', r'\boxed{7-2}', 0.0),
  ('8', r'\boxed{2^3}', 0.0),
  ('6', r'\boxed{2 \cdot 3}', 0.0),
  ('6', r'\boxed{(2)(3)}', 0.0),
  ('6', r'\boxed{3!}', 0.0),
  ('29/30', r'\boxed{\frac{1}{6}+\frac{4}{5}}', 0.0),
]
SYMBOLIC = [
  ('5', r'\boxed{x=5}', 1.0),
  ('1/2', r'\boxed{50\%}', 1.0),
  ('-2,3', r'\boxed{3, -2}', 1.0),
  ('-2,3', r'\boxed{\{3, -2\}}', 1.0),
  ('-2,3', r'\boxed{3}', 0.0),
  ('-2,3', r'\boxed{3, 2}', 0.0),
  ('(2,3)', r'\boxed{\left(2, 3\right)}', 1.0),
  ('(2,3)', r'\boxed{(3,2)}', 0.0),
  ('5', r'\boxed{5 \text{ or } 6}', 0.0),
  ('5', r'\boxed{\infty}', 0.0),
  ('5', r'\boxed{x}', 0.0),
  ('5', r'\boxed{1/0}', 0.0),
  ('5', r'\boxed{import os}', 0.0),
]


@pytest.fixture(scope='module')
def tools():
  made = Tools(RewardConfig(workers=1, timeout_s=60.0))
  yield made
  made.close()


@pytest.mark.parametrize(('reference', 'content', 'expected'), PLAIN)
def test_plain_answer_is_marked_here(reference, content, expected):
  made = job(reference, content)
  assert boxed.is_plain(made)
  assert boxed.mark_plain(made).score == expected


@pytest.mark.parametrize(('reference', 'content', 'expected'), UNFINISHED)
def test_arithmetic_that_is_left_to_do_is_no_answer(
  reference, content, expected
):
  made = job(reference, content)
  assert boxed.is_plain(made)
  assert boxed.mark_plain(made).score == expected


def test_other_answers_are_marked_by_math_verify(tools):
  pytest.importorskip('math_verify')
  jobs = [job(reference, content) for reference, content, _ in SYMBOLIC]
  assert not any(map(boxed.is_plain, jobs))
  marks = find('boxed')(jobs, tools)
  assert [m.error for m in marks] == [None] * len(marks)
  assert [m.score for m in marks] == [expected for *_, expected in SYMBOLIC]


def test_plain_marks_are_those_of_math_verify():
  pytest.importorskip('math_verify')
  from dsv32_jax.rl.rewards import math_answers

  for reference, content, expected in PLAIN:
    answer = boxed.last_boxed(content)
    if answer and len(answer) < 100:
      assert math_answers.score(reference, answer) == expected, content
