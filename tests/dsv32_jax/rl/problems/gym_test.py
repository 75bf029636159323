import itertools
import os
import random
import re
import subprocess
import sys

import pytest

reasoning_gym = pytest.importorskip('reasoning_gym')

from dsv32_jax.rl.problems import gym_datasets, make  # noqa: E402
from dsv32_jax.rl.problems.gym import GymSource  # noqa: E402
from dsv32_jax.rl.problems.gym_short import SHORT  # noqa: E402

FULL = gym_datasets.FULL_MARKS


def marks(source, problems, answers):
  return [
    gym_datasets.score(problem.reference, answer)
    for problem, answer in zip(problems, answers, strict=True)
  ]


@pytest.mark.parametrize('family', sorted(SHORT))
def test_short_family_has_worked_answers_that_its_verifier_takes(family):
  source = GymSource(family, wording='short', mode='thinking')
  problems = [source.problem('train', index) for index in range(25)]
  replies = [source.demonstration(p, random.Random(0)) for p in problems]
  contents = [reply.content for reply in replies]
  assert min(marks(source, problems, contents)) >= FULL
  assert all(reply.reasoning for reply in replies), problems
  assert all(len(p.prompt.encode()) <= 40 for p in problems)
  chat = source.demonstration(problems[0], random.Random(0), 'chat')
  assert (chat.content, chat.reasoning) == (contents[0], '')


@pytest.mark.parametrize('family', sorted(SHORT))
def test_short_family_gives_nothing_for_another_answer(family):
  source = GymSource(family, wording='short')
  problems = [source.problem('train', index) for index in range(25)]
  answers = [str(p.reference['answer']) for p in problems]
  pairs = [
    (problem, answer)
    for problem, answer in zip(problems, answers[1:] + answers[:1], strict=True)
    if answer != str(problem.reference['answer'])
  ]
  assert len(pairs) >= 8
  assert max(marks(source, *zip(*pairs, strict=True))) < FULL
  assert marks(source, problems[:1], ['']) == [0.0]


@pytest.mark.parametrize('family', ['chain_sum', 'products', 'gcd', 'lcm'])
def test_worked_steps_are_true_equations_and_end_in_the_answer(family):
  options = {'max_terms': 4} if family == 'chain_sum' else {}
  source = GymSource(family, wording='short', mode='thinking', **options)
  for index in range(40):
    problem = source.problem('train', index)
    reply = source.demonstration(problem, random.Random(0))
    for step in reply.reasoning.split():
      left, sign, right = step.partition('=')
      assert re.fullmatch(r'[-+*/%\d]+', left), step
      value = eval(left)  # Written by this project, checked above.
      assert value == int(right if sign else reply.content), step
    if family in ('chain_sum', 'lcm'):
      assert reply.reasoning.endswith(f'={reply.content}')


def test_problem_is_the_same_every_time_and_another_with_another_seed():
  made = [
    [GymSource('gcd', seed=seed).problem('train', i) for i in range(10)]
    for seed in (3, 3, 4)
  ]
  assert made[0] == made[1]
  assert made[0] != made[2]
  assert len({problem.id for problem in made[0] + made[2]}) == 20


def test_problem_in_both_modes_has_one_prompt_and_two_names():
  source = GymSource('gcd')
  chat, thinking = (source.problem('train', 5, m) for m in ('chat', 'thinking'))
  assert (chat.mode, thinking.mode) == ('chat', 'thinking')
  assert chat.prompt == thinking.prompt
  assert chat.id != thinking.id


def test_partial_credit_is_not_full_marks():
  source = GymSource('spell_backward', wording='short')
  problem = source.problem('train', 0)
  answer = problem.reference['answer']
  (mark,) = marks(source, [problem], [answer[:-1] + '?'])
  assert 0 < mark < FULL


def test_verifier_that_raises_gives_nothing():
  source = GymSource('prime_factorization')
  problem = source.problem('train', 0)
  item = gym_datasets.item(
    'prime_factorization', '{}', problem.reference['index']
  )
  with pytest.raises(ValueError, match='two'):
    gym_datasets.dataset('prime_factorization', '{}').score_answer('two', item)
  assert marks(source, [problem], ['two']) == [0.0]


@pytest.mark.parametrize('family', sorted(gym_datasets.REFUSED))
def test_refused_family_says_why(family):
  with pytest.raises(ValueError, match=f"got '{family}', but it") as raised:
    make(f'gym/{family}')
  assert '\n' not in str(raised.value)


# Why families are refused: if a later release mends one, its test fails.


def raw(family, index=0, **options):
  dataset = reasoning_gym.create_dataset(family, seed=0, **options)
  return dataset, dataset[index]


def test_game_of_life_halting_still_takes_anything():
  dataset, item = raw('game_of_life_halting')
  assert dataset.score_answer('bananas', item) == 1.0


def test_coin_flip_still_takes_a_leading_digit():
  dataset, item = raw('coin_flip', index=1)
  assert item['answer'].startswith('0.')
  assert dataset.score_answer('0', item) == 1.0


def test_puzzle24_still_takes_numbers_of_another_item():
  dataset, item = raw('puzzle24')
  assert dataset.score_answer('1*2*3*4', item) == 1.0


