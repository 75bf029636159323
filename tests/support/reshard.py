"""A tiny run that kills itself, to be continued on other devices.

`python -m tests.support.reshard WORKDIR MESH KILL_AT` trains on the devices
that XLA_FLAGS gives, from the newest checkpoint of WORKDIR. MESH is a
`MeshConfig` as JSON. When the batch of step KILL_AT is asked for, and every
checkpoint before it is sealed, the process kills itself with SIGKILL; 0 lets it
end.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

STEPS = 20
EVERY = 5
_ROOT = pathlib.Path(__file__).parents[2]


def run(
  workdir: pathlib.Path, *, devices: int, mesh: dict, kill_at: int
) -> int:
  """Runs this module in a process of its own; returns its exit status."""
  flags = f'--xla_force_host_platform_device_count={devices}'
  process = subprocess.run(
    (
      sys.executable,
      '-m',
      'tests.support.reshard',
      str(workdir),
      json.dumps(mesh),
      str(kill_at),
    ),
    cwd=_ROOT,
    env=os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'},
    check=False,
  )
  return process.returncode


class _Rows:
  """Batches that follow from their number alone."""

  def __init__(self, workdir: pathlib.Path, kill_at: int):
    self._checkpoints = workdir / 'checkpoints'
    self._kill_at = kill_at
    self._place = 0

  def __next__(self) -> dict:
    from tests.support import parity, tiny_configs

    self._place += 1
    if self._place == self._kill_at:
      last = (self._place - 1) // EVERY * EVERY
      sealed = self._checkpoints / f'step_{last:08d}' / 'manifest.json'
      while not sealed.exists():
        time.sleep(0.05)
      os.kill(os.getpid(), signal.SIGKILL)
    return tiny_configs.rows(
      parity.DOCUMENTS, length=parity.LENGTH, seed=self._place
    )

  def get_state(self) -> int:
    return self._place

  def set_state(self, state: Any) -> None:
    self._place = state


def _main(workdir: pathlib.Path, mesh: dict, kill_at: int) -> None:
  import jax

  from dsv32_jax.checkpoints import CheckpointManager
  from dsv32_jax.config.data import DataConfig
  from dsv32_jax.config.training import MeshConfig, StageConfig
  from dsv32_jax.modules.transformer import DeepSeekV32
  from dsv32_jax.sharding import mesh as mesh_lib
  from dsv32_jax.sharding import specs
  from dsv32_jax.training import loop, metrics, optimizer, stages, state, step
  from tests.support import parity

  cfg = parity.config(initializer_range=0.2)
  parallel = mesh_lib.make_parallel(MeshConfig(**mesh))
  assert (parallel is None) == (jax.device_count() == 1)
  model = DeepSeekV32(cfg)
  config = StageConfig(
    kind='sparse_training',
    init_from='x',
    steps=STEPS,
    data=DataConfig(seq_len=parity.LENGTH, batch_size=len(parity.DOCUMENTS)),
  )
  stage = stages.build(config, cfg)
  tx = optimizer.build(config, stage)
  variables = state.init_variables(model, jax.random.key(0), parallel)
  shardings = specs.of_leaves(variables['params']) if parallel else None
  with (
    CheckpointManager(workdir / 'checkpoints') as checkpoints,
    metrics.MetricsWriter(workdir, tensorboard=False, display=None) as writer,
  ):
    loop.fit(
      step.make_train_step(model, stage, tx, shardings),
      state.create(variables, stage, tx, parallel),
      _Rows(workdir, kill_at),
      key=jax.random.key(1),
      steps=STEPS,
      directory=workdir,
      checkpoints=checkpoints,
      checkpoint_every=EVERY,
      metrics=writer,
      parallel=parallel,
    )


if __name__ == '__main__':
  _main(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]))
