import itertools
import random
import re

import pytest

from dsv32_jax.rl.problems.logic import FAMILIES, LogicSource


def solve_order(prompt):
  facts = [fact.split('<') for fact in prompt.split()[1:]]
  letters = sorted({letter for fact in facts for letter in fact})
  found = [
    row
    for row in itertools.permutations(letters)
    if all(row.index(a) < row.index(b) for a, b in facts)
  ]
  return [''.join(row) for row in found]


def solve_truth(prompt):
  first, *facts = prompt.split()[1:]
  read = [re.fullmatch(r'(\w):(\w)([+-])', fact).groups() for fact in facts]
  names = [first[0], *(b for _, b, _ in read)]
  found = []
  for signs in itertools.product((True, False), repeat=len(names)):
    tells = dict(zip(names, signs, strict=True))
    if tells[first[0]] != (first[1] == '+'):
      continue
    if all(tells[a] == (tells[b] == (sign == '+')) for a, b, sign in read):
      found.append(''.join(n + '-+'[tells[n]] for n in names))
  return found


def solve_follow(prompt):
  start, rules = re.fullmatch(r'from (\w): (.*)', prompt).groups()
  leads = dict(rule.split('>') for rule in rules.split())
  while start in leads:
    start = leads[start]
  return [start]


def solve_formula(prompt):
  text = prompt.split()[1]
  # Python's own operators on 0 and 1; a > b is 'not a, or b'.
  text = text.replace('!a', '(1-a)').replace('!b', '(1-b)')
  text = text.replace('>', '<=')
  return [
    ''.join(
      str(int(eval(text, {'a': a, 'b': b})))  # Letters and signs only.
      for a in (0, 1)
      for b in (0, 1)
    )
  ]


SOLVERS = {
  'order': solve_order,
  'truth': solve_truth,
  'follow': solve_follow,
  'formula': solve_formula,
}


@pytest.mark.parametrize('family', FAMILIES)
def test_answer_is_the_only_one(family):
  source = LogicSource(family=family)
  for index in range(40):
    problem = source.problem('train', index)
    if family == 'formula':
      assert re.fullmatch(r'table [ab!&|^>()]+', problem.prompt)
    found = SOLVERS[family](problem.prompt)
    assert found == [problem.reference['answer']], problem.prompt


@pytest.mark.parametrize('family', FAMILIES)
def test_thinking_shows_steps_and_chat_does_not(family):
  source = LogicSource(family=family, mode='thinking')
  problem = source.problem('held_out', 3)
  rng = random.Random(0)
  thinking = source.demonstration(problem, rng)
  chat = source.demonstration(problem, rng, 'chat')
  assert thinking.content == chat.content == problem.reference['answer']
  assert thinking.reasoning
  assert not chat.reasoning


@pytest.mark.parametrize('family', ['order', 'truth', 'follow'])
def test_default_sizes_are_short_and_have_many_prompts(family):
  source = LogicSource(family=family, mode='thinking')
  problems = [source.problem('held_out', index) for index in range(600)]
  assert len({problem.prompt for problem in problems}) > 580
  for problem in problems[:50]:
    reply = source.demonstration(problem, random.Random(0))
    text = problem.prompt + reply.reasoning + reply.content
    assert len(text.encode()) < 72


def test_mixed_has_all_families():
  source = LogicSource(family='mixed')
  starts = {source.problem('train', i).prompt.split()[0] for i in range(60)}
  assert starts == {'order', 'truth', 'from', 'table'}


@pytest.mark.parametrize(
  'options',
  [
    {'family': 'chess'},
    {'family': 'order', 'size': 2},
    {'family': 'follow', 'size': 9},
    {'family': 'mixed', 'size': 4},
    {'mode': 'loud'},
  ],
)
def test_bad_options_are_refused(options):
  name = list(options)[-1]
  with pytest.raises(ValueError, match=f'{name}: got'):
    LogicSource(**options)
