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
  """A server, an uninterrupted run and the seconds that such a run takes."""
  directory = tmp_path_factory.mktemp('rl')
  with rl_runs.Server(directory / 'compiled') as server:
    whole = directory / 'whole'
    began = time.monotonic()
    server.start(whole)
    assert server.wait() == 0, _log(whole)
    yield server, whole, time.monotonic() - began


def kill_and_resume(served, workdir: pathlib.Path, share: float) -> int:
  """Kills a run after that share of its time; returns how it ended."""
  server, whole, seconds = served
  workdir.mkdir(parents=True)
  # What comes before RL has kill tests of its own.
  for name in ('config.json', 'start', 'tokenizer', 'demonstrations'):
    path = whole / name
    copy = shutil.copytree if path.is_dir() else shutil.copy
    copy(path, workdir / name)
  process = server.start(workdir)
  time.sleep(share * seconds)
  os.kill(process, signal.SIGKILL)
  status = server.wait()
  server.start(workdir)
  assert server.wait() == 0, _log(workdir)
  return status


def check_equal(workdir: pathlib.Path, whole: pathlib.Path) -> None:
  found, expected = rl_runs.digest(workdir), rl_runs.digest(whole)
  assert found['lines'] == expected['lines']
  assert found['evaluations'] == expected['evaluations']
  assert found['step'] == expected['step']
  assert found['state'] == expected['state']


@pytest.mark.slow
def test_run_killed_gives_the_bits_of_the_whole_run(served, tmp_path):
  # Programs are compiled by now, so this is well within the steps.
  kill_and_resume(served, tmp_path / 'killed', 0.5)
  check_equal(tmp_path / 'killed', served[1])


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_run_killed_at_ten_moments_gives_the_bits_of_the_whole_run(
  served, tmp_path
):
  server, whole, _ = served
  # How long it takes with compiled programs, and that nothing else varies.
  began = time.monotonic()
  server.start(tmp_path / 'again')
  assert server.wait() == 0, _log(tmp_path / 'again')
  seconds = time.monotonic() - began
  check_equal(tmp_path / 'again', whole)
  rng = random.Random(6)
  ends = []
  for number in range(10):
    workdir = tmp_path / f'killed_{number}'
    share = rng.uniform(0.25, 0.95)
    ends.append(kill_and_resume((server, whole, seconds), workdir, share))
    steps = [line for line in _log(workdir).splitlines() if 'resumed' in line]
    print(f'{share:.2f} of {seconds:.0f} s: {ends[-1]}, {steps}')
    check_equal(workdir, whole)
    shutil.rmtree(workdir)
  assert ends.count(-signal.SIGKILL) >= 8


@pytest.mark.slow
def test_whole_run_samples_ahead_learns_and_is_left_alone_when_done(served):
  _, whole, _ = served
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
