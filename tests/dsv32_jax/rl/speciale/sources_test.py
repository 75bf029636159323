import json
import random

import pytest

from dsv32_jax.chat import Message
from dsv32_jax.rl.problems.splits import is_held_out
from dsv32_jax.rl.problems.types import Problem, ProblemSource
from dsv32_jax.rl.speciale import scorers, sources
from dsv32_jax.rl.speciale.analyses import meta_score, parse_analysis
from dsv32_jax.rl.speciale.derivations import Task, check, parse_derivation

SMALL = {'kinds': ['compute', 'solve'], 'numbers': 2}


@pytest.mark.parametrize('mode', ['chat', 'thinking'])
@pytest.mark.parametrize('name', sources.NAMES)
def test_demonstrations_earn_everything(name, mode):
  source = sources.make(name, {'mode': mode})
  assert isinstance(source, ProblemSource)
  for index in range(2):
    problem = source.problem('train', index)
    message = source.demonstration(problem, random.Random(index))
    assert scorers.score(problem, message).total == 1
    assert bool(message.reasoning) == (mode == 'thinking')
    assert json.loads(json.dumps(problem.reference)) == problem.reference


@pytest.mark.parametrize('name', sources.NAMES)
def test_problems_are_the_same_for_the_same_index_and_split_by_task(name):
  source, again = sources.make(name, SMALL), sources.make(name, SMALL)
  other = sources.make(name, SMALL | {'seed': 1})
  differ = 0
  for index in range(2):
    for split in ('train', 'held_out'):
      problem = source.problem(split, index)
      assert problem == again.problem(split, index)
      differ += problem.prompt != other.problem(split, index).prompt
      task = Task(**problem.reference['task'])
      assert is_held_out(task.question) == (split == 'held_out')
      assert is_held_out(problem.prompt) == (split == 'held_out')
      assert 'right' not in problem.prompt
  assert differ >= 2


def test_shown_derivations_have_the_shares_and_faults_that_were_asked_for():
  source = sources.make(
    'speciale/review', SMALL | {'right_share': 0.5, 'faults': ['rule']}
  )
  kinds = []
  for index in range(18):
    reference = source.problem('train', index).reference
    steps = parse_derivation(reference['proof'])
    faults = check(Task(**reference['task']), steps).faults
    kinds.append(faults[0].kind if faults else None)
  assert set(kinds) == {None, 'rule'}
  assert 3 <= kinds.count(None) <= 15


def test_analyses_to_judge_are_of_every_quality():
  source = sources.make('speciale/meta', {})
  qualities = []
  for index in range(18):
    reference = source.problem('train', index).reference
    truth = check(
      Task(**reference['task']), parse_derivation(reference['proof'])
    )
    qualities.append(meta_score(parse_analysis(reference['analysis']), truth))
  assert {qualities.count(q) > 0 for q in (0.0, 0.5, 1.0)} == {True}


def test_what_is_to_be_mended_has_a_fault():
  source = sources.make('speciale/refinement', SMALL)
  for index in range(5):
    reference = source.problem('held_out', index).reference
    steps = parse_derivation(reference['proof'])
    assert check(Task(**reference['task']), steps).faults


@pytest.mark.parametrize(
  ('name', 'options', 'complaint'),
  [
    ('speciale/other', {}, 'name: got'),
    ('speciale/proof', {'kinds': ['guess']}, 'kinds: got'),
    ('speciale/proof', {'kinds': []}, 'kinds: got'),
    ('speciale/review', {'faults': ['typo']}, 'faults: got'),
    ('speciale/review', {'right_share': 1.0}, 'right_share: got'),
    ('speciale/proof', {'numbers': 1}, 'numbers: got 1'),
    ('speciale/proof', {'colour': 1}, 'options: got'),
  ],
)
def test_source_that_cannot_be_made_is_refused(name, options, complaint):
  with pytest.raises(ValueError, match=complaint):
    sources.make(name, options)


def proof_problem():
  return Problem(
    id='p',
    domain='mathematics',
    mode='chat',
    messages=(Message(role='user', content='Compute 2+3.'),),
    reference={'task': {'kind': 'compute', 'start': '2+3', 'target': ''}},
    scorer=scorers.PROOF,
  )


