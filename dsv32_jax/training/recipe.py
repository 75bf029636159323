"""Runs the stages of a recipe in order, skipping what is done.

A work directory belongs to one configuration:

    config.json                  resolved config, versions, git state
    demonstrations/              data that was written for the run, before it
    tokenizer/                   what made the token ids
    stages/<name>/checkpoints/   sealed training states
    stages/<name>/metrics.jsonl  one line a step
    stages/<name>/stage.json     written last: the stage is done
    stages/<name>/proof.json     dense warm-up only: what did not move
"""

import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsv32_jax import data
from dsv32_jax.checkpoints import CheckpointManager, integrity, load_params
from dsv32_jax.config import convert
from dsv32_jax.config.data import DataConfig
from dsv32_jax.config.model import AttentionMode
from dsv32_jax.config.training import RunConfig, StageConfig
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.sharding import axes, process_rows, specs
from dsv32_jax.sharding import mesh as mesh_lib
from dsv32_jax.sharding.hosts import agreement
from dsv32_jax.training import loop, optimizer, proof, stages, step, workdirs
from dsv32_jax.training import metrics as metrics_lib
from dsv32_jax.training import state as state_lib

Observe = Callable[[DeepSeekV32, AttentionMode, StageConfig, data.Corpora], Any]
"""Makes a stage's evaluation callable: (model, attention, stage, corpora)."""

# Changing these changes neither a parameter nor what is done already.
_FREE = ('order', 'evaluation', 'checkpoint', 'mesh')
DEMONSTRATIONS = 'demonstrations'


