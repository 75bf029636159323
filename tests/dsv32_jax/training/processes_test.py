"""Training in two processes of four devices, beside one process of eight.

The processes are real, and find each other through jax.distributed on this
machine. DSV32_HOST_KILLS sets how often one of them is killed.
"""

import os
import pathlib
import random
import signal
import threading
import time

import numpy as np
import pytest

from dsv32_jax.training import metrics
from tests.support import host_training

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FSDP = {'rules': 'fsdp', 'data': 2, 'fsdp': 4}
EXPERT = {'rules': 'fsdp_expert', 'data': 2, 'fsdp': 2, 'expert': 2}
# Both processes need the same rows: `context` runs across them.
CONTEXT = {'rules': 'fsdp_expert_context', 'context': 4, 'expert': 2}
TENSOR = {'rules': 'fsdp_tensor_expert', 'fsdp': 2, 'expert': 2, 'tensor': 2}
KILLS = int(os.environ.get('DSV32_HOST_KILLS', '1'))
STEPS, EVERY = 20, 4


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  """Compiled programs of all runs."""
  return tmp_path_factory.mktemp('compiled')


def lines(workdir: pathlib.Path, kind: str) -> list[dict]:
  """Every metric of every step but the times."""
  return [
    {k: v for k, v in line.items() if not k.startswith('time/')}
    for line in metrics.read(workdir / kind)
  ]


def losses(workdir: pathlib.Path, kind: str) -> np.ndarray:
  found = lines(workdir, kind)
  assert [line['step'] for line in found] == list(range(1, STEPS + 1))
  keys = sorted(key for key in found[0] if key.startswith('loss/'))
  return np.array([[line[key] for key in keys] for line in found])


def one_and_two(root, cache, mesh, kind, **settings):
  """The work directories of a run in one process and in two."""
  for processes in (1, 2):
    host_training.run(
      root / f'{processes}',
      processes=processes,
      devices=8,
      mesh=mesh,
      cache=cache,
      kinds=kind,
      steps=STEPS,
      every=STEPS,
      **settings,
    )
  return root / '1', root / '2'


@pytest.mark.exhaustive
@pytest.mark.parametrize(
  ('mesh', 'kind'),
  [
    pytest.param(FSDP, 'pretrain', id='fsdp-pretrain'),
    pytest.param(FSDP, 'dense_warmup', id='fsdp-dense_warmup'),
    pytest.param(FSDP, 'sparse_training', id='fsdp-sparse_training'),
    pytest.param(EXPERT, 'sparse_training', id='fsdp_expert'),
    pytest.param(CONTEXT, 'sparse_training', id='fsdp_expert_context'),
    pytest.param(TENSOR, 'sparse_training', id='fsdp_tensor_expert'),
  ],
)
def test_two_processes_train_like_one_in_float64(tmp_path, cache, mesh, kind):
  one, two = one_and_two(tmp_path, cache, mesh, kind, float64=True)
  np.testing.assert_allclose(
    losses(two, kind), losses(one, kind), rtol=0, atol=1e-9
  )
  desired, actual = (host_training.final(path, kind) for path in (one, two))
  assert desired.keys() == actual.keys()
  for name, array in desired.items():
    np.testing.assert_allclose(
      actual[name], array, rtol=0, atol=1e-9, err_msg=name
    )
  # Names are in alphabetical order: the last one is loss/total.
  assert losses(one, kind)[-1, -1] < losses(one, kind)[0, -1]


@pytest.mark.exhaustive
def test_two_processes_train_like_one_in_float32(tmp_path, cache):
  kind = 'pretrain'
  one, two = one_and_two(tmp_path, cache, FSDP, kind)
  np.testing.assert_allclose(losses(two, kind), losses(one, kind), rtol=2e-5)
  desired, actual = (host_training.final(path, kind) for path in (one, two))
  for name, array in desired.items():
    error = np.linalg.norm(np.float64(actual[name]) - array)
    assert error <= 2e-5 * np.linalg.norm(np.float64(array)), name


class _Trained:
  """An uninterrupted run in two processes; each run can be compared with it."""

  kind = 'sparse_training'

  def __init__(self, root: pathlib.Path, cache: pathlib.Path):
    self.cache = cache
    self.workdir = root / 'through'
    self.run(root / 'compiles')
    began = time.monotonic()
    self.run(self.workdir)
    self.seconds = time.monotonic() - began

  def start(self, workdir: pathlib.Path, said: list[str]):
    return host_training.start(
      workdir,
      processes=2,
      devices=8,
      mesh=EXPERT,
      cache=self.cache,
      report=said.append,
      kinds=self.kind,
      steps=STEPS,
      every=EVERY,
      pause_s=0.1,
    )

  def run(self, workdir: pathlib.Path) -> list[str]:
    said: list[str] = []
    with self.start(workdir, said) as processes:
      assert processes.wait(grace_s=60.0) == 0, '\n'.join(said)
    return said

  def assert_resumes_to_the_same_bits(self, workdir: pathlib.Path) -> None:
    self.run(workdir)
    assert lines(workdir, self.kind) == lines(self.workdir, self.kind)
    desired = host_training.final(self.workdir, self.kind)
    actual = host_training.final(workdir, self.kind)
    for name, array in desired.items():
      np.testing.assert_array_equal(actual[name], array, err_msg=name)


