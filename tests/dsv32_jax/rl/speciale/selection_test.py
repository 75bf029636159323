import random

import pytest

from dsv32_jax.rl.speciale.selection import (
  CONTESTS,
  Contest,
  Sample,
  select,
)


def sample(tokens, *, tests=True, length=True, failure=False):
  return Sample(
    passes_sample_tests=tests,
    is_within_length=length,
    declares_failure=failure,
    num_reasoning_tokens=tokens,
  )


def test_selection_filters_then_takes_the_longest_reasoning():
  samples = [
    sample(5),
    sample(99, tests=False),
    sample(98, length=False),
    sample(97, failure=True),
    sample(9),
    sample(7),
    sample(9),
    sample(96, tests=False, length=False, failure=True),
  ]
  found = select(samples, 3)
  assert found.submitted == (4, 6, 5)
  assert (found.failed_tests, found.declared) == (3, 1)
  assert select(samples, 50).submitted == (4, 6, 5, 0)


def test_selection_equals_counting_how_many_are_longer():
  rng = random.Random(0)
  for _ in range(50):
    samples = [
      sample(
        rng.randrange(6),
        tests=rng.random() < 0.8,
        length=rng.random() < 0.8,
        failure=rng.random() < 0.3,
      )
      for _ in range(20)
    ]
    good = [
      i
      for i, s in enumerate(samples)
      if s.passes_sample_tests and s.is_within_length and not s.declares_failure
    ]
    limit = rng.randint(1, 20)
    found = select(samples, limit)
    for i in good:
      ahead = sum(
        (samples[j].num_reasoning_tokens, -j)
        > (samples[i].num_reasoning_tokens, -i)
        for j in good
      )
      assert (i in found.submitted) == (ahead < limit)
    assert found.failed_tests + found.declared + len(good) == 20


def test_contests_have_the_papers_sizes():
  assert CONTESTS['ioi'] == Contest(samples=500, submissions=50)
  assert CONTESTS['icpc'].samples == 32


def test_selection_of_none_is_refused():
  assert select([], 3).submitted == ()
  with pytest.raises(ValueError, match='submissions: got 0'):
    select([], 0)
  with pytest.raises(ValueError, match='samples: got 0'):
    Contest(samples=0, submissions=1)
