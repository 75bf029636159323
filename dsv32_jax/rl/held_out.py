"""Accuracy on problems that no training prompt equals."""

import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dsv32_jax.checkpoints import integrity
from dsv32_jax.config.model import ModelConfig
from dsv32_jax.config.rl import RLConfig
from dsv32_jax.inference.sampling import Sampling
from dsv32_jax.rl import collection
from dsv32_jax.rl.ledger import Ledger
from dsv32_jax.rl.problems import Problem
from dsv32_jax.rl.prompts import Prompts, draw_seed
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


class Evaluator:
  """The evaluations of a run, at its ends and on the way."""

  def __init__(
    self,
    config: RLConfig,
    directory: pathlib.Path,
    *,
    prompts: Prompts,
    rewards: RewardModel,
    model: ModelConfig,
    report: Callable[[str], None],
    phase: Callable[[str], OnProgress],
  ):
    """Binds what all evaluations of a run share.

    Args:
      config: of the run; `config.evaluation` says what is evaluated.
      directory: where those at the ends are written, a file each.
      prompts: of the run.
      rewards: score responses.
      model: the architecture, for the ledger.
      report: receives lines for the user.
      phase: gives what is told of the progress of an evaluation of that name.
    """
    self._config = config
    self._directory = directory
    self._prompts = prompts
    self._rewards = rewards
    self._model = model
    self._report = report
    self._phase = phase

  def at_end(
    self, step: int, sampler: Callable[[], Sampler], ledger: Ledger
  ) -> None:
    """All held-out problems, before the first step or after the last.

    Args:
      step: so far.
      sampler: makes one with the weights of now, if there is anything to do.
      ledger: the FLOPs are added to it.
    """
    evaluation = self._config.evaluation
    path = self._path(step)
    if path.exists():
      content = json.loads(path.read_text(encoding='utf-8'))
      ledger.spent['evaluation'] += content['flops']
      return
    before = ledger.spent['evaluation']
    ways = {
      'sampled': Sampling(
        temperature=evaluation.temperature, top_p=evaluation.top_p
      )
    }
    if evaluation.greedy and evaluation.temperature > 0:
      ways['greedy'] = Sampling(temperature=0.0)
    found = {
      way: self._evaluate(
        sampler(),
        ledger,
        sampling,
        problems=evaluation.problems,
        samples=evaluation.samples if way == 'sampled' else 1,
        name=f'evaluation ({way})',
      )
      for way, sampling in ways.items()
    }
    spent = ledger.spent['evaluation'] - before
    content = {'step': step, 'flops': spent, 'ways': found}
    path.parent.mkdir(parents=True, exist_ok=True)
    integrity.write_atomically(path, json.dumps(content))
    for way, domains in found.items():
      for name, one in domains.items():
        self._report(
          f'held-out {name} at step {step}, {way}: pass@1 '
          f'{one["pass@1"]:.3f} ({one["low"]:.3f} to {one["high"]:.3f}, n '
          f'{one["n"]})'
        )

  def on_the_way(self, sampler: Sampler, ledger: Ledger) -> dict[str, float]:
    """Some held-out problems; returns metrics."""
    evaluation = self._config.evaluation
    found = self._evaluate(
      sampler,
      ledger,
      Sampling(temperature=evaluation.temperature, top_p=evaluation.top_p),
      problems=evaluation.problems_on_the_way,
      samples=evaluation.samples,
      name='evaluation',
    )
    line = {f'eval/{name}': one['pass@1'] for name, one in found.items()}
    line['eval/pass@1'] = float(np.mean(list(line.values())))
    line['eval/n'] = float(sum(one['n'] for one in found.values()))
    return line

  def accuracies(self, step: int) -> dict[str, Any]:
    """What `at_end` has written at that step, in short."""
    content = json.loads(self._path(step).read_text(encoding='utf-8'))
    return {
      way: {
        name: {k: one[k] for k in ('pass@1', 'low', 'high', 'n')}
        for name, one in domains.items()
      }
      for way, domains in content['ways'].items()
    }

  def _evaluate(
    self,
    sampler: Sampler,
    ledger: Ledger,
    sampling: Sampling,
    *,
    problems: int,
    samples: int,
    name: str,
  ) -> dict[str, Any]:
    found = {}
    for domain in self._config.evaluation.domains or self._prompts.domains:
      found[domain] = evaluate(
        sampler,
        self._rewards,
        self._prompts.held_out(domain, problems),
        samples=samples,
        sampling=sampling,
        max_new_tokens=self._prompts.max_new_tokens(domain),
        seed=self._config.seed,
        on_progress=self._phase(name),
      )
      fed = found[domain].pop('fed_tokens')
      ledger.add_forward('evaluation', self._model, fed)
    return found

  def _path(self, step: int) -> pathlib.Path:
    return self._directory / f'step_{step:08d}.json'
