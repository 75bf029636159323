"""Rollout batches: prompts, their groups of responses, and what these earned.

A batch is fixed by its number, the config and the sampler's weights. What is
done of it is on disk, so that a run that is killed samples nothing twice that
it had finished, and goes on with the very same responses.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dsv32_jax.config.rl import RLConfig
from dsv32_jax.inference.requests import Completion
from dsv32_jax.rl import rollout, store
from dsv32_jax.rl.problems import Problem
from dsv32_jax.rl.prompts import Prompts, check_lengths, draw_seed
from dsv32_jax.rl.rewards import Outcome, RewardModel
from dsv32_jax.rl.rollout import OnProgress, Sampler, repeated
from dsv32_jax.rl.types import Group, Response, Scored

_ROLLOUT, _SHOWN = 1, 3
"""What seeds are for; how many responses of a batch are kept as text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
  """A rollout batch that is on disk.

  Attributes:
    number: from 0.
    groups: with rewards.
    metrics: of the rollout, for the line of its first step.
    examples: a few responses as text.
  """

  number: int
  groups: list[Group]
  metrics: dict[str, float]
  examples: list[dict[str, Any]]


class Collector:
  """Makes and finds rollout batches."""

  def __init__(
    self,
    config: RLConfig,
    prompts: Prompts,
    rewards: RewardModel,
    rollouts: store.RolloutStore,
  ):
    self._config = config
    self._prompts = prompts
    self._rewards = rewards
    self._store = rollouts

  def find(self, number: int) -> Batch | None:
    """A batch that was collected before, or None."""
    found = self._store.load(store.batch_name(number))
    if found is None:
      return None
    groups, extra = found
    return Batch(
      number=number,
      groups=groups,
      metrics=extra['metrics'],
      examples=extra['examples'],
    )

  def collect(
    self,
    number: int,
    sampler: Sampler,
    *,
    weight_version: int,
    inspect: Callable[[Sequence[Group]], Mapping[str, float]],
    on_progress: OnProgress | None = None,
  ) -> Batch:
    """Samples and scores a batch, and seals it on disk.

    Args:
      number: of the batch.
      sampler: with the weights to sample from.
      weight_version: optimizer steps behind these weights.
      inspect: makes further metrics, of the groups and the same weights.
      on_progress: told how many of the batch's responses are done.
    """
    problems = self._prompts.batch(number)
    rollout_config = self._config.rollout
    size = rollout_config.chunk_prompts or len(problems)
    groups: list[Group] = []
    metrics: collections.Counter[str] = collections.Counter()
    examples: list[dict] = []
    total = rollout_config.responses_per_batch
    parts = range(0, len(problems), size)
    for part, start in enumerate(parts):
      done = start * rollout_config.group_size

      def report(count: int, _: int, done: int = done) -> None:
        if on_progress is not None:
          on_progress(done + count, total)

      name = store.part_name(number, part)
      found = self._store.load(name) if len(parts) > 1 else None
      if found is None:
        found = self._sample(
          problems[start : start + size],
          sampler,
          seeds=(number, start),
          weight_version=weight_version,
          on_progress=report,
        )
        if len(parts) > 1:
          self._store.save(name, *found)
      groups += found[0]
      metrics.update(found[1]['times'])
      examples += found[1]['examples']
    extra = {
      'metrics': {
        **summary(groups),
        **_rates(metrics, groups),
        **inspect(groups),
      },
      'examples': examples[:_SHOWN],
    }
    self._store.save(store.batch_name(number), groups, extra)
    for part in range(len(parts)):
      self._store.remove(store.part_name(number, part))
    batch = self.find(number)
    assert batch is not None
    return batch

  def _sample(
    self,
    problems: Sequence[Problem],
    sampler: Sampler,
    *,
    seeds: tuple[int, int],
    weight_version: int,
    on_progress: OnProgress,
  ) -> tuple[list[Group], dict]:
    config = self._config.rollout
    began = time.perf_counter()
    check_lengths(
      [sampler.prompt(problem) for problem in problems],
      self._config.update.max_prompt_tokens,
    )
    asked = list(repeated(problems, config.group_size))
    number, start = seeds
    first = start * config.group_size
    completions = sampler.sample(
      asked,
      seeds=[
        draw_seed(self._config.seed, _ROLLOUT, number, first + i)
        for i in range(len(asked))
      ],
      max_new_tokens=[self._prompts.max_new_tokens(p.domain) for p in asked],
      sampling=rollout.sampling_of(config),
      on_progress=on_progress,
    )
    sampled = time.perf_counter()
    outcomes, texts = score(self._rewards, sampler, asked, completions)
    scored = [
      Scored(
        response=Response.from_completion(
          completion,
          weight_version=weight_version,
          temperature=config.temperature,
          is_truncated=config.truncates,
        ),
        reward=outcome.total,
        components={
          **outcome.components,
          'error': float(outcome.error is not None),
        },
      )
      for completion, outcome in zip(completions, outcomes, strict=True)
    ]
    groups = [
      Group(
        problem=problem.id,
        domain=problem.domain,
        mode=problem.mode,
        responses=tuple(scored[i : i + config.group_size]),
      )
      for i, problem in zip(
        range(0, len(scored), config.group_size), problems, strict=True
      )
    ]
    times = {'rollout_s': sampled - began, 'reward_s': _since(sampled)}
    examples = [
      {'prompt': asked[i].prompt, 'text': texts[i], 'reward': scored[i].reward}
      for i in range(0, len(asked), config.group_size)
    ]
    return groups, {'times': times, 'examples': examples[:_SHOWN]}