def test_string_insertion_still_runs_the_answer(tmp_path):
  dataset, item = raw('string_insertion')
  path = tmp_path / 'written'
  dataset.score_answer(f"__import__('os').mkdir({str(path)!r})", item)
  assert path.exists()


@pytest.mark.parametrize(
  'family', ['countdown', 'polynomial_multiplication', 'simple_integration']
)
def test_symbolic_families_still_run_the_answer(family, tmp_path):
  dataset, item = raw(family)
  path = tmp_path / 'written'
  dataset.score_answer(f"__import__('os').mkdir({str(path)!r})", item)
  assert path.exists()


def test_syllogism_still_has_wrong_labels():
  dataset = reasoning_gym.create_dataset(
    'syllogism', seed=0, size=100, inversion_probability=0.0
  )
  wrong = 0
  for index in range(100):
    meta = dataset[index]['metadata']
    statements = [meta[k] for k in ('premise1', 'premise2', 'conclusion')]
    wrong += follows(*statements) != meta['is_valid']
  assert wrong > 0


def follows(*statements):
  """Whether the last follows from the others, by trying every Venn diagram."""
  read = []
  terms: list[str] = []
  for text in statements:
    sign, a, b = re.fullmatch(
      r'(All|No|Some) (\w+) are (?:not )?(\w+)', text
    ).groups()
    if ' are not ' in text:
      sign = 'Some not'
    terms += [term for term in (a, b) if term not in terms]
    read.append((sign, terms.index(a), terms.index(b)))
  regions = list(itertools.product((0, 1), repeat=len(terms)))
  for full in itertools.product((0, 1), repeat=len(regions)):
    there = [r for r, is_full in zip(regions, full, strict=True) if is_full]
    if any(not any(r[i] for r in there) for i in range(len(terms))):
      continue  # Terms name something, as Aristotle has it.
    truth = [holds(statement, there) for statement in read]
    if all(truth[:-1]) and not truth[-1]:
      return False
  return True


def holds(statement, there):
  sign, a, b = statement
  both = any(r[a] and r[b] for r in there)
  only = any(r[a] and not r[b] for r in there)
  return {
    'All': not only,
    'No': not both,
    'Some': both,
    'Some not': only,
  }[sign]


# Bad input.


@pytest.mark.parametrize(
  ('name', 'options', 'message'),
  [
    ('gym/nonsense', {}, "family: got 'nonsense'"),
    ('gym/gcd', {'min_value': 'a'}, 'options: gcd does not take'),
    ('gym/gcd', {'max_nonsense': 3}, 'options: gcd does not take'),
    ('gym/gcd', {'min_numbers': 5}, 'options: gcd does not take'),
    ('gym/zebra_puzzles', {'wording': 'short'}, "wording: got 'short'"),
    ('gym/gcd', {'wording': 'long'}, "wording: got 'long'"),
    ('gym/gcd', {'mode': 'loud'}, "mode: got 'loud'"),
    ('gym/gcd', {'size': 5}, 'options.size'),
  ],
)
def test_bad_options_are_refused(name, options, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    make(name, **options)


def test_thinking_demonstration_of_a_family_without_steps_is_refused():
  source = GymSource('zebra_puzzles', mode='thinking')
  problem = source.problem('train', 0)
  with pytest.raises(ValueError, match='no program here works out'):
    source.demonstration(problem, random.Random(0))


@pytest.mark.slow
# Of the library: it leaves a file of its data open.
@pytest.mark.filterwarnings('ignore:.*unclosed file')
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_every_family_makes_problems_and_takes_its_own_answers():
  slow = {'futoshiki', 'sokoban', 'rush_hour', 'zebra_puzzles'}
  for family in gym_datasets.families():
    if family in slow:
      continue
    source = GymSource(family)
    problem = source.problem('train', 0)
    answer = problem.reference['answer']
    if answer is not None:
      assert gym_datasets.score(problem.reference, str(answer)) >= FULL, family
    assert gym_datasets.score(problem.reference, '') == 0.0, family


_PRINT_PROBLEMS = """
import hashlib, random
from dsv32_jax.rl import problems
slow = {'gym/futoshiki', 'gym/sokoban', 'gym/rush_hour', 'gym/zebra_puzzles'}
for name in problems.names():
  if name not in slow:
    source = problems.make(name)
    found = [repr(source.problem('train', index)) for index in range(12)]
    print(name, hashlib.sha256(repr(found).encode()).hexdigest())
"""


@pytest.mark.slow
def test_problems_of_every_source_do_not_depend_on_the_process():
  """A resumed run is another process, and has another hash seed."""
  processes = [
    subprocess.Popen(
      [sys.executable, '-W', 'ignore', '-c', _PRINT_PROBLEMS],
      env=os.environ | {'PYTHONHASHSEED': seed},
      stdout=subprocess.PIPE,
      text=True,
    )
    for seed in ('1', '2')
  ]
  first, second = (process.communicate()[0] for process in processes)
  assert [process.returncode for process in processes] == [0, 0]
  assert len(first.splitlines()) > 80
  assert first == second
