"""Generated episodes: tokens are only ever appended to, and all replay."""

import collections
import dataclasses
import itertools
import random

import pytest

from dsv32_jax import chat
from dsv32_jax.agents import trajectories
from dsv32_jax.agents.loop import Budgets, run_episode
from dsv32_jax.agents.trajectories import ReplayError, replay
from tests.support import agent_episodes

TOKENIZER = agent_episodes.PairTokenizer()
BUDGETS = Budgets(steps=agent_episodes.STEPS, tokens=3300)


class Watched:
  """A policy, and what it was asked and replied."""

  def __init__(self, policy):
    self._policy = policy
    self.seen = []

  def reply(self, query):
    reply = self._policy.reply(query)
    self.seen.append((query, reply))
    return reply


def _run(seed):
  mode = agent_episodes.mode_of(seed)
  policy = Watched(agent_episodes.policy(seed, mode, TOKENIZER))
  trajectory = run_episode(
    policy,
    agent_episodes.GeneratedEnvironment(seed),
    budgets=BUDGETS,
    tokenizer=TOKENIZER,
    mode=mode,
    seed=seed,
    task=f'generated/{seed}',
  )
  return trajectory, policy.seen


def _check_tokens(trajectory, seen):
  """What each query had, then the reply, is how the next one begins."""
  tokens = trajectory.tokens
  assert len(trajectory.is_policy) == len(tokens)
  expected = [False] * len(tokens)
  for (query, reply), step in zip(seen, trajectory.steps, strict=True):
    first = len(query.tokens)
    end = first + step.num_tokens
    assert tokens[:first] == query.tokens
    if reply.tokens:
      assert tokens[first:end] == reply.tokens
    expected[first:end] = [True] * step.num_tokens
  for (before, _), (after, _) in itertools.pairwise(seen):
    assert after.tokens[: len(before.tokens)] == before.tokens
  if seen:
    _check_last_query(seen)
  assert list(trajectory.is_policy) == expected


def _check_last_query(seen):
  """What `chat.encode` has for it, but where a reply was spelt otherwise."""
  query, _ = seen[-1]
  encoded = chat.encode(query.messages, TOKENIZER, mode=query.mode)
  if any(reply.tokens for _, reply in seen[:-1]):
    assert agent_episodes.split(query.tokens) == agent_episodes.split(encoded)
  else:
    assert list(query.tokens) == encoded


def _check(seeds):
  counts = collections.Counter()
  for seed in seeds:
    trajectory, seen = _run(seed)
    _check_tokens(trajectory, seen)
    again = replay(
      trajectories.from_json(trajectories.to_json(trajectory)),
      agent_episodes.GeneratedEnvironment(seed),
      tokenizer=TOKENIZER,
    )
    assert again.tokens == trajectory.tokens
    assert again.score == trajectory.score
    assert again.ending == trajectory.ending
    counts[trajectory.ending] += 1
    for step in trajectory.steps:
      calls = len(step.reply.tool_calls) if step.reply else 0
      counts[f'{calls} calls'] += 1
      counts['failed'] += step.num_failed
      counts['ran'] += calls - step.num_failed
  return counts


def _check_coverage(counts):
  for what in (
    *('answered', 'submitted', 'steps', 'tokens', 'parse_error'),
    *('failed', 'ran', '1 calls', '2 calls', '3 calls', '4 calls'),
  ):
    assert counts[what], (what, counts)


def test_300_generated_episodes_only_append_and_replay():
  _check_coverage(_check(range(300)))


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_10_000_generated_episodes_only_append_and_replay():
  _check_coverage(_check(range(10_000)))


def test_replay_reports_each_kind_of_change():
  """No change of a recorded trajectory goes unnoticed."""
  rng = random.Random(0)
  seed = next(s for s in range(100) if len(_run(s)[0].steps) > 2)
  trajectory, _ = _run(seed)
  at = rng.choice(
    [i for i, is_policy in enumerate(trajectory.is_policy) if not is_policy]
  )
  tokens = list(trajectory.tokens)
  tokens[at] += 1
  step = trajectory.steps[0]
  wrong = dataclasses.replace(step.results[0], content='something else')
  changes = {
    'tokens': {'tokens': tuple(tokens)},
    'score': {
      'score': dataclasses.replace(
        trajectory.score, reward=trajectory.score.reward / 2 + 0.1
      )
    },
    'results': {
      'steps': (
        dataclasses.replace(step, results=(wrong, *step.results[1:])),
        *trajectory.steps[1:],
      )
    },
    'ending': {'ending': 'submitted'},
    'start': {'start': trajectory.start[1:]},
  }
  for what, change in changes.items():
    with pytest.raises(ReplayError, match=what):
      replay(
        dataclasses.replace(trajectory, **change),
        agent_episodes.GeneratedEnvironment(seed),
        tokenizer=TOKENIZER,
      )
