"""Accuracy on problems that no training prompt equals."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv32_jax.inference.sampling import Sampling
from dsv32_jax.rl import collection
from dsv32_jax.rl.problems import Problem
from dsv32_jax.rl.prompts import draw_seed
from dsv32_jax.rl.rewards import RewardModel
from dsv32_jax.rl.rollout import OnProgress, Sampler, repeated

_HELD_OUT = 2
"""What seeds are for."""


def evaluate(
  sampler: Sampler,
  rewards: RewardModel,
  problems: Sequence[Problem],
  *,
  samples: int,
  sampling: Sampling,
  max_new_tokens: int,
  seed: int,
  on_progress: OnProgress | None = None,
) -> dict[str, Any]:
  """Samples and scores responses to problems.

  Args:
    sampler: with the weights to judge.
    rewards: score them; an outcome of 1 passes.
    problems: different ones.
    samples: responses a problem.
    sampling: how they are drawn.
    max_new_tokens: of each response.
    seed: of the draws.
    on_progress: told how many responses are done.

  Returns:
    JSON values: `pass@1` with `low` and `high` of its 95 % interval over
    problems, `n`, `samples`, `passed` (passes of each problem, in order),
    `problems` (their ids), mean `length` in tokens, share `truncated`, and
    `parse_errors`.
  """
  asked = list(repeated(problems, samples))
  completions = sampler.sample(
    asked,
    seeds=[draw_seed(seed, _HELD_OUT, i) for i in range(len(asked))],
    max_new_tokens=[max_new_tokens] * len(asked),
    sampling=sampling,
    on_progress=on_progress,
  )
  outcomes, texts = collection.score(rewards, sampler, asked, completions)
  passed = [float(o.components['outcome'] >= 1) for o in outcomes]
  rates = np.array(passed).reshape(len(problems), samples).mean(axis=1)
  low, high = interval(rates)
  return {
    'pass@1': float(rates.mean()),
    'low': low,
    'high': high,
    'n': len(problems),
    'samples': samples,
    'temperature': float(sampling.temperature),
    'top_p': float(sampling.top_p),
    'passed': [int(v) for v in (rates * samples).round()],
    'problems': [problem.id for problem in problems],
    'length': float(np.mean([len(c.tokens) for c in completions])),
    'truncated': float(
      np.mean([c.finish_reason == 'length' for c in completions])
    ),
    'parse_errors': float(
      np.mean([o.parse_error is not None for o in outcomes])
    ),
    'fed_tokens': [len(c.prompt) + len(c.tokens) - 1 for c in completions],
    'examples': [
      {'prompt': asked[i].prompt, 'text': texts[i], 'passed': passed[i]}
      for i in range(0, len(asked), max(len(asked) // 8, 1))
    ],
  }


def interval(rates: np.ndarray) -> tuple[float, float]:
  """95 % interval of a mean over problems.

  Wilson's for one response a problem, where rates are 0 or 1; else from the
  standard error over problems.
  """
  n, mean = len(rates), float(rates.mean())
  z = 1.959964
  if np.all((rates == 0) | (rates == 1)):
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    half /= 1 + z * z / n
    return max(centre - half, 0.0), min(centre + half, 1.0)
  half = z * float(rates.std(ddof=1)) / math.sqrt(n) if n > 1 else 1.0
  return max(mean - half, 0.0), min(mean + half, 1.0)
