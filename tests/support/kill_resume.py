"""Tiny training runs in processes that a test may kill at any moment.

`python -m tests.support.kill_resume prepare DIR` traces the training step of
the preset `tiny` once and stores it with a first state: tracing takes longer
than all steps together. `python -m tests.support.kill_resume serve DIR` trains
with it in every directory it is told (`fork_server`).
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
import pickle
import subprocess
import sys
from typing import Any

from tests.support import fork_server

STEPS = 24
CHECKPOINT_EVERY = 4
_STAGE = 'sparse_training'
_PREPARED = 'state_and_step.pickle'


def server(prepared: pathlib.Path) -> fork_server.Server:
  """Prepares, and serves runs."""
  environment = _environment()
  subprocess.run(
    _command('prepare', str(prepared)),
    cwd=fork_server.ROOT,
    env=environment,
    check=True,
  )
  return fork_server.Server(_command('serve', str(prepared)), environment)


def digest(workdir: pathlib.Path, prepared: pathlib.Path) -> tuple[int, str]:
  """Last step and a hash over every bit of its state and place in the data."""
  import jax

  from dsv32_jax.checkpoints.manager import CheckpointManager

  template, _ = _load(prepared)
  with CheckpointManager(
    workdir / 'checkpoints', report=lambda line: None
  ) as checkpoints:
    step, state, extra = checkpoints.restore_latest(template)
  parts = hashlib.sha256(repr(extra).encode())
  for leaf in jax.tree.leaves(state):
    parts.update(leaf.tobytes())
  return step, parts.hexdigest()


def _command(action: str, directory: str) -> list[str]:
  return [sys.executable, '-m', 'tests.support.kill_resume', action, directory]


def _environment() -> dict[str, str]:
  # One device, and none of the test's flags.
  return {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}


def _batches() -> Any:
  from dsv32_jax import data
  from dsv32_jax.config.data import DataConfig, SourceConfig

  config = DataConfig(
    seq_len=64,
    batch_size=2,
    sources=(SourceConfig(kind='copy', max_documents=60),),
    prefetch=2,
  )
  tokenizer = data.make_tokenizer(config, vocab_size=512)
  corpora = data.load_corpora(config, tokenizer)
  return data.train_iterator(config, corpora, vocab_size=512, run_seed=0)


def _prepare(directory: pathlib.Path) -> None:
  import jax
  import numpy as np

  from dsv32_jax.config import presets
  from dsv32_jax.config.data import DataConfig
  from dsv32_jax.config.training import StageConfig
  from dsv32_jax.modules.transformer import DeepSeekV32
  from dsv32_jax.training import batch, optimizer, stages, state, step

  cfg = presets.tiny()
  config = StageConfig(kind=_STAGE, steps=STEPS, data=DataConfig())
  stage = stages.build(config, cfg)
  tx = optimizer.build(config, stage)
  model = DeepSeekV32(cfg)
  variables = state.init_variables(model, jax.random.key(0))
  first = state.create(variables, stage, tx)
  train_step = step.make_train_step(model, stage, tx)
  tree = jax.tree.structure(first)

  def flat_step(leaves, arrays, key_data):
    new, metrics = train_step(
      jax.tree.unflatten(tree, leaves),
      batch.Batch.from_numpy(arrays),
      jax.random.wrap_key_data(key_data),
    )
    return jax.tree.leaves(new), metrics

  exported = jax.export.export(jax.jit(flat_step))(
    jax.tree.leaves(first),
    next(_batches()),
    jax.random.key_data(jax.random.key(1)),
  )
  directory.mkdir(parents=True, exist_ok=True)
  # `exported.serialize` needs another package; without its derivative, which
  # is not called, an export can be pickled.
  exported = dataclasses.replace(exported, _get_vjp=None)
  with open(directory / _PREPARED, 'wb') as file:
    pickle.dump((jax.tree.map(np.asarray, first), exported), file)


def _load(directory: pathlib.Path) -> tuple[Any, Any]:
  with open(directory / _PREPARED, 'rb') as file:
    return pickle.load(file)


def _train(directory: pathlib.Path, workdir: pathlib.Path) -> None:
  import jax

  from dsv32_jax.checkpoints.manager import CheckpointManager
  from dsv32_jax.training import loop, metrics

  # Compiling takes longer than training too.
  jax.config.update('jax_compilation_cache_dir', str(directory / 'compiled'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  state, exported = _load(directory)
  tree = jax.tree.structure(state)

  def step(state, arrays, key):
    leaves, values = exported.call(
      jax.tree.leaves(state), arrays, jax.random.key_data(key)
    )
    return jax.tree.unflatten(tree, leaves), values

  with (
    CheckpointManager(workdir / 'checkpoints') as checkpoints,
    metrics.MetricsWriter(workdir, display=None) as writer,
  ):
    loop.fit(
      step,
      state,
      _batches(),
      key=jax.random.key(1),
      steps=STEPS,
      directory=workdir,
      checkpoints=checkpoints,
      checkpoint_every=CHECKPOINT_EVERY,
      metrics=writer,
      make_batch=lambda arrays: arrays,
      record={'stage': _STAGE},
    )


def _serve(directory: pathlib.Path) -> None:
  import dsv32_jax.data
  import dsv32_jax.training.loop
  import dsv32_jax.training.step  # noqa: F401

  fork_server.serve(functools.partial(_train, directory))


if __name__ == '__main__':
  {'prepare': _prepare, 'serve': _serve}[sys.argv[1]](pathlib.Path(sys.argv[2]))
