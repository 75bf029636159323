"""A run that is killed goes on with other devices and other rules."""

import pathlib
import signal

import numpy as np
import pytest

from dsv32_jax.training import metrics
from tests.support import reshard

# Devices, mesh, and the step at whose batch the process kills itself.
SESSIONS = (
  (8, {'rules': 'fsdp_expert', 'data': 2, 'fsdp': 2, 'expert': 2}, 8),
  (
    4,
    {'rules': 'fsdp_expert_context', 'data': 1, 'expert': 2, 'context': 2},
    12,
  ),
  (2, {'rules': 'fsdp', 'fsdp': 2}, 19),
  (8, {'rules': 'fsdp_tensor_expert', 'fsdp': 4, 'tensor': 2}, 0),
)
KEYS = ('loss/total', 'loss/lm', 'loss/mtp', 'loss/indexer_kl', 'loss/balance')


def losses(workdir: pathlib.Path) -> np.ndarray:
  lines = metrics.read(workdir)
  assert [line['step'] for line in lines] == list(range(1, reshard.STEPS + 1))
  return np.array([[line[key] for key in KEYS] for line in lines])


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.multidevice
@pytest.mark.timeout(900)
def test_killed_run_goes_on_with_8_then_4_then_2_then_8_devices(tmp_path):
  status = reshard.run(
    tmp_path / 'through', devices=1, mesh={'data': 1}, kill_at=0
  )
  assert status == 0
  for devices, mesh, kill_at in SESSIONS:
    status = reshard.run(
      tmp_path / 'cut', devices=devices, mesh=mesh, kill_at=kill_at
    )
    assert status == (-signal.SIGKILL if kill_at else 0)
  through, cut = losses(tmp_path / 'through'), losses(tmp_path / 'cut')
  # Five steps each with 8, 4, 2 and 8 devices.
  np.testing.assert_allclose(cut, through, rtol=1e-5)
  assert through[-1, 0] < through[0, 0]