def score(
  rewards: RewardModel,
  sampler: Sampler,
  problems: Sequence[Problem],
  completions: Sequence[Completion],
) -> tuple[list[Outcome], list[str]]:
  """Outcomes of responses, and the texts that were scored."""
  texts = [sampler.text(completion) for completion in completions]
  responses = [
    (completion.tokens, text, completion.finish_reason)
    for completion, text in zip(completions, texts, strict=True)
  ]
  return rewards.score(problems, responses), texts


def summary(groups: Sequence[Group]) -> dict[str, float]:
  """What a batch earned, by domain and component, and how it looks."""
  scored = [one for group in groups for one in group.responses]
  lengths = [one.response.num_policy_tokens for one in scored]
  cut = [one.response.finish_reason == 'length' for one in scored]
  found = {
    'reward/mean': _mean([one.reward for one in scored]),
    'rollout/length': _mean(lengths),
    'rollout/length_max': float(max(lengths)),
    'rollout/truncated': _mean(cut),
    'rollout/equal_groups': _mean([g.has_equal_rewards for g in groups]),
    'rollout/responses': float(len(scored)),
    'rollout/tokens': float(sum(lengths)),
  }
  for name in scored[0].components:
    values = [one.components[name] for one in scored]
    found[f'reward_component/{name}'] = _mean(values)
  for domain in sorted({group.domain for group in groups}):
    own = [g for g in groups if g.domain == domain]
    rewards = [one for group in own for one in group.responses]
    found[f'reward/{domain}'] = _mean([one.reward for one in rewards])
    found[f'outcome/{domain}'] = _mean(
      [one.components.get('outcome', 0.0) for one in rewards]
    )
    found[f'equal_groups/{domain}'] = _mean([g.has_equal_rewards for g in own])
  return found


def _rates(
  times: Mapping[str, float], groups: Sequence[Group]
) -> dict[str, float]:
  responses = [one.response for group in groups for one in group.responses]
  seconds = max(times['rollout_s'], 1e-9)
  return {
    'time/rollout_s': times['rollout_s'],
    'time/reward_s': times['reward_s'],
    'rollout/samples_per_s': len(responses) / seconds,
    'rollout/tokens_per_s': (
      sum(response.num_policy_tokens for response in responses) / seconds
    ),
  }


def _mean(values: Sequence) -> float:
  return float(np.mean(values))


def _since(start: float) -> float:
  return time.perf_counter() - start
