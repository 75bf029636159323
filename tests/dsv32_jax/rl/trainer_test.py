"""A run that is killed and started again is the run that was not."""

import json
import os
import pathlib
import random
import shutil
import signal
import time

import pytest

pytest.importorskip('reasoning_gym')

from dsv32_jax.rl import trainer
from tests.support import rl_runs


@pytest.fixture(scope='module')
def served(tmp_path_factory):
  """A server and the directory of an uninterrupted run."""
  directory = tmp_path_factory.mktemp('rl')
  with rl_runs.server(directory / 'compiled') as server:
    whole = directory / 'whole'
    server.start(whole)
    assert server.wait() == 0, _log(whole)
    yield server, whole


@pytest.fixture(scope='module')
def reports(served, tmp_path_factory) -> list[float]:
  """Seconds of each line that a run with compiled programs says, and its end.

  Counted from the start of a run whose cold start is there already.
  """
  server, whole = served
  workdir = tmp_path_factory.mktemp('rl') / 'again'
  _with_start(workdir, whole)
  began = time.monotonic()
  process = server.start(workdir)
  seconds: list[float] = []
  while not _has_ended(process):
    new = len(_lines(workdir)) - len(seconds)
    seconds += [time.monotonic() - began] * new
    time.sleep(0.005)
  assert server.wait() == 0, _log(workdir)
  check_equal(workdir, whole)
  return [*seconds, time.monotonic() - began]


def kill_and_resume(served, reports, workdir: pathlib.Path, share: float):
  """Kills a run after that share of its time; returns how it ended.

  How far a run is, is told by the lines it has said, so that one on busy cores
  is killed at the same place.
  """
  server, whole = served
  _with_start(workdir, whole)
  number = sum(second <= share * reports[-1] for second in reports)
  more = share * reports[-1] - (reports[number - 1] if number else 0.0)
  process = server.start(workdir)
  while len(_lines(workdir)) < number and not _has_ended(process):
    time.sleep(0.002)
  time.sleep(more)
  os.kill(process, signal.SIGKILL)
  status = server.wait()
  server.start(workdir)
  assert server.wait() == 0, _log(workdir)
  return status


def _with_start(workdir: pathlib.Path, whole: pathlib.Path) -> None:
  # What comes before RL has kill tests of its own.
  workdir.mkdir(parents=True)
  for name in ('config.json', 'start', 'tokenizer', 'demonstrations'):
    path = whole / name
    copy = shutil.copytree if path.is_dir() else shutil.copy
    copy(path, workdir / name)


def _has_ended(process: int) -> bool:
  """Whether it is a zombie, as its parent has not asked yet how it ended."""
  stat = pathlib.Path(f'/proc/{process}/stat').read_text()
  return stat.rpartition(')')[2].split()[0] == 'Z'


def check_equal(workdir: pathlib.Path, whole: pathlib.Path) -> None:
  found, expected = rl_runs.digest(workdir), rl_runs.digest(whole)
  assert found['lines'] == expected['lines']
  assert found['evaluations'] == expected['evaluations']
  assert found['step'] == expected['step']
  assert found['state'] == expected['state']


@pytest.mark.slow
def test_run_killed_gives_the_bits_of_the_whole_run(served, reports, tmp_path):
  ended = kill_and_resume(served, reports, tmp_path / 'killed', 0.6)
  assert ended == -signal.SIGKILL
  check_equal(tmp_path / 'killed', served[1])


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_run_killed_at_ten_moments_gives_the_bits_of_the_whole_run(
  served, reports, tmp_path
):
  rng = random.Random(6)
  # Before the first line of the first batch it has nothing to lose.
  first = reports[0] / reports[-1]
  for number in range(10):
    workdir = tmp_path / f'killed_{number}'
    share = first + (0.97 - first) * rng.random()
    ended = kill_and_resume(served, reports, workdir, share)
    steps = [line for line in _lines(workdir) if 'resumed' in line]
    print(f'{share:.2f} of {reports[-1]:.0f} s: {ended}, {steps}')
    assert ended == -signal.SIGKILL
    check_equal(workdir, served[1])
    shutil.rmtree(workdir)


@pytest.mark.slow
def test_whole_run_samples_ahead_learns_and_is_left_alone_when_done(served):
  _, whole = served
  lines = rl_runs.digest(whole)['lines']
  assert [line['step'] for line in lines] == list(range(1, 9))
  # Rewards differ within groups, else nothing is learned from them.
  assert min(line.get('rollout/equal_groups', 1) for line in lines) < 1
  # Drawn with the weights of one batch before.
  ages = [line['rollout/age'] for line in lines if 'rollout/age' in line]
  assert ages == [0.0, 2.0, 2.0, 2.0]
  # The sampler and the trainer agree at equal weights, not at later ones.
  drifts = [line.get('sampler/log_ratio_abs_max', 0) for line in lines]
  assert max(drifts) < 1e-5
  assert max(line['grpo/log_ratio_abs_max'] for line in lines) > 1e-3
  fractions = [line['compute/rl_over_pretraining'] for line in lines]
  assert fractions == sorted(fractions)
  assert fractions[0] > 0

  before = (whole / 'metrics.jsonl').read_bytes()
  said: list[str] = []
  summary = trainer.Run(rl_runs.config(), whole, report=said.append).run()
  assert summary == json.loads((whole / 'rl.json').read_text())
  assert said == [f'{whole}: done already']
  assert before == (whole / 'metrics.jsonl').read_bytes()
  with pytest.raises(ValueError, match=r'seed = 0, this one has 1'):
    trainer.Run(rl_runs.config(seed=1), whole)


def test_run_in_a_directory_with_other_files_is_refused(tmp_path):
  (tmp_path / 'thesis.tex').write_text('important')
  with pytest.raises(ValueError, match=r'no config.json'):
    trainer.Run(rl_runs.config(), tmp_path)


def test_run_with_a_source_of_another_domain_is_refused(tmp_path):
  domains = rl_runs.config().domains
  swapped = {
    'mathematics': domains['logical_reasoning'],
    'logical_reasoning': domains['mathematics'],
  }
  with pytest.raises(
    ValueError, match=r'domains.mathematics.sources\[0\].name: got'
  ):
    trainer.Run(rl_runs.config(domains=swapped), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def _log(workdir: pathlib.Path) -> str:
  path = workdir.with_suffix('.log')
  return path.read_text(encoding='utf-8') if path.exists() else 'no log'


def _lines(workdir: pathlib.Path) -> list[str]:
  path = workdir.with_suffix('.log')
  return path.read_text(encoding='utf-8').splitlines() if path.exists() else []
