"""Runs reinforcement learning from its start to its end, through any crash.

A work directory belongs to one configuration:

    config.json           resolved config, versions, git state
    demonstrations/       what the cold start learns from
    start/                the stages before RL, a work directory of their own
    tokenizer/
    rollouts/             sealed rollout batches that may still be needed
    checkpoints/          sealed training states, also within a rollout batch
    metrics.jsonl         one line an optimizer step
    examples.jsonl        some responses of every batch, for people
    evaluation/           accuracy on held-out problems, a file each
    rl.json               written last: the run is done

A rollout batch is drawn with the weights at the start of the batch that is
`staleness` before it, and sealed before the first step that follows. So every
state between two steps needs only what is on disk, and a run that was killed
goes on to the same bits.
"""

import contextlib
import dataclasses
import json
import pathlib
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dsv32_jax.checkpoints import CheckpointError, CheckpointManager, integrity
from dsv32_jax.config import convert
from dsv32_jax.config.rl import RLConfig
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.rl import batches, held_out, meshes, progress, rollout, store
from dsv32_jax.rl.collection import Batch, Collector
from dsv32_jax.rl.learner import Learner
from dsv32_jax.rl.ledger import Ledger
from dsv32_jax.rl.prompts import Prompts
from dsv32_jax.rl.rewards import RewardModel
from dsv32_jax.rl.start import Start
from dsv32_jax.rl.types import Group
from dsv32_jax.sharding import parallel as parallel_lib
from dsv32_jax.sharding.hosts import agreement
from dsv32_jax.training import compiled_step, loop, workdirs
from dsv32_jax.training import metrics as metrics_lib
from dsv32_jax.training import state as state_lib

# Changing these changes neither a parameter nor what is done already.
_FREE = ('checkpoint', 'mesh', 'rollout_mesh', 'rollout_devices')
_MINIBATCHES = 3
"""What a seed is for."""
EXAMPLES = 'examples.jsonl'
DONE = 'rl.json'


class Run:
  """An RL run in its work directory.

  Attributes:
    config: the whole run.
    workdir: where everything goes.
  """

  def __init__(
    self,
    config: RLConfig,
    workdir: pathlib.Path,
    *,
    report: Callable[[str], None] = print,
    display: Callable[..., Any] = progress.Board,
  ):
    """Claims the work directory and checks everything that can be checked.

    Args:
      config: what to run.
      workdir: new, or of the same run.
      report: receives lines for the user.
      display: makes the progress display, see `progress.Board`.

    Raises:
      ValueError: for a work directory of another run, unknown problem sources,
        sizes that do not divide over the devices.
    """
    self.config = config
    self.workdir = pathlib.Path(workdir).absolute()
    self._report = report
    self._display = display
    self._prompts = Prompts(config)
    self._training, self._sampling = meshes.make(config)
    self._model = DeepSeekV32(config.rl_model)
    state_lib.variable_shapes(self._model, self._training)
    workdirs.check(config, self.workdir, free=_FREE)
    workdirs.claim(config, self.workdir)

  @property
  def is_done(self) -> bool:
    return (self.workdir / DONE).exists()

  def run(self) -> dict[str, Any]:
    """Trains to the last step, from wherever an earlier call came to.

    Returns:
      What `rl.json` holds: steps, FLOPs, accuracies.

    Raises:
      loop.Interrupted: after SIGTERM or SIGINT and a checkpoint.
      loop.NonFiniteError, rollout.SamplingError: the run has diverged.
      CheckpointError: the disk is full, or what a checkpoint needs is gone.
    """
    path = self.workdir / DONE
    if self.is_done:
      self._report(f'{self.workdir}: done already')
      return json.loads(path.read_text(encoding='utf-8'))
    start = Start(self.config, self.workdir, report=self._report)
    with contextlib.ExitStack() as stack:
      session = _Session(
        self.config,
        self.workdir,
        self._model,
        start,
        prompts=self._prompts,
        training=self._training,
        sampling=self._sampling,
        report=self._report,
        display=self._display,
        stack=stack,
      )
      summary = session.train()
    integrity.write_atomically(path, json.dumps(summary, indent=1))
    return summary


