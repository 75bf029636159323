import random

import pytest

from dsv32_jax.rl import problems
from dsv32_jax.rl.problems import registry
from dsv32_jax.rl.rewards import rubric


def test_names_make_sources_that_meet_the_protocol():
  for name in ('logic', 'mathematics', 'programming', 'writing'):
    source = problems.make(name)
    assert isinstance(source, problems.ProblemSource)
    assert source.domain in problems.DOMAINS
    assert name in problems.names()


@pytest.mark.parametrize(
  'name', ['general_agent', 'agentic_coding', 'agentic_search']
)
def test_agent_domain_says_that_it_has_no_source(name):
  assert name in problems.DOMAINS
  with pytest.raises(ValueError, match='no source yet'):
    problems.make(name)


def test_unknown_name_is_refused_with_a_guess():
  with pytest.raises(ValueError, match="did you mean 'mathematics'"):
    problems.make('mathematic')


def test_unknown_option_is_refused_with_its_name():
  with pytest.raises(ValueError, match='colour'):
    problems.make('logic', colour=3)


def test_own_source_can_be_registered_once(monkeypatch):
  monkeypatch.setattr(registry, '_MAKERS', dict(registry._MAKERS))
  made = problems.make('logic')
  problems.register('mine', lambda **options: made)
  assert problems.make('mine') is made
  with pytest.raises(ValueError, match='mine'):
    problems.register('mine', lambda **options: None)


@pytest.mark.parametrize('name', ['writing', 'question_answering'])
def test_demonstration_meets_every_criterion_of_its_rubric(name):
  source = problems.make(name, mode='thinking')
  for index in range(30):
    problem = source.problem('train', index)
    reply = source.demonstration(problem, random.Random(index))
    scores = [rubric.check(c, reply.content) for c in problem.rubric]
    assert scores == [1.0] * len(scores), (problem.prompt, reply.content)
    assert reply.reasoning
    empty = [rubric.check(c, '') for c in problem.rubric]
    assert rubric.weighted(problem.rubric, empty) < 0.5


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'domain': 'cooking'}, "domain: got 'cooking'"),
    ({'messages': ()}, 'messages: got none'),
  ],
)
def test_bad_problem_is_refused(fields, message):
  given = {
    'id': 'a',
    'domain': 'writing',
    'mode': 'chat',
    'messages': problems.make('writing').problem('train', 0).messages,
  }
  with pytest.raises(ValueError, match=message):
    problems.Problem(**{**given, **fields})
