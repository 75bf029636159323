"""kill -9 of real training processes, and damage to what they left."""

import os
import pathlib
import random
import shutil
import signal
import time
from collections.abc import Callable

import pytest

from dsv32_jax.checkpoints import integrity
from dsv32_jax.training import metrics
from tests.support import kill_resume

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

KILLS = 20
KILLS_DURING_A_SAVE = 6


class _Trained:
  """A finished, uninterrupted run, and what a run must end like."""

  def __init__(self, server, prepared: pathlib.Path, root: pathlib.Path):
    self.server = server
    self.prepared = prepared
    self.root = root
    self.workdir = root / 'through'
    # The first run compiles; the second is the reference, and it is timed.
    for workdir in (root / 'compiles', self.workdir):
      began = time.monotonic()
      server.start(workdir)
      _wait_for_a_step(workdir)
      stepped = time.monotonic()
      assert server.wait() == 0
      self.startup_s = stepped - began
      self.training_s = time.monotonic() - stepped
    self.digest = kill_resume.digest(self.workdir, prepared)
    self.lines = _lines(self.workdir)
    assert self.digest == kill_resume.digest(root / 'compiles', prepared)

  def assert_resumes_to_the_same_bits(self, workdir: pathlib.Path):
    self.server.start(workdir)
    assert self.server.wait() == 0
    assert kill_resume.digest(workdir, self.prepared) == self.digest
    assert _lines(workdir) == self.lines


def _lines(workdir: pathlib.Path) -> list[dict]:
  """Every metric of every step but the times."""
  return [
    {k: v for k, v in line.items() if not k.startswith('time/')}
    for line in metrics.read(workdir)
  ]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  root = tmp_path_factory.mktemp('kill_resume')
  with kill_resume.server(root / 'prepared') as server:
    yield _Trained(server, root / 'prepared', root)


def _unfinished(workdir: pathlib.Path) -> list[str]:
  """Checkpoints that were begun and not sealed."""
  try:
    return [
      path.name
      for path in (workdir / 'checkpoints').iterdir()
      if not integrity.is_sealed(path)
    ]
  except FileNotFoundError:
    return []


def _poll(is_there: Callable[[], bool]) -> None:
  deadline = time.monotonic() + 60
  while not is_there():
    assert time.monotonic() < deadline, 'the run did not get there'
    time.sleep(0.0005)


def _wait_for_a_step(workdir: pathlib.Path) -> None:
  path = workdir / metrics.JSONL
  _poll(lambda: path.exists() and path.stat().st_size > 0)


def _wait_for_a_save(workdir: pathlib.Path, saves: int) -> None:
  """Returns as the save after `saves` of them begins."""
  step = kill_resume.CHECKPOINT_EVERY * (saves + 1)
  checkpoints = workdir / 'checkpoints'
  _poll(
    lambda: (
      checkpoints.exists()
      and any(
        name.startswith(f'step_{step:08d}') for name in os.listdir(checkpoints)
      )
    )
  )


def test_training_killed_at_any_moment_resumes_to_the_same_bits(
  trained, capsys
):
  assert trained.digest[0] == kill_resume.STEPS
  assert [line['step'] for line in trained.lines] == list(
    range(1, kill_resume.STEPS + 1)
  )
  chance = random.Random()
  saves = kill_resume.STEPS // kill_resume.CHECKPOINT_EVERY
  kills, during_a_save, told = 0, 0, []
  for attempt in range(3 * KILLS):
    if kills == KILLS and during_a_save >= KILLS_DURING_A_SAVE:
      break
    workdir = trained.root / f'killed_{attempt}'
    process = trained.server.start(workdir)
    if during_a_save < KILLS_DURING_A_SAVE and attempt % 2:
      _wait_for_a_save(workdir, chance.randrange(saves))
      time.sleep(chance.uniform(0, 0.03))
    elif attempt % 8 == 0:
      # Imports, compilation and the opening of files are killed as well.
      time.sleep(chance.uniform(0, trained.startup_s))
    else:
      _wait_for_a_step(workdir)
      time.sleep(chance.uniform(0, trained.training_s))
    os.kill(process, signal.SIGKILL)
    if trained.server.wait() != -signal.SIGKILL:
      # It was done before the blow fell: no trial.
      continue
    unfinished = _unfinished(workdir)
    kills += 1
    during_a_save += bool(unfinished)
    told.append(f'{len(_lines(workdir))}{"s" if unfinished else ""}')
    trained.assert_resumes_to_the_same_bits(workdir)
    shutil.rmtree(workdir)
  with capsys.disabled():
    print(
      f'\nkilled {kills} times, {during_a_save} during a save; steps written '
      f'(s: during a save): {" ".join(told)}'
    )
  assert kills >= KILLS
  assert during_a_save >= KILLS_DURING_A_SAVE


@pytest.mark.parametrize('damage', ['truncated', 'bit flipped'])
def test_training_survives_a_damaged_newest_checkpoint(trained, damage):
  workdir = trained.root / damage.replace(' ', '_')
  shutil.copytree(trained.workdir, workdir)
  newest = workdir / 'checkpoints' / f'step_{kill_resume.STEPS:08d}'
  file = max(
    (path for path in newest.rglob('*') if path.is_file()),
    key=lambda path: path.stat().st_size,
  )
  if damage == 'truncated':
    os.truncate(file, file.stat().st_size // 2)
  else:
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 4
    file.write_bytes(content)
  step, _ = kill_resume.digest(workdir, trained.prepared)
  assert step == kill_resume.STEPS - kill_resume.CHECKPOINT_EVERY
  trained.assert_resumes_to_the_same_bits(workdir)
  assert integrity.damage(newest) is None
