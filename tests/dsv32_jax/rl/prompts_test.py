import collections
import dataclasses

import pytest

pytest.importorskip('reasoning_gym')

from dsv32_jax.config.problems import DomainConfig
from dsv32_jax.rl.prompts import (
  Prompts,
  check_lengths,
  draw_seed,
)
from tests.support import rl_runs


def config(**changes):
  sources = (
    dataclasses.replace(rl_runs.source('chain_sum', max_digits=2), weight=3.0),
    rl_runs.source('gcd'),
  )
  domains = {
    'mathematics': DomainConfig(
      sources=sources, weight=3.0, modes=('chat', 'thinking')
    ),
    'logical_reasoning': DomainConfig(
      sources=(rl_runs.source('spell_backward'),)
    ),
  }
  return rl_runs.config(domains=domains, **changes)


def test_prompts_keep_the_shares_of_domains_sources_and_modes():
  prompts = Prompts(config())
  problems = [problem for b in range(16) for problem in prompts.batch(b)]
  assert len(problems) == 64
  domains = collections.Counter(problem.domain for problem in problems)
  assert domains == {'mathematics': 48, 'logical_reasoning': 16}
  families = collections.Counter(p.reference['family'] for p in problems)
  assert families == {'chain_sum': 36, 'gcd': 12, 'spell_backward': 16}
  modes = collections.Counter(p.mode for p in problems)
  assert modes == {'chat': 40, 'thinking': 24}
  # No problem is asked twice while its source has others.
  assert len({problem.id for problem in problems}) == 64


def test_prompts_of_a_batch_do_not_depend_on_what_was_asked_before():
  whole, late = Prompts(config()), Prompts(config())
  batches = [whole.batch(number) for number in range(5)]
  assert late.batch(4) == batches[4]
  assert late.batch(1) == batches[1]


def test_held_out_problems_differ_and_are_no_training_prompts():
  prompts = Prompts(config())
  held_out = prompts.held_out('mathematics', 60)
  texts = {problem.prompt for problem in held_out}
  assert len(texts) == 60
  training = {
    problem.prompt for b in range(100) for problem in prompts.batch(b)
  }
  assert len(training) > 200
  assert not texts & training


def test_held_out_problems_that_do_not_exist_are_refused():
  # One-digit sums have about fifty held-out prompts.
  with pytest.raises(ValueError, match=r'evaluation.problems: got 90, exp'):
    Prompts(rl_runs.config()).held_out('mathematics', 90)


def test_seeds_differ_between_responses_and_batches():
  seeds = {draw_seed(0, 1, b, i) for b in range(20) for i in range(20)}
  assert len(seeds) == 400
  assert draw_seed(0, 1, 2, 3) == draw_seed(0, 1, 2, 3) < 2**32


def test_too_long_a_prompt_is_refused():
  check_lengths([[1] * 8], 8)
  with pytest.raises(ValueError, match=r'got 7, expected at least 8'):
    check_lengths([[1], [1] * 8], 7)
