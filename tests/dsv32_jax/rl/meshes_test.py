import dataclasses

import pytest

from dsv32_jax.config.training import MeshConfig
from dsv32_jax.rl import meshes
from tests.support import rl_runs


def test_sampler_and_trainer_get_different_devices():
  config = rl_runs.config(
    rollout_devices=4, mesh=MeshConfig(), rollout_mesh=MeshConfig(fsdp=2)
  )
  training, sampling = meshes.make(config)
  assert dict(training.mesh.shape)['data'] == 4
  assert dict(sampling.mesh.shape)['data'] == 2
  assert dict(sampling.mesh.shape)['fsdp'] == 2
  ids = [{d.id for d in p.mesh.devices.flat} for p in (training, sampling)]
  assert [len(one) for one in ids] == [4, 4]
  assert not ids[0] & ids[1]


def test_sampler_shares_the_devices_of_training_unless_told_otherwise():
  training, sampling = meshes.make(rl_runs.config(mesh=MeshConfig(data=4)))
  assert sampling is training
  assert meshes.make(rl_runs.config()) == (None, None)


def test_devices_and_rows_that_do_not_divide_are_refused():
  with pytest.raises(ValueError, match=r'rollout_devices: got 8 of 8'):
    meshes.make(rl_runs.config(rollout_devices=8))
  config = rl_runs.config(mesh=MeshConfig(data=8))
  with pytest.raises(ValueError, match=r'update.rows: got 4, expected a mul'):
    meshes.make(config)
  update = dataclasses.replace(config.update, rows=8)
  meshes.make(dataclasses.replace(config, update=update))
