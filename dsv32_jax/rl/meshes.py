"""The devices that sample and those that train.

Both may be the same, or each has its own part of the job's devices: then the
weights travel from one mesh to the other at every hand-over.
"""

import math

import jax

from dsv32_jax.config.rl import RLConfig
from dsv32_jax.config.training import MeshConfig
from dsv32_jax.sharding import mesh as mesh_lib
from dsv32_jax.sharding import specs
from dsv32_jax.sharding.hosts import agreement
from dsv32_jax.sharding.parallel import Parallel
from dsv32_jax.sharding.rules import RULE_SETS


def make(config: RLConfig) -> tuple[Parallel | None, Parallel | None]:
  """Layouts of (training, sampling); None stands for the default device.

  Raises:
    ValueError: sizes that the devices cannot share, or several processes.
  """
  if not agreement.is_alone():
    raise ValueError(
      f'num_processes: got {agreement.process()[1]}, expected 1: RL runs in '
      'one process, on all devices of a host'
    )
  devices = jax.devices()
  sampling_mesh = config.rollout_mesh or config.mesh
  if config.rollout_devices == 0:
    training = mesh_lib.make_parallel(config.mesh)
    sampling = training
    if config.rollout_mesh is not None:
      sampling = mesh_lib.make_parallel(config.rollout_mesh)
  else:
    rest = len(devices) - config.rollout_devices
    if rest < 1:
      raise ValueError(
        f'rollout_devices: got {config.rollout_devices} of {len(devices)}, '
        'expected at least one to be left for training'
      )
    training = _parallel('mesh', config.mesh, devices[:rest])
    sampling = _parallel('rollout_mesh', sampling_mesh, devices[rest:])
  if training is not None:
    try:
      specs.check_batch(
        training,
        batch_size=config.rows,
        seq_len=config.row_tokens,
        micro_batches=config.update.micro_batches,
        where='update.',
      )
    except ValueError as error:
      # Rows are made of responses, not of documents.
      text = str(error).replace('.batch_size', '.rows')
      text = text.replace('.seq_len', '.row_tokens')
      raise ValueError(text) from None
  return training, sampling


def _parallel(name: str, config: MeshConfig, devices: list) -> Parallel:
  """A layout over some devices; a mesh also for a single one."""
  try:
    sizes = mesh_lib.axis_sizes(config, len(devices))
  except ValueError as error:
    raise ValueError(f'{name}: {error}') from None
  mesh = mesh_lib.make_mesh(sizes, devices[: math.prod(sizes.values())])
  return Parallel(mesh, RULE_SETS[config.rules], config.exchange)