@pytest.fixture(scope='module')
def trained(tmp_path_factory, cache):
  return _Trained(tmp_path_factory.mktemp('trained'), cache)


def _child_of(process: int) -> int | None:
  """The process that trains, once its guard has started it."""
  path = pathlib.Path(f'/proc/{process}/task/{process}/children')
  children = path.read_text().split()
  return int(children[0]) if children else None


def _killed(
  trained: _Trained, workdir: pathlib.Path, victim: int, delay_s: float
) -> float | None:
  """Kills one process of a run after a time.

  Returns:
    Seconds until both had ended; None if the run was done before.
  """
  said: list[str] = []
  with trained.start(workdir, said) as processes:
    blows = []

    def kill() -> None:
      time.sleep(delay_s)
      try:
        child = _child_of(processes.ids[victim])
        # Process 0 makes the directory, once all have found each other.
        joined = workdir.exists()
        os.kill(child or processes.ids[victim], signal.SIGKILL)
        blows.append((time.monotonic(), child, joined))
      except OSError:
        pass

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    status = processes.wait(grace_s=45.0)
    ended = time.monotonic()
    thread.join()
  if not blows or status == 0:
    return None
  [(began, child, joined)] = blows
  text = '\n'.join(said)
  assert status in (1, 134, 137), text
  if child is not None:
    assert f'[{victim}] error: ' in text
  if joined:
    assert 'are killed' not in text, text
    assert f'[{1 - victim}] error: ' in text
    assert 'The job ends. Its newest checkpoint is intact: the same' in text
  else:
    # The other one waits for a start that may take minutes; the launcher does
    # not.
    assert f'[launch] process {victim} ' in text, text
  return ended - began


def test_killed_process_ends_the_job_and_it_resumes_to_the_same_bits(
  trained, tmp_path, capsys
):
  chance = random.Random()
  told = []
  while len(told) < KILLS:
    workdir = tmp_path / f'{chance.randrange(1 << 30)}'
    victim = chance.randrange(2)
    seconds = _killed(
      trained, workdir, victim, chance.uniform(0, trained.seconds)
    )
    if seconds is None:
      continue
    assert seconds < 60
    steps = len(lines(workdir, trained.kind))
    told.append(f'process {victim} at step {steps} ({seconds:.0f} s)')
    trained.assert_resumes_to_the_same_bits(workdir)
  with capsys.disabled():
    print(f'\nkilled, and seconds until the job ended: {"; ".join(told)}')


@pytest.mark.exhaustive
def test_sigterm_at_one_process_saves_and_the_run_resumes_to_the_same_bits(
  trained, tmp_path
):
  said: list[str] = []
  with trained.start(tmp_path, said) as processes:

    def interrupt() -> None:
      while not lines(tmp_path, trained.kind):
        time.sleep(0.05)
      os.kill(processes.ids[1], signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    assert processes.wait(grace_s=60.0) == 143, said
  stops = [line for line in said if 'SIGTERM: stopped after step' in line]
  assert len(stops) == 1, said
  assert stops[0].startswith('[0] ')
  assert len(lines(tmp_path, trained.kind)) < STEPS
  trained.assert_resumes_to_the_same_bits(tmp_path)


@pytest.mark.exhaustive
def test_damaged_newest_checkpoint_is_left_out_by_both_processes(
  trained, tmp_path
):
  said: list[str] = []
  kind = trained.kind
  trained.run(tmp_path)
  newest = tmp_path / kind / 'checkpoints' / f'step_{STEPS:08d}'
  file = max(
    (path for path in newest.rglob('*') if path.is_file()),
    key=lambda path: path.stat().st_size,
  )
  os.truncate(file, file.stat().st_size // 2)
  said = trained.run(tmp_path)
  assert any(f'step_{STEPS - EVERY:08d} is used instead' in x for x in said)
  desired = host_training.final(trained.workdir, kind)
  for name, array in host_training.final(tmp_path, kind).items():
    np.testing.assert_array_equal(array, desired[name], err_msg=name)


@pytest.mark.exhaustive
def test_run_goes_on_in_other_numbers_of_processes_and_devices(tmp_path, cache):
  """8 -> 4 -> 2 -> 8 devices, five steps each."""
  kind = 'sparse_training'
  through, cut = tmp_path / 'through', tmp_path / 'cut'
  sessions = (
    (2, 8, EXPERT, 5),
    (2, 4, {'rules': 'fsdp_expert_context', 'context': 2, 'expert': 2}, 10),
    (1, 2, {'rules': 'fsdp', 'fsdp': 2, 'data': 1}, 15),
    (2, 8, TENSOR, STEPS),
  )
  for workdir, parts in ((through, ((1, 1, {}, STEPS),)), (cut, sessions)):
    for processes, devices, mesh, steps in parts:
      host_training.run(
        workdir,
        processes=processes,
        devices=devices,
        mesh=mesh,
        cache=cache,
        kinds=kind,
        steps=steps,
        every=5,
      )
  np.testing.assert_allclose(
    losses(cut, kind), losses(through, kind), rtol=1e-5
  )