def run(
  config: RLConfig,
  workdir: pathlib.Path,
  *,
  report: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Runs to the end; see `Run`."""
  return Run(config, workdir, report=report).run()


@dataclasses.dataclass
class _Place:
  """Where a run is, beside its arrays; what a checkpoint keeps of it."""

  step: int
  ledger: Ledger
  seconds: float


class _Session:
  """One process's part of a run."""

  def __init__(
    self,
    config: RLConfig,
    workdir: pathlib.Path,
    model: DeepSeekV32,
    start: Start,
    *,
    prompts: Prompts,
    training: parallel_lib.Parallel | None,
    sampling: parallel_lib.Parallel | None,
    report: Callable[[str], None],
    display: Callable[..., Any],
    stack: contextlib.ExitStack,
  ):
    self._config = config
    self._workdir = workdir
    self._model = model
    self._start = start
    self._prompts = prompts
    self._parallel = training
    self._sampling = sampling
    self._report = report
    self._board: Any = None
    stack.enter_context(parallel_lib.use(training))
    self._checkpoints = stack.enter_context(
      CheckpointManager(
        workdir / 'checkpoints', keep=config.checkpoint.keep, report=report
      )
    )
    self._metrics = stack.enter_context(
      metrics_lib.MetricsWriter(
        workdir, title='rl', display=self._open_board(display)
      )
    )
    self._rewards = stack.enter_context(
      RewardModel(
        config.rewards,
        max_new_tokens={
          name: prompts.max_new_tokens(name) for name in prompts.domains
        },
      )
    )
    self._interrupts = stack.enter_context(agreement.interrupts())
    self._store = store.RolloutStore(workdir / 'rollouts')
    self._collector = Collector(config, prompts, self._rewards, self._store)
    self._sampler: rollout.Sampler | None = None
    self._learner = Learner(model, config, prompts.domains, training)
    self._evaluator = held_out.Evaluator(
      config,
      workdir / 'evaluation',
      prompts=prompts,
      rewards=self._rewards,
      model=model.cfg,
      report=report,
      phase=self._phase,
    )
    self._handed_over = -1

  def train(self) -> dict[str, Any]:
    """Takes all steps that are not taken; returns the summary."""
    config = self._config
    place = self._restore()
    self._metrics.start(step=place.step, total_steps=config.steps)
    if place.step == 0:
      self._evaluate(place)
    count = config.update.minibatches
    batch: Batch | None = None
    parts: list[list[batches.Sample]] = []
    clock = time.perf_counter()
    while place.step < config.steps:
      number, part = divmod(place.step, count)
      line: dict[str, Any] = {}
      if part == 0:
        if self._is_refresh(number):
          self._learner.refresh_reference()
        self._collect(number, place)
      if batch is None or batch.number != number:
        batch = self._find(number)
        parts = self._minibatches(batch)
      if part == 0:
        line.update(batch.metrics)
        line['rollout/age'] = float(place.step - _weight_version(batch))
        self._write_examples(batch, place.step)
        self._count_rollout(batch, parts, place)
      line.update(self._learner.step(parts[part], place.ledger))
      place.step += 1
      now = time.perf_counter()
      place.seconds, clock = place.seconds + now - clock, now
      line.update(self._totals(batch, place))
      self._finish_step(line, place)
    self._evaluate(place)
    self._checkpoints.wait()
    return self._summary(place)

  # Where it starts.

  def _restore(self) -> _Place:
    """Takes the state of the newest checkpoint, or of the start."""
    shapes = state_lib.variable_shapes(self._model, self._parallel)
    copies = 3 + self._learner.needs_reference
    self._checkpoints.check_space([shapes['params']] * copies)
    self._learner.start(self._start.variables(self._model, self._parallel))
    place = _Place(0, Ledger(self._start.flops), 0.0)
    template = compiled_step.shapes(self._learner.tree())
    if self._checkpoints.sealed_steps():
      self._learner.free()
    restored = self._checkpoints.restore_latest(template)
    if restored is not None:
      self._learner.restore(restored.state)
      place = _Place(
        restored.step,
        Ledger.from_state(restored.extra['ledger']),
        restored.extra['seconds'],
      )
      self._report(
        f'resumed from step {place.step} of {self._checkpoints.directory}'
      )
    return place

  # Rollouts.

  def _collect(self, number: int, place: _Place) -> None:
    """Sees that all batches are there that the weights of now are to draw."""
    config = self._config
    ahead = config.rollout.staleness
    first = number if number == 0 else number + ahead
    for wanted in range(first, number + ahead + 1):
      name = store.batch_name(wanted)
      if wanted >= config.batches or self._store.is_whole(name):
        continue
      self._collector.collect(
        wanted,
        self._sampler_of(place),
        weight_version=place.step,
        inspect=lambda groups, n=wanted: self._drift(groups, n),
        on_progress=self._phase('rollout'),
      )
      self._release()
      self._check_interrupted(place)

  def _find(self, number: int) -> Batch:
    batch = self._collector.find(number)
    if batch is None:
      path = self._store.directory / store.batch_name(number)
      raise CheckpointError(
        f'{path}: not there or damaged, and the weights that drew it are gone; '
        'expected a sealed rollout batch. Remove the checkpoints after the '
        f'first step of an earlier batch that is there to go back to it'
      )
    return batch

  def _sampler_of(self, place: _Place) -> rollout.Sampler:
    """The sampler with the weights of now."""
    config = self._config
    if self._sampler is None:
      self._sampler = rollout.Sampler(
        self._model.cfg,
        self._learner.variables,
        config.rollout,
        self._start.tokenizer,
        max_tokens=config.update.max_prompt_tokens + config.max_new_tokens,
        record=rollout.record_of(config.grpo, config.rollout),
        parallel=self._sampling,
      )
    elif self._handed_over != place.step:
      self._sampler.update(self._learner.variables)
    self._handed_over = place.step
    return self._sampler

  def _release(self) -> None:
    if self._config.rollout.release_caches and self._sampler is not None:
      self._sampler.release()

  def _minibatches(self, batch: Batch) -> list[list[batches.Sample]]:
    return self._cut(
      batches.samples(batch.groups, self._config.grpo), batch.number
    )

  def _cut(
    self, samples: Sequence[batches.Sample], number: int
  ) -> list[list[batches.Sample]]:
    return batches.minibatches(
      samples,
      self._config.update.minibatches,
      seed=(self._config.seed, _MINIBATCHES, number),
    )

  def _drift(self, groups: Sequence[Group], number: int) -> dict[str, float]:
    """What the trainer makes of the sampler's tokens with the same weights.

    Looks at the first minibatch's share of the responses.
    """
    batch = batches.samples(groups, self._config.grpo)
    return self._learner.drift(self._cut(batch, number)[0])

  # Steps.

  def _is_refresh(self, number: int) -> bool:
    every = self._config.update.reference_every
    return (
      self._learner.needs_reference
      and every > 0
      and number > 0
      and number % every == 0
    )

  def _finish_step(self, line: dict, place: _Place) -> None:
    """Looks at a step's numbers, evaluates, writes the line, saves."""
    config = self._config
    bad = [
      name
      for name in compiled_step.watched(line)
      if not np.isfinite(line[name])
    ]
    if bad:
      self._metrics.write(place.step, line)
      raise loop.NonFiniteError(
        f'step {place.step}: {bad[0]} is {line[bad[0]]}; stopped. Its rollout '
        f'batch is in {self._store.directory}, the last state in '
        f'{self._checkpoints.directory}',
        step=place.step,
        dump=self._store.directory,
      )
    number, rest = divmod(place.step, config.update.minibatches)
    every = config.evaluation.every_batches
    if rest == 0 and every and number % every == 0:
      line.update(
        self._evaluator.on_the_way(self._sampler_of(place), place.ledger)
      )
      self._release()
    self._metrics.write(place.step, line)
    if (
      place.step % config.checkpoint.every_steps == 0
      or place.step == config.steps
    ):
      self._save(place)
    self._checkpoints.poll()
    self._check_interrupted(place)

  def _save(self, place: _Place) -> None:
    self._checkpoints.save(
      place.step,
      self._learner.tree(),
      {
        'ledger': place.ledger.state(),
        'seconds': place.seconds,
        'config': convert.to_dict(self._config),
        'model': convert.to_dict(self._model.cfg),
        'versions': workdirs.versions(),
      },
    )
    # The oldest checkpoint that may be gone back to decides.
    oldest = min(self._checkpoints.sealed_steps() or [0])
    self._store.prune(before=oldest // self._config.update.minibatches)

  def _check_interrupted(self, place: _Place) -> None:
    signaled = self._interrupts.check()
    if signaled is None or place.step == self._config.steps:
      return
    self._checkpoints.wait()
    if place.step not in [0, *self._checkpoints.sealed_steps()]:
      self._save(place)
    self._checkpoints.wait()
    self._report(
      f'{signal.Signals(signaled).name}: stopped after step {place.step} of '
      f'{self._config.steps}. The same command continues from there'
    )
    raise loop.Interrupted(signaled, step=place.step)

  # What is reported.

  def _count_rollout(
    self, batch: Batch, parts: Sequence[Sequence], place: _Place
  ) -> None:
    cfg = self._model.cfg
    fed = [
      one.response.tokens.size - 1
      for group in batch.groups
      for one in group.responses
    ]
    place.ledger.add_forward('rollout', cfg, fed)
    first = [sample.response.tokens.size - 1 for sample in parts[0]]
    place.ledger.add_forward('scoring', cfg, first)

  def _totals(self, batch: Batch, place: _Place) -> dict[str, float]:
    return {
      'batch': float(batch.number),
      'time/total_s': place.seconds,
      **place.ledger.metrics(),
    }

  def _write_examples(self, batch: Batch, step: int) -> None:
    """Appends; lines of steps that are taken again are there twice."""
    with open(self._workdir / EXAMPLES, 'a', encoding='utf-8') as file:
      for example in batch.examples:
        line = {'step': step, 'batch': batch.number, **example}
        file.write(json.dumps(line, ensure_ascii=False) + '\n')

  def _phase(self, name: str) -> rollout.OnProgress:
    return lambda done, total: self._board.phase(name, done, total)

  def _open_board(self, display: Callable[..., Any]) -> Callable[..., Any]:
    def open_board(**arguments: Any) -> Any:
      self._board = display(**arguments)
      return self._board

    return open_board

  def _evaluate(self, place: _Place) -> None:
    self._evaluator.at_end(
      place.step, lambda: self._sampler_of(place), place.ledger
    )
    self._release()

  def _summary(self, place: _Place) -> dict[str, Any]:
    return {
      'steps': place.step,
      'batches': self._config.batches,
      'seconds': place.seconds,
      'compute': place.ledger.state() | {'fraction': place.ledger.fraction},
      'before': self._evaluator.accuracies(0),
      'after': self._evaluator.accuracies(place.step),
    }


def _weight_version(batch: Batch) -> int:
  return batch.groups[0].responses[0].response.weight_version
