import random

import pytest

from dsv32_jax.rl.problems import is_held_out, make, splits

SOURCES = [
  ('gym/chain_sum', {'wording': 'short'}),
  ('gym/letter_counting', {}),
  ('logic', {'family': 'mixed'}),
  ('mathematics', {'wording': 'short'}),
  ('programming', {'level': 'words'}),
  ('programming', {'level': 'function'}),
  ('writing', {}),
  ('question_answering', {}),
]


@pytest.mark.parametrize(('name', 'options'), SOURCES)
def test_no_held_out_prompt_occurs_in_train_for_any_seed(name, options):
  if name.startswith('gym/'):
    pytest.importorskip('reasoning_gym')
  sources = [make(name, seed=seed, **options) for seed in (0, 1)]
  train, held_out = (
    {
      ' '.join(source.problem(split, index).prompt.split())
      for source in sources
      for index in range(60)
    }
    for split in ('train', 'held_out')
  )
  assert not train & held_out
  assert len(held_out) > 60
  assert all(map(is_held_out, held_out))
  assert not any(map(is_held_out, train))


def test_a_quarter_is_held_out():
  count = sum(is_held_out(f'prompt {i}') for i in range(10_000))
  assert 2_350 < count < 2_650


def test_white_space_does_not_move_a_prompt_to_the_other_split():
  for i in range(50):
    assert is_held_out(f'a {i}') == is_held_out(f' a\n  {i} ')


def draw(make, **options):
  given = {'key': 'k', 'split': 'train', 'index': 0, **options}
  return splits.draw(make, str, **given)


def test_draw_is_the_same_for_the_same_arguments():
  def make(rng):
    return rng.random()

  assert draw(make) == draw(make)
  assert len({draw(make, index=i) for i in range(20)}) == 20
  assert draw(make, key='l') != draw(make)


def test_source_with_one_prompt_says_that_it_has_too_few():
  prompts = ['x', 'y1', 'y2', 'y3']
  split = 'train' if is_held_out(prompts[0]) else 'held_out'
  with pytest.raises(ValueError, match='more different prompts'):
    draw(lambda rng: prompts[0], split=split)


@pytest.mark.parametrize('bad', [{'split': 'test'}, {'index': -1}])
def test_unknown_split_and_negative_index_are_refused(bad):
  with pytest.raises(ValueError, match=next(iter(bad))):
    draw(random.Random.random, **bad)
