import random

import numpy as np
import pytest

from dsv32_jax.agents.synthesis import filters


def words(rng, count):
  return [f'w{rng.randrange(10_000)}' for _ in range(count)]


def test_masked_prompts_that_differ_in_names_only_are_one():
  near = filters.NearDuplicates()
  told = 'Plan a day in {} and stay at {} for at most 300 in all.'
  first = filters.masked(told.format('Lyon', 'Inn A'), ['Lyon', 'Inn A'])
  second = filters.masked(told.format('Nice', 'Inn B'), ['Nice', 'Inn B'])
  assert first == second
  assert near.find(first) is None
  assert near.find(second) == 0


@pytest.mark.parametrize('changed', [0, 1, 2, 4, 8, 16, 40])
def test_near_duplicates_agree_with_exact_jaccard(changed):
  rng = random.Random(changed)
  for _ in range(30):
    text = words(rng, 120)
    other = list(text)
    for i in rng.sample(range(120), changed):
      other[i] = 'changed'
    near = filters.NearDuplicates()
    near.find(' '.join(text))
    shingles = [
      {' '.join(x[i : i + 4]) for i in range(117)} for x in (text, other)
    ]
    exact = len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
    got = filters.jaccard(
      filters.shingles(' '.join(text)), filters.shingles(' '.join(other))
    )
    assert got == pytest.approx(exact)
    found = near.find(' '.join(other))
    assert (found == 0) == (exact >= 0.8)


def test_near_duplicates_name_the_text_that_was_kept():
  rng = random.Random(0)
  texts = [' '.join(words(rng, 60)) for _ in range(50)]
  near = filters.NearDuplicates()
  assert [near.find(text) for text in texts] == [None] * 50
  assert [near.find(text + ' more') for text in texts] == list(range(50))


def test_shingles_of_short_text_are_the_text():
  assert len(filters.shingles('one two')) == 1
  assert filters.shingles('one two').dtype == np.uint64


def test_threshold_outside_of_0_to_1_is_refused():
  with pytest.raises(ValueError, match=r'threshold: got 1\.5'):
    filters.NearDuplicates(1.5)


def test_pass_band_keeps_what_is_solved_sometimes():
  band = filters.PassBand(least=2, most=0.5)
  attempts = {
    'never': [0.0] * 10,
    'once': [1.0] + [0.0] * 9,
    'half': [1.0, 0.0] * 5,
    'most': [1.0] * 6 + [0.0] * 4,
  }
  assert band.kept(attempts) == ['half']
  with pytest.raises(ValueError, match='rewards: got none'):
    band.keeps([])


def test_refuse_counts_one_passing_answer():
  filters.refuse('random', [False, False])
  with pytest.raises(filters.Rejected, match='a greedy answer passes'):
    filters.refuse('greedy', [False, True])
