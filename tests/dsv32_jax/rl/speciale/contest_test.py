import math
import random

import pytest

from dsv32_jax.rl.speciale.contest import (
  Entry,
  compete,
  passes_sample_tests,
)
from dsv32_jax.rl.speciale.derivations import Task, check, parse_derivation
from dsv32_jax.rl.speciale.prompts import DerivationDialogue
from dsv32_jax.rl.speciale.selection import Contest, Sample, Selection
from dsv32_jax.rl.speciale.tasks import TaskSize, make_task
from tests.support.scripted_prover import ScriptedProver

TASK = Task(kind='solve', start='2*x+3=7')


@pytest.mark.parametrize(
  ('proof', 'passes'),
  [
    ('1. 2*x=7-3 (move)\n2. 2*x=4 (add)\n3. x=2 (div)', True),
    # The tests look at the end alone.
    ('1. x=2 (guess)', True),
    ('1. 2*x=7+3 (move)\n2. 2*x=10 (add)\n3. x=5 (div)', False),
    ('1. 2*x=7-3 (move)\n2. 2*x=4 (add)', False),
    ('1. x==2 (div)', False),
    ('', False),
  ],
)
def test_sample_tests_look_at_the_end_alone(proof, passes):
  assert passes_sample_tests(TASK, proof) == passes


def test_contest_hands_in_only_what_passes_and_the_jury_looks_at_steps():
  rng = random.Random(0)
  tasks = [make_task('compute', TaskSize(), rng)[0] for _ in range(2)]
  prover = ScriptedProver(right=0.3, blind=0.3, unreadable=0.1)
  contest = Contest(samples=12, submissions=3)
  dialogue = DerivationDialogue()
  entries = compete(prover, dialogue, tasks, contest, seed=1)
  replies = len(prover.asked)
  assert replies == 2 * 12
  for entry in entries:
    assert len(entry.selection.submitted) <= 3
    for index in entry.selection.submitted:
      sample = entry.samples[index]
      assert sample.passes_sample_tests
      assert not sample.declares_failure
    # What is right passes the tests; the other way round faults of
    # presentation slip through.
    for right, sample in zip(entry.is_right, entry.samples, strict=True):
      assert sample.passes_sample_tests or not right
  again = ScriptedProver(right=0.3, blind=0.3, unreadable=0.1)
  assert compete(again, dialogue, tasks, contest, seed=1) == entries
  good = ScriptedProver(right=1.0, blind=0.0)
  assert all(e.is_solved for e in compete(good, dialogue, tasks, contest))
  steps = parse_derivation('1. x=2 (guess)')
  assert check(TASK, steps).score < 1


def entry(*right, tokens=()):
  samples = tuple(
    Sample(
      passes_sample_tests=True,
      is_within_length=True,
      declares_failure=False,
      num_reasoning_tokens=count,
    )
    for count in tokens or range(len(right))
  )
  return Entry(
    samples=samples,
    is_right=right,
    selection=Selection(submitted=(), failed_tests=0, declared=0),
    num_tokens=0,
  )


def test_chance_of_blind_draws_is_that_of_an_urn():
  one = entry(True, False, False, False)
  assert one.solved_by_chance(1) == pytest.approx(1 / 4)
  assert one.solved_by_chance(4) == 1
  assert one.solved_by_chance(9) == 1
  two = entry(True, True, False, False, False)
  expected = 1 - math.comb(3, 2) / math.comb(5, 2)
  assert two.solved_by_chance(2) == pytest.approx(expected)
  assert entry(False, False).solved_by_chance(1) == 0


def test_orders_hand_in_different_samples():
  last_is_right = entry(False, False, True, tokens=(1, 2, 3))
  assert last_is_right.solved_by_order(1, order='longest')
  assert not last_is_right.solved_by_order(1, order='shortest')
  assert last_is_right.solved_by_order(3, order='shortest')
  found = {
    last_is_right.solved_by_order(1, order='random', seed=seed)
    for seed in range(20)
  }
  assert found == {True, False}
  with pytest.raises(ValueError, match='order: got'):
    last_is_right.solved_by_order(1, order='best')
