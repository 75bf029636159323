"""What the models of a chain of distillation answer: data, and scores.

models/<model>/                         parameters of each
tokenizer/                              of all of them
samples/<pair>/conversations.jsonl      training data of the student
evaluation/<model>/<pair>/              scores problem by problem
"""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dsv32_jax import data
from dsv32_jax.config.distillation import DistillationConfig
from dsv32_jax.config.rollout import RolloutConfig
from dsv32_jax.data import conversations
from dsv32_jax.inference.sampling import Sampling
from dsv32_jax.rl import answers, models, rejection_sampling
from dsv32_jax.rl.answers import Answerer, Asked
from dsv32_jax.rl.problems import Split
from dsv32_jax.rl.rejection_sampling import Answer
from dsv32_jax.training import workdirs


def pair_name(domain: str, mode: str) -> str:
  """How a specialist is called."""
  return f'{domain}-{mode}'


class Answers:
  """Has the models of one work directory answer.

  Attributes:
    pairs: (domain, mode) by name.
  """

  def __init__(
    self,
    config: DistillationConfig,
    workdir: pathlib.Path,
    *,
    report: Callable[[str], None],
  ):
    """Loads nothing yet."""
    self.pairs = {pair_name(*pair): pair for pair in config.pairs}
    self._config = config
    self._workdir = workdir
    self._report = report

  def model_dir(self, name: str) -> pathlib.Path:
    """Parameters of a model."""
    return self._workdir / 'models' / name

  @property
  def tokenizer_dir(self) -> pathlib.Path:
    """Where RL that starts from a model of this chain looks for it too."""
    return self._workdir / 'tokenizer'

  def conversations_of(self, name: str) -> pathlib.Path:
    """Training data that a specialist wrote."""
    return self._workdir / 'samples' / name / 'conversations.jsonl'

  def write_samples(self, name: str) -> Mapping[str, Any]:
    """Has a specialist write training data, and chooses of it.

    Raises:
      ValueError: if nothing that it writes is right.
    """
    config = self._config.rejection
    domain, _ = self.pairs[name]
    own = self._config.domains[domain].distilled_prompts
    asked = self._asked(
      name,
      'train',
      count=own or config.prompts,
      samples=config.samples,
      sampling=Sampling(temperature=config.temperature, top_p=config.top_p),
      part=config.part_prompts,
    )
    mark = models.fingerprint_of(self.model_dir(name))

    def record(found: list[Answer]) -> dict[str, Any]:
      chosen = rejection_sampling.select(
        found, keep_per_prompt=config.keep_per_prompt
      )
      kept = [
        rejection_sampling.conversation(answer, specialist=name, weights=mark)
        for answer in chosen.answers
      ]
      return {
        'counts': chosen.counts,
        'conversations': [item.to_json() for item in kept],
      }

    path = self.conversations_of(name)
    with self._answerer(name) as answerer:
      parts = answerer.parts(asked, path.parent, record, name=f'samples.{name}')
    kept = [
      conversations.Conversation.from_json(item)
      for part in parts
      for item in part['conversations']
    ]
    if not kept:
      raise ValueError(
        f'samples.{name}: no answer of {asked.samples} to each of '
        f'{len(asked.problems)} prompts is right, expected some (is the '
        'specialist trained at all?)'
      )
    conversations.write(path, kept)
    return {
      'counts': rejection_sampling.total([part['counts'] for part in parts]),
      'specialist': name,
      'weights': mark,
      'versions': workdirs.versions(),
    }

  def evaluate(self, model: str, names: Sequence[str]) -> Mapping[str, Any]:
    """Scores a model on the held-out problems of some pairs."""
    config = self._config.evaluation
    found = {}
    with self._answerer(model) as answerer:
      for name in names:
        asked = self._asked(
          name,
          'held_out',
          count=config.problems,
          samples=config.samples,
          sampling=Sampling(temperature=config.temperature, top_p=config.top_p),
          part=config.part_problems,
        )
        parts = answerer.parts(
          asked,
          self._workdir / 'evaluation' / model / name,
          functools.partial(_scores, samples=config.samples),
          name=f'{model} on {name}',
        )
        scores = [score for part in parts for score in part['scores']]
        tokens = [count for part in parts for count in part['num_tokens']]
        found[name] = {
          'accuracy': sum(scores) / len(scores),
          'problems': len(scores),
          'mean_tokens': sum(tokens) / len(tokens),
        }
    return {
      'pairs': found,
      'weights': models.fingerprint_of(self.model_dir(model)),
    }

  def _asked(
    self,
    name: str,
    split: Split,
    *,
    count: int,
    samples: int,
    sampling: Sampling,
    part: int,
  ) -> Asked:
    domain, mode = self.pairs[name]
    return Asked(
      problems=answers.distinct_problems(
        self._config.domains[domain].sources,
        split=split,
        mode=mode,
        count=count,
      ),
      samples=samples,
      max_new_tokens=self._config.max_new_tokens(domain),
      sampling=sampling,
      seed=self._config.seed,
      part=part,
    )

  def _answerer(self, model: str) -> Answerer:
    config, rl = self._config, self._config.specialist_rl
    longest = max(config.max_new_tokens(domain) for domain, _ in config.pairs)
    return Answerer(
      config.trained_model,
      models.load(self.model_dir(model), config.trained_model),
      data.load_tokenizer(str(self.tokenizer_dir)),
      rl.rewards,
      RolloutConfig(
        max_batch=config.max_batch,
        prefill_rows=rl.rollout.prefill_rows,
        max_new_tokens=longest,
        decode_steps=rl.rollout.decode_steps,
        prefill_chunk=rl.rollout.prefill_chunk,
        page_size=rl.rollout.page_size,
      ),
      max_tokens=rl.update.max_prompt_tokens + longest,
      report=self._report,
    )


def _scores(found: list[Answer], *, samples: int) -> dict[str, Any]:
  """What is kept of answers to held-out problems."""
  groups = list(answers.by_problem(found, samples))
  return {
    'problems': [group[0].problem.id for group in groups],
    'scores': [
      sum(answer.is_correct for answer in group) / samples for group in groups
    ],
    'num_tokens': [answer.num_tokens for answer in found],
  }