# 0.76 R_Y + 0.24 (1 - |s' - R_Y|) R_meta, with the truth from the program.
@pytest.mark.parametrize(
  ('text', 'total'),
  [
    ('{right} (add)\nscore: 1', 1.0),
    ('{right} (add)\nstep 1: value\nscore: 0', 0.76),
    ('{right} (add)\nscore: 0', 0.76),
    ('{right} (mul)\nscore: 1', 0.38 + 0.24 * 0.5),
    ('{right} (mul)\nstep 1: rule\nscore: 0.5', 0.38 + 0.24),
    ('{right} (mul)\nstep 1: jump\nscore: 0.5', 0.38 + 0.24 * 0.5),
    ('{wrong} (add)\nscore: 1', 0.0),
    ('{wrong} (add)\nstep 1: value\nscore: 0', 0.24),
    ('{wrong} (add)\nstep 1: jump\nscore: 0.5', 0.24 * 0.5 * 0.5),
    ('{right} (add)', 0.0),
    ('score: 1', 0.0),
    ('', 0.0),
  ],
)
def test_proof_earns_by_derivation_and_honesty(text, total):
  problem = proof_problem()
  content = text.format(right='1. 5', wrong='1. 6')
  message = Message(role='assistant', content=content)
  assert scorers.score(problem, message).total == pytest.approx(total)


@pytest.mark.parametrize(
  ('text', 'total'),
  [
    ('step 1: value\nscore: 0', 1.0),
    ('step 1: jump\nscore: 0.5', 0.25),
    ('step 1: form\nscore: 0', 0.5),
    ('score: 1', 0.0),
    ('score: 0.5', 0.0),
    ('step 2: value\nscore: 0', 0.0),
    ('wrong', 0.0),
  ],
)
def test_review_earns_by_score_and_by_what_it_cites(text, total):
  problem = sources.make(
    'speciale/review', {'kinds': ['compute'], 'numbers': 2}
  ).problem('train', 0)
  reference = {
    'task': {'kind': 'compute', 'start': '2+3', 'target': ''},
    'proof': '1. 6 (add)',
  }
  found = scorers.score_review(reference, text)
  assert found.total == pytest.approx(total)
  assert all(0 <= value <= 1 for value in found.components.values())
  assert problem.scorer == scorers.REVIEW


@pytest.mark.parametrize(
  ('analysis', 'text', 'total'),
  [
    ('step 1: value\nscore: 0', 'quality: 1', 1.0),
    ('step 1: form\nscore: 0', 'quality: 1', 0.5),
    ('score: 0', 'quality: 1', 0.0),
    ('score: 0', 'quality: 0', 1.0),
    ('score: 0', 'no', 0.0),
  ],
)
def test_judgement_earns_by_how_near_it_is(analysis, text, total):
  reference = {
    'task': {'kind': 'compute', 'start': '2+3', 'target': ''},
    'proof': '1. 6 (add)',
    'analysis': analysis,
  }
  assert scorers.score_meta(reference, text).total == total


def test_hostile_answers_are_scored_and_cost_little():
  problem = proof_problem()
  bracket = '(' + '+'.join('abcdefghijklmnopqrstuvwxyz') + ')'
  for content in (
    '1. ' + '*'.join([bracket] * 7) + ' (dist)\nscore: 1',
    '1. ' + '(' * 5000 + ' (add)\nscore: 1',
    '\n'.join(f'{n}. 1+1 (add)' for n in range(1, 3000)) + '\nscore: 1',
    '1. ' + '9*' * 150 + '9 (mul)\nscore: 1',
    '\x00\ud7ff',
  ):
    message = Message(role='assistant', content=content)
    assert scorers.score(problem, message).total <= 0.24


def test_problem_of_another_scorer_is_refused():
  problem = proof_problem()
  object.__setattr__(problem, 'scorer', 'exact')
  with pytest.raises(ValueError, match="scorer: got 'exact'"):
    scorers.score(problem, Message(role='assistant', content=''))
