import time

import pytest

from dsv32_jax.rl.problems import Criterion
from dsv32_jax.rl.rewards.rubric import check, weighted

CASES = [
  ('contains', {'words': ['sea', 'salt']}, 'The Sea is salt.', 1.0),
  ('contains', {'words': ['sea', 'salt']}, 'The sea, seasalted', 0.5),
  ('contains', {'words': ['c++']}, 'I like C++.', 1.0),
  ('excludes', {'words': ['very']}, 'everyone', 1.0),
  ('excludes', {'words': ['very']}, 'Very good', 0.0),
  ('count', {'text': 'a', 'least': 2, 'most': 3}, 'banana', 1.0),
  ('count', {'text': 'a', 'most': 2}, 'banana', 0.0),
  ('length', {'unit': 'words', 'least': 2, 'most': 2}, 'two words', 1.0),
  ('length', {'unit': 'words', 'least': 3}, 'two words', 0.0),
  ('length', {'unit': 'characters', 'most': 3}, 'abc', 1.0),
  ('length', {'unit': 'lines', 'least': 2, 'most': 2}, 'a\n\nb\n', 1.0),
  ('length', {'unit': 'sentences', 'least': 2, 'most': 2}, 'A b. C!..', 1.0),
  ('length', {'unit': 'sentences', 'least': 1}, 'no end', 0.0),
  ('length', {'unit': 'paragraphs', 'least': 2}, 'a\n\nb', 1.0),
  ('format', {'name': 'bullets'}, '- a\n- b', 1.0),
  ('format', {'name': 'bullets'}, '- a\nb', 0.0),
  ('format', {'name': 'numbered'}, '1. a\n2. b', 1.0),
  ('format', {'name': 'numbered'}, '1. a\n3. b', 0.0),
  ('format', {'name': 'json'}, '{"a": [1]}', 1.0),
  ('format', {'name': 'json'}, 'null', 1.0),
  ('format', {'name': 'json'}, '{"a": }', 0.0),
  ('format', {'name': 'lowercase'}, 'abc', 1.0),
  ('format', {'name': 'uppercase'}, 'ABc', 0.0),
  ('format', {'name': 'one_line'}, 'a\nb', 0.0),
  ('json_schema', {'schema': {'type': 'array'}}, '[1]', 1.0),
  ('json_schema', {'schema': {'type': 'array'}}, '{}', 0.0),
  ('json_schema', {'schema': {'type': 'array'}}, 'no json', 0.0),
]


@pytest.mark.parametrize(('kind', 'arguments', 'text', 'expected'), CASES)
def test_criterion_gives_its_score(kind, arguments, text, expected):
  criterion = Criterion(text='?', kind=kind, arguments=arguments)
  assert check(criterion, text) == expected


@pytest.mark.parametrize('kind', ['format', 'length', 'contains', 'count'])
def test_criterion_with_bad_arguments_is_refused(kind):
  for arguments in ({}, {'name': 'loud', 'unit': 'ells', 'words': []}):
    with pytest.raises(ValueError, match=f'arguments: {kind} cannot use'):
      check(Criterion(text='?', kind=kind, arguments=arguments), 'a')


def test_criterion_for_a_reader_is_refused_by_the_program():
  with pytest.raises(ValueError, match='for a model that judges'):
    check(Criterion(text='Is it kind?'), 'a')


def test_weights_are_relative():
  rubric = [Criterion(text='a', weight=1.0), Criterion(text='b', weight=3.0)]
  assert weighted(rubric, [1.0, 0.0]) == 0.25
  assert weighted(rubric, [0.5, 1.0]) == 0.875


@pytest.mark.parametrize('weight', [0.0, -1.0])
def test_weight_that_is_not_positive_is_refused(weight):
  with pytest.raises(ValueError, match='weight: got'):
    Criterion(text='a', weight=weight)


def test_long_hostile_reply_takes_no_long_time():
  started = time.monotonic()
  for kind, arguments, *_ in CASES:
    for piece in ('a', '-', '1. ', '[', '{', '.', 'a\n', ' '):
      check(Criterion(text='?', kind=kind, arguments=arguments), piece * 20_000)
  assert time.monotonic() - started < 5