class Run:
  """A recipe in its work directory.

  Attributes:
    config: the whole run.
    workdir: where everything goes.
    tokenizer: of all stages.
  """

  def __init__(
    self,
    config: RunConfig,
    workdir: pathlib.Path,
    *,
    report: Callable[[str], None] = print,
  ):
    """Claims the work directory and checks everything that can be checked.

    Args:
      config: what to run.
      workdir: new, or of the same run.
      report: receives lines for the user.

    Raises:
      ValueError: for a work directory of another run, an empty or unreadable
        corpus, a tokenizer that does not fit the model, sizes that do not
        divide over the devices.
    """
    self.config = config
    self.workdir = workdir.absolute()
    self._report = report
    self._corpora: dict[Any, data.Corpora] = {}
    self._parallel = mesh_lib.make_parallel(config.mesh)
    self._check_layout()
    agreement.check_same('config and versions', _digest(config))
    # The work directory is one for all processes; process 0 goes first.
    agreement.from_main(self._prepare)
    if not agreement.is_main():
      self.tokenizer = data.load_tokenizer(str(self.workdir / 'tokenizer'))
    for name in config.order:
      found = self._iterator(config.stages[name]).fingerprint
      agreement.check_same(f'stages.{name}.data (fingerprint)', found)

  def _prepare(self) -> None:
    """Checks the work directory and the data, then claims the directory."""
    config = self.config
    workdirs.check(config, self.workdir, free=_FREE, beside=(DEMONSTRATIONS,))
    first = config.stages[config.order[0]]
    vocab_size = config.model.vocab_size
    directory = self.workdir / 'tokenizer'
    if directory.exists():
      self.tokenizer = data.load_tokenizer(str(directory))
    else:
      self.tokenizer = data.make_tokenizer(first.data, vocab_size=vocab_size)
    for name in config.order:
      # Builds the iterators once, so that a corpus that cannot be read or rows
      # that do not fit are refused before the first stage trains.
      self._iterator(config.stages[name])
    if not directory.exists():
      self.workdir.mkdir(parents=True, exist_ok=True)
      self.tokenizer.save(str(directory))
    workdirs.claim(config, self.workdir)

  def corpora(self, config: DataConfig) -> data.Corpora:
    """The tokenized corpora of a stage; equal sources are read once."""
    key = (
      config.sources,
      config.held_out_fraction,
      config.add_bos,
      config.add_eos,
      config.tokenizer,
    )
    if key not in self._corpora:
      self._corpora[key] = data.load_corpora(config, self.tokenizer)
    return self._corpora[key]

  def is_done(self, name: str) -> bool:
    """Whether a stage has ended; the same answer on every process."""
    path = self.stage_dir(name) / 'stage.json'
    return agreement.from_main(path.exists)

  def stage_dir(self, name: str) -> pathlib.Path:
    """Directory of a stage."""
    return self.workdir / 'stages' / name

  def run(
    self, *, only: str | None = None, observe: Observe | None = None
  ) -> None:
    """Runs the stages that are not done, in order.

    Args:
      only: run this stage alone.
      observe: makes each stage's evaluation callable.

    Raises:
      ValueError: for an unknown stage, or one whose start is not there.
      NonFiniteError, CheckpointError, Interrupted: see `loop.fit`.
    """
    names = self.config.order if only is None else (only,)
    for name in names:
      if name not in self.config.order:
        raise ValueError(
          f'stage: got {name!r}, expected one of {list(self.config.order)}'
        )
      if self.is_done(name):
        self._report(f'{name}: done already, skipped')
      else:
        self._run_stage(name, observe)

  def _run_stage(self, name: str, observe: Observe | None) -> None:
    config, directory = self.config.stages[name], self.stage_dir(name)
    model = DeepSeekV32(self.config.stage_model(name))
    stage = stages.build(config, model.cfg)
    tx = optimizer.build(config, stage)
    parallel = self._parallel
    started = time.time()
    with CheckpointManager(
      directory / 'checkpoints', keep=self.config.checkpoint.keep
    ) as checkpoints:
      # Parameters and two moments: before anything is compiled.
      shapes = state_lib.variable_shapes(model, parallel)
      checkpoints.check_space([shapes['params']] * 3)
    start = self._start_variables(name, model)
    if name == self.config.order[0]:
      self._report(metrics_lib.parameter_overview(start['params']))
    state = state_lib.create(start, stage, tx, parallel)
    if config.keep_optimizer_state:
      state = self._with_optimizer_state(name, state)
    before = None
    if config.kind == 'dense_warmup':
      # The loop donates its buffers; the proof compares with these.
      before = jax.tree.map(jnp.copy, start)
    shardings = None
    if parallel is not None:
      shardings = specs.of_leaves(start['params'])
    del start
    evaluate = None
    if observe is not None:
      evaluate = observe(
        model, stage.attention, config, self.corpora(config.data)
      )
    self._report(
      f'{name}: {config.kind}, {config.steps} steps of '
      f'{config.data.batch_size} x {config.data.seq_len} tokens, from '
      f'{config.init_from or "random parameters"}'
    )
    with (
      CheckpointManager(
        directory / 'checkpoints', keep=self.config.checkpoint.keep
      ) as checkpoints,
      metrics_lib.MetricsWriter(directory, title=name) as metrics,
    ):
      state = loop.fit(
        step.make_train_step(model, stage, tx, shardings),
        state,
        self._iterator(config),
        key=jax.random.key(self.config.seed),
        steps=config.steps,
        directory=directory,
        checkpoints=checkpoints,
        checkpoint_every=self.config.checkpoint.every_steps,
        metrics=metrics,
        evaluate=evaluate,
        evaluate_every=self.config.evaluation.every_steps,
        record={
          'stage': name,
          'config': convert.to_dict(self.config),
          'model': convert.to_dict(model.cfg),
          'versions': workdirs.versions(),
        },
        parallel=parallel,
        report=self._report,
      )
    if config.kind == 'dense_warmup':
      found = proof.warmup_proof(
        model,
        before,
        state.variables,
        agreement.from_main(lambda: _sparsity(directory)),
        next(self._iterator(config)),
        parallel=parallel,
      )
      if agreement.is_main():
        integrity.write_atomically(
          directory / 'proof.json', json.dumps(found, indent=1)
        )
      proof.require(found)
      self._report(f'{name}: proof written to {directory / "proof.json"}')
    agreement.from_main(lambda: self._finish(name, started))

  def _finish(self, name: str, started: float) -> None:
    """Writes that a stage is done."""
    config, directory = self.config.stages[name], self.stage_dir(name)
    summary = {
      'kind': config.kind,
      'steps': config.steps,
      'tokens': config.steps * config.data.batch_size * config.data.seq_len,
      'seconds_of_last_session': time.time() - started,
      'last_metrics': metrics_lib.read(directory)[-1],
    }
    integrity.write_atomically(
      directory / 'stage.json', json.dumps(summary, indent=1)
    )

  def _check_layout(self) -> None:
    """Refuses sizes that the devices cannot share, for every stage."""
    if self._parallel is None:
      return
    for name in self.config.order:
      stage = self.config.stages[name]
      specs.check_batch(
        self._parallel,
        batch_size=stage.data.batch_size,
        seq_len=stage.data.seq_len,
        micro_batches=stage.micro_batches,
        where=f'stages.{name}.data.',
      )
    # Stages differ in no parameter's shape.
    first = self.config.stage_model(self.config.order[0])
    state_lib.variable_shapes(DeepSeekV32(first), self._parallel)

  def _iterator(self, config: StageConfig) -> data.BatchIterator:
    """This process's rows of a stage's batches."""
    rows = None
    if self._parallel is not None:
      rows = process_rows.of(
        self._parallel.sharding(axes.BATCH), config.data.batch_size
      )
    return data.train_iterator(
      config.data,
      self.corpora(config.data),
      vocab_size=self.config.model.vocab_size,
      run_seed=self.config.seed,
      process_rows=rows,
    )

  def _source(self, name: str) -> pathlib.Path | None:
    """Where a stage takes its parameters from."""
    init_from = self.config.stages[name].init_from
    if init_from is None:
      return None
    if init_from in self.config.stages:
      if not self.is_done(init_from):
        raise ValueError(
          f'stages.{name}.init_from: {init_from!r} is not done in '
          f'{self.workdir}, expected it to have run; run that stage first'
        )
      return self.stage_dir(init_from)
    path = pathlib.Path(init_from)
    if not path.exists():
      raise ValueError(
        f'stages.{name}.init_from: got {init_from!r}, expected a stage of the '
        f'recipe {sorted(self.config.stages)} or a checkpoint directory'
      )
    return path

  def _start_variables(self, name: str, model: DeepSeekV32) -> dict:
    key = jax.random.key(self.config.seed)
    source = self._source(name)
    if source is None:
      return state_lib.init_variables(model, key, self._parallel)
    shapes = state_lib.variable_shapes(model, self._parallel)
    return load_params(source, shapes, report=self._report).state

  def _with_optimizer_state(
    self, name: str, state: state_lib.TrainState
  ) -> state_lib.TrainState:
    """Moments of the stage before; schedules start anew."""
    source = self._source(name)
    assert source is not None
    loaded = load_params(
      source,
      {'opt_state': state.opt_state},
      partial=('opt_state',),
      report=self._report,
    )
    if loaded.kept:
      self._report(
        f'{name}: {len(loaded.kept)} arrays of the optimizer state are not in '
        f'{source} and start at zero: {", ".join(loaded.kept)}'
      )
    old = loaded.state['opt_state']

    def is_schedule(node: Any) -> bool:
      return isinstance(node, optax.ScaleByScheduleState)

    opt_state = jax.tree.map(
      lambda loaded, fresh: fresh if is_schedule(fresh) else loaded,
      old,
      state.opt_state,
      is_leaf=is_schedule,
    )
    return dataclasses.replace(state, opt_state=opt_state)


def _sparsity(directory: pathlib.Path) -> list[dict]:
  """What the proof needs of a stage's metrics."""
  return [
    {'sparsity/realised': line['sparsity/realised']}
    for line in metrics_lib.read(directory)
  ]


def _digest(config: RunConfig) -> str:
  """Names all that decides a run's numbers but its files."""
  text = json.dumps(
    [convert.to_dict(config), workdirs.versions()], sort_keys=True
  )
  return hashlib.sha256(text.encode()).hexdigest()[:16]
