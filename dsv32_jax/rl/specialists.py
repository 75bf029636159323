"""Specialist distillation, step by step (arXiv:2512.02556, section 3).

  base                     pretraining, dense warm-up, sparse training
  specialist.<pair>        from the base: cold start, then RL, a (domain, mode)
  samples.<pair>           what the specialist writes and its verifier accepts
  student                  the base, trained on all of that
  mixed                    the student after one RL stage over everything
  evaluate.<model>         every model on the same held-out problems

A work directory belongs to one configuration:

    config.json                       resolved config, versions, git state
    steps/<step>.json                 written last: the step is done
    base/ specialists/<pair>/ student/ mixed/     trainings, each resumable
    models/<model>/                   parameters of each, without optimizer
    tokenizer/                        of all of them
    samples/<pair>/conversations.jsonl            training data of the student
    evaluation/<model>/<pair>/        scores problem by problem
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dsv32_jax import data
from dsv32_jax.config import convert
from dsv32_jax.config.data import DataConfig, TokenizerConfig
from dsv32_jax.config.distillation import (
  DistillationConfig,
  RLStepConfig,
  SpecialistDomain,
)
from dsv32_jax.config.problems import (
  DEMONSTRATIONS,
  DemonstrationConfig,
  DomainConfig,
)
from dsv32_jax.config.rl import RLConfig, RLEvaluationConfig
from dsv32_jax.config.training import EvaluationConfig, RunConfig
from dsv32_jax.rl import answers, demonstrations, models, trainer
from dsv32_jax.rl.specialist_answers import Answers
from dsv32_jax.rl.steps import Step, Steps
from dsv32_jax.training import recipe, workdirs

# Changing these changes no result.
_FREE = ('checkpoint', 'max_batch')
_COLD_START = 'cold_start'


def _print(line: str) -> None:
  # A log that another process reads is not to be held back.
  print(line, flush=True)


class Distillation:
  """The chain in its work directory.

  Attributes:
    config: the whole chain.
    workdir: where everything goes.
    steps: what is to be done and what is done.
  """

  def __init__(
    self,
    config: DistillationConfig,
    workdir: pathlib.Path,
    *,
    report: Callable[[str], None] = _print,
  ):
    """Claims the work directory.

    Args:
      config: what to run.
      workdir: new, or of the same chain.
      report: receives lines for the user.

    Raises:
      ValueError: for a work directory of another chain, and for sources of
        problems that do not exist.
    """
    self.config = config
    # As it was given: paths in configs of inner runs then do not name a
    # machine, and the directory may move together with where it is run from.
    self.workdir = workdir
    self._report = report
    self._answers = Answers(config, workdir, report=report)
    self._pairs = self._answers.pairs
    self._check_sources()
    workdirs.check(config, workdir, free=_FREE)
    # Once: processes of single steps come here too, with commands of their own.
    if not (workdir / workdirs.CONFIG).exists():
      workdirs.claim(config, workdir)
    self.steps = Steps(self._all_steps(), workdir, report=report)

  def run(
    self,
    *,
    only: str | None = None,
    workers: int = 1,
    command: Sequence[str] = (),
  ) -> None:
    """Runs what is not done; see `Steps.run`."""
    if only is None:
      for name, domain in self.config.domains.items():
        if domain.unpopulated:
          self._report(f'{name}: no specialist ({domain.unpopulated})')
    self.steps.run(only=only, workers=workers, command=command)

  @property
  def is_done(self) -> bool:
    return all(self.steps.is_done(name) for name in self.steps.names)

  def _all_steps(self) -> list[Step]:
    specialists, samples, evaluations = [], [], []
    for name in self._pairs:
      specialists.append(
        Step(
          name=f'specialist.{name}',
          needs=('base',),
          run=functools.partial(self._specialist, name),
        )
      )
      samples.append(
        Step(
          name=f'samples.{name}',
          needs=(f'specialist.{name}',),
          run=functools.partial(self._answers.write_samples, name),
        )
      )
      evaluations.append(
        Step(
          name=f'evaluate.{name}',
          needs=(f'specialist.{name}',),
          run=functools.partial(self._answers.evaluate, name, (name,)),
        )
      )
    everything = tuple(self._pairs)
    return [
      Step(name='base', run=self._base),
      *specialists,
      *samples,
      Step(
        name='student',
        needs=tuple(step.name for step in samples),
        run=self._student,
      ),
      Step(name='mixed', needs=('student',), run=self._mixed),
      *evaluations,
      *(
        Step(
          name=f'evaluate.{model}',
          needs=(model,),
          run=functools.partial(self._answers.evaluate, model, everything),
        )
        for model in ('base', 'student', 'mixed')
      ),
    ]

  def _base(self) -> Mapping[str, Any]:
    config, directory = self.config, self.workdir / 'base'
    if config.base.init_from is not None:
      source = pathlib.Path(config.base.init_from)
      if not source.exists():
        raise ValueError(
          f'base.init_from: got {config.base.init_from!r}, expected a '
          'checkpoint directory'
        )
      settings = DataConfig(tokenizer=config.base.tokenizer)
      vocab_size = config.model.vocab_size
      tokenizer = data.make_tokenizer(settings, vocab_size=vocab_size)
      tokenizer.save(str(self._answers.tokenizer_dir))
      return self._hand_on('base', source)
    written = self.workdir / 'demonstrations'
    demonstrations.write_all(
      config.base.demonstrations, written, seed=config.seed
    )
    run = recipe.Run(
      config.base_run(str(written)), directory, report=self._report
    )
    run.run()
    run.tokenizer.save(str(self._answers.tokenizer_dir))
    return self._hand_on('base', run.stage_dir(config.base.order[-1]))

  def _specialist(self, name: str) -> Mapping[str, Any]:
    domain, mode = self._pairs[name]
    settings = self.config.domains[domain]
    base = str(self._answers.model_dir('base'))
    start: dict[str, Any] = {'init_from': base}
    if settings.demonstrations:
      sft = self.config.specialist_sft
      if settings.sft_steps:
        sft = dataclasses.replace(sft, steps=settings.sft_steps)
      stage = sft.stage(
        init_from=base,
        shares={DEMONSTRATIONS + _COLD_START: 1.0},
        tokenizer=self._tokenizer_config(),
      )
      start = {
        'stages': {_COLD_START: stage},
        'order': (_COLD_START,),
        'demonstrations': {_COLD_START: _shared(settings, mode)},
      }
    return self._reinforce(
      name,
      self.workdir / 'specialists' / name,
      self.config.specialist_rl,
      batches=settings.rl_batches,
      domains={domain: _domain(settings, (mode,))},
      **start,
    )

  def _student(self) -> Mapping[str, Any]:
    directory = self.workdir / 'student'
    stage = self.config.student_sft.stage(
      init_from=str(self._answers.model_dir('base')),
      shares={
        str(self._answers.conversations_of(name)): weight
        for name, (domain, _) in self._pairs.items()
        if (weight := self.config.domains[domain].weight) > 0
      },
      tokenizer=self._tokenizer_config(),
    )
    config = RunConfig(
      model=self.config.trained_model,
      stages={'student': stage},
      order=('student',),
      seed=self.config.seed,
      checkpoint=self.config.checkpoint,
      evaluation=EvaluationConfig(every_steps=0),
    )
    run = recipe.Run(config, directory, report=self._report)
    run.run()
    return self._hand_on('student', run.stage_dir('student'))

  def _mixed(self) -> Mapping[str, Any]:
    return self._reinforce(
      'mixed',
      self.workdir / 'mixed',
      self.config.mixed_rl,
      batches=None,
      domains={
        domain: _domain(settings, settings.modes)
        for domain, settings in self.config.domains.items()
        if settings.sources
      },
      init_from=str(self._answers.model_dir('student')),
    )

  def _reinforce(
    self,
    name: str,
    directory: pathlib.Path,
    settings: RLStepConfig,
    *,
    batches: int | None,
    domains: dict[str, DomainConfig],
    **start: Any,
  ) -> Mapping[str, Any]:
    """Runs RL and hands its model on."""
    config = RLConfig(
      model=self.config.trained_model,
      batches=batches or settings.batches,
      domains=domains,
      rollout=settings.rollout,
      rewards=settings.rewards,
      grpo=settings.grpo,
      update=settings.update,
      evaluation=RLEvaluationConfig(
        problems=settings.evaluate_problems, every_batches=0, greedy=False
      ),
      checkpoint=self.config.checkpoint,
      seed=self.config.seed,
      **start,
    )
    run = trainer.Run(config, directory, report=self._report)
    run.run()
    return self._hand_on(name, directory)

  def _hand_on(self, name: str, source: pathlib.Path) -> Mapping[str, Any]:
    model = self.config.trained_model
    record = {'model': convert.to_dict(model)}
    target = self._answers.model_dir(name)
    return {'weights': models.hand_on(source, target, model, record)}

  def _tokenizer_config(self) -> TokenizerConfig:
    """The base's tokenizer for stages of other runs."""
    directory = str(self._answers.tokenizer_dir)
    if data.load_tokenizer(directory).name == 'bytes':
      return TokenizerConfig(kind='bytes')
    return TokenizerConfig(kind='hf', path=directory)

  def _check_sources(self) -> None:
    """Refuses sources that do not exist or have too few prompts."""
    for name, mode in self.config.pairs:
      domain = self.config.domains[name]
      try:
        answers.distinct_problems(
          domain.sources, split='train', mode=mode, count=1
        )
      except ValueError as error:
        raise ValueError(f'domains.{name}: {error}') from None


def _shared(
  settings: SpecialistDomain, mode: Any
) -> tuple[DemonstrationConfig, ...]:
  """Demonstrations of a domain's sources, by their weights."""
  total = sum(source.weight for source in settings.sources)
  return tuple(
    DemonstrationConfig(
      source=source,
      count=max(1, round(settings.demonstrations * source.weight / total)),
      mode=mode,
    )
    for source in settings.sources
  )


def _domain(settings: SpecialistDomain, modes: tuple[Any, ...]) -> DomainConfig:
  return DomainConfig(
    sources=settings.sources,
    weight=settings.weight,
    modes=modes,
    max_new_tokens=settings.max_new_tokens,
  )
