"""Tiny training in one or several processes: `python -m ... WORKDIR MESH`.

The model and rows of `tests.support.parity` go through stages; each leaves its
checkpoints, metrics and, as `final.npz`, its last state. MESH is a `MeshConfig`
as JSON. The other arguments are flags.
"""

import contextlib
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags as absl_flags

from dsv32_jax.sharding.hosts import agreement, launching
from dsv32_jax.sharding.hosts.local_processes import Command, LocalProcesses
from dsv32_jax.training import flags

STAGES = ('pretrain', 'dense_warmup', 'sparse_training')
_ROOT = pathlib.Path(__file__).parents[2]


def start(
  workdir: pathlib.Path,
  *,
  processes: int,
  devices: int,
  mesh: dict,
  cache: pathlib.Path,
  report: Any = None,
  **settings: Any,
) -> LocalProcesses:
  """Starts this module.

  Args:
    workdir: of the run.
    processes: how many.
    devices: of all processes together.
    mesh: a `MeshConfig`.
    cache: of compiled programs, for all runs.
    report: gets each line.
    **settings: of the flags below.
  """
  share = devices // processes
  port = launching.free_port()
  arguments = [
    f'--workdir={workdir}',
    f'--mesh={json.dumps(mesh)}',
    *(f'--{name}={value}' for name, value in settings.items()),
  ]
  commands = []
  for index in range(processes):
    own = [
      f'--coordinator_address=127.0.0.1:{port}',
      f'--num_processes={processes}',
      f'--process_id={index}',
      '--heartbeat_timeout_s=20',
    ]
    commands.append(
      Command(
        argv=(
          sys.executable,
          '-m',
          'tests.support.host_training',
          *arguments,
          *own,
        ),
        environment={
          'JAX_PLATFORMS': 'cpu',
          # The maths is the same, and compiled in less time.
          'XLA_FLAGS': (
            f'--xla_force_host_platform_device_count={share}'
            ' --xla_backend_optimization_level=0'
          ),
          'JAX_COMPILATION_CACHE_DIR': str(cache),
          'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
          'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
          'PYTHONPATH': str(_ROOT),
        },
      )
    )
  return LocalProcesses(commands, report=report)


def run(workdir: pathlib.Path, **arguments: Any) -> list[str]:
  """Runs this module to its end; returns what it printed."""
  lines: list[str] = []
  with start(workdir, report=lines.append, **arguments) as processes:
    status = processes.wait(grace_s=60.0)
  assert status == 0, '\n'.join(lines)
  return lines


def final(workdir: pathlib.Path, kind: str) -> dict[str, np.ndarray]:
  """The last state of a stage."""
  with np.load(workdir / kind / 'final.npz') as arrays:
    return dict(arrays)


class _Rows:
  """This process's rows of batches that follow from their number alone."""

  def __init__(self, process_rows: tuple[int, int], pause_s: float):
    self._start, self._count = process_rows
    self._pause_s = pause_s
    self._place = 0

  def __next__(self) -> dict:
    from tests.support import parity, tiny_configs

    time.sleep(self._pause_s)
    self._place += 1
    rows = tiny_configs.rows(
      parity.DOCUMENTS, length=parity.LENGTH, seed=self._place
    )
    mine = slice(self._start, self._start + self._count)
    return {name: value[mine] for name, value in rows.items()}

  def get_state(self) -> int:
    return self._place

  def set_state(self, state: Any) -> None:
    self._place = state


def _main(argv: Sequence[str]) -> None:
  del argv
  from tests.support import double_precision

  with contextlib.ExitStack() as stack:
    precision = None
    if _FLAGS['float64'].value:
      precision = stack.enter_context(double_precision.double_precision())
    _train(precision)


def _train(precision: Any) -> None:
  import jax

  from dsv32_jax.config.training import MeshConfig
  from dsv32_jax.modules.transformer import DeepSeekV32
  from dsv32_jax.sharding import mesh as mesh_lib
  from dsv32_jax.training import state as state_lib
  from tests.support import parity

  parallel = mesh_lib.make_parallel(
    MeshConfig(**json.loads(_FLAGS['mesh'].value))
  )
  cfg = parity.config(initializer_range=0.2, num_nextn_predict_layers=0)
  if precision is not None:
    cfg = dataclasses.replace(cfg, precision=precision)
  model = DeepSeekV32(cfg)
  variables = state_lib.init_variables(model, jax.random.key(0), parallel)
  for kind in _FLAGS['kinds'].value:
    variables = _stage(kind, model, variables, parallel)


def _stage(kind: str, model: Any, variables: dict, parallel: Any) -> dict:
  import jax

  from dsv32_jax.checkpoints import CheckpointManager
  from dsv32_jax.config.data import DataConfig
  from dsv32_jax.config.training import OptimizerConfig, StageConfig
  from dsv32_jax.sharding import axes, process_rows, specs
  from dsv32_jax.training import loop, metrics, optimizer, stages, state, step
  from tests.support import parity

  steps, directory = _FLAGS['steps'].value, _directory(kind)
  batch_size = len(parity.DOCUMENTS)
  settings = OptimizerConfig(peak_learning_rate=2e-3)
  config = StageConfig(
    kind=kind,
    init_from=None if kind == 'pretrain' else 'before',
    steps=steps,
    data=DataConfig(seq_len=parity.LENGTH, batch_size=batch_size),
    optimizer=settings,
    indexer_optimizer=settings,
  )
  stage = stages.build(config, model.cfg)
  tx = optimizer.build(config, stage)
  rows = (0, batch_size)
  shardings = None
  if parallel is not None:
    rows = process_rows.of(parallel.sharding(axes.BATCH), batch_size)
    shardings = specs.of_leaves(variables['params'])
  with (
    CheckpointManager(directory / 'checkpoints') as checkpoints,
    metrics.MetricsWriter(directory, tensorboard=False, display=None) as writer,
  ):
    last = loop.fit(
      step.make_train_step(model, stage, tx, shardings),
      state.create(variables, stage, tx, parallel),
      _Rows(rows, _FLAGS['pause_s'].value),
      key=jax.random.key(1),
      steps=steps,
      directory=directory,
      checkpoints=checkpoints,
      checkpoint_every=_FLAGS['every'].value,
      metrics=writer,
      parallel=parallel,
      report=print,
    )
  leaves = {
    jax.tree_util.keystr(path, simple=True, separator='/'): (
      process_rows.gathered(leaf)
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(last)
  }
  if agreement.is_main():
    np.savez(directory / 'final.npz', **leaves)
  return last.variables


def _directory(kind: str) -> pathlib.Path:
  return pathlib.Path(_FLAGS['workdir'].value) / kind


if __name__ == '__main__':
  _FLAGS = {
    'workdir': absl_flags.DEFINE_string('workdir', None, 'Of the run.'),
    'mesh': absl_flags.DEFINE_string('mesh', '{}', 'A MeshConfig.'),
    'kinds': absl_flags.DEFINE_list('kinds', list(STAGES), 'Stages.'),
    'steps': absl_flags.DEFINE_integer('steps', 20, 'A stage.'),
    'every': absl_flags.DEFINE_integer('every', 20, 'Between checkpoints.'),
    'pause_s': absl_flags.DEFINE_float('pause_s', 0.0, 'Before each batch.'),
    'float64': absl_flags.DEFINE_bool('float64', False, 'Throughout.'),
  }
  flags.run(_main, hosts=flags.define_hosts())
