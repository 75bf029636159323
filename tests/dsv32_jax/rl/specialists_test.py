"""The chain of distillation; what each of its parts does has its own tests."""

import dataclasses
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from dsv32_jax.config.distillation import DistillationConfig
from dsv32_jax.evaluation import distillation
from dsv32_jax.rl import models, specialists
from dsv32_jax.training import flags

ROOT = pathlib.Path(__file__).resolve().parents[3]
CONFIG = 'experiments/configs/distill_specialists.py'


def config(preset: str) -> DistillationConfig:
  names: dict = {}
  exec((ROOT / CONFIG).read_text(), names)
  return flags.resolve(names['get_config'](preset), DistillationConfig)


def quiet(line):
  del line


@pytest.mark.parametrize('preset', ['smoke', 'cpu'])
def test_distillation_presets_have_the_six_domains(preset):
  resolved = config(preset)
  assert len(resolved.domains) == 6
  agents = {n for n, d in resolved.domains.items() if d.unpopulated}
  assert agents >= {'general_agent', 'agentic_coding', 'agentic_search'}
  assert {domain for domain, _ in resolved.pairs} == {
    *resolved.domains
  } - agents


def test_distillation_steps_go_from_base_to_specialists_to_student(tmp_path):
  chain = specialists.Distillation(
    config('smoke'), tmp_path / 'run', report=quiet
  )
  names = chain.steps.names
  for earlier, later in (
    ('base', 'specialist.mathematics-thinking'),
    ('specialist.mathematics-thinking', 'samples.mathematics-thinking'),
    ('samples.mathematics-thinking', 'student'),
    ('samples.logical_reasoning-chat', 'student'),
    ('student', 'mixed'),
    ('mixed', 'evaluate.mixed'),
  ):
    assert names.index(earlier) < names.index(later)
  # Nothing but the base can start; then all specialists can.
  assert chain.steps.ready([]) == ['base']
  assert not chain.is_done


def test_distillation_unknown_step_and_one_before_its_needs_are_refused(
  tmp_path,
):
  said = []
  chain = specialists.Distillation(
    config('smoke'), tmp_path / 'run', report=said.append
  )
  with pytest.raises(ValueError, match='expected one of'):
    chain.run(only='nothing')
  with pytest.raises(
    ValueError, match=r"'specialist\.mathematics-thinking' needs"
  ):
    chain.run(only='specialist.mathematics-thinking')
  # Processes that run one step do not say it again.
  assert not said


def test_distillation_other_config_in_the_same_workdir_is_refused(tmp_path):
  mine = config('smoke')
  specialists.Distillation(mine, tmp_path / 'run', report=quiet)
  # What changes no result may change.
  free = dataclasses.replace(mine, max_batch=7)
  specialists.Distillation(free, tmp_path / 'run', report=quiet)
  rejection = dataclasses.replace(mine.rejection, samples=2)
  other = dataclasses.replace(mine, rejection=rejection)
  with pytest.raises(ValueError, match=r'run with rejection\.samples = '):
    specialists.Distillation(other, tmp_path / 'run', report=quiet)


def test_distillation_foreign_directory_is_refused(tmp_path):
  (tmp_path / 'thesis.tex').write_text('mine')
  with pytest.raises(ValueError, match='holds files that are not of a run'):
    specialists.Distillation(config('smoke'), tmp_path, report=quiet)
  assert [path.name for path in tmp_path.iterdir()] == ['thesis.tex']


def test_distillation_unknown_source_is_refused_before_writing(tmp_path):
  mine = config('smoke')
  domain = mine.domains['mathematics']
  source = dataclasses.replace(
    domain.sources[0], name='gym/chain_sun', options={}
  )
  domains = {
    **mine.domains,
    'mathematics': dataclasses.replace(domain, sources=(source,)),
  }
  with pytest.raises(ValueError, match=r"domains\.mathematics: .*'chain_sun'"):
    specialists.Distillation(
      dataclasses.replace(mine, domains=domains), tmp_path / 'run', report=quiet
    )
  assert not (tmp_path / 'run').exists()


def start(workdir: pathlib.Path, *arguments: str) -> subprocess.Popen:
  return subprocess.Popen(
    (
      sys.executable,
      'experiments/distill_specialists.py',
      f'--config={CONFIG}:smoke',
      f'--workdir={workdir}',
      *arguments,
    ),
    cwd=ROOT,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def finish(workdir: pathlib.Path, *arguments: str) -> str:
  process = start(workdir, *arguments)
  output, _ = process.communicate(timeout=1500)
  assert process.returncode == 0, output
  return output


def outcome(workdir: pathlib.Path) -> tuple:
  """What must not depend on how often a chain was interrupted."""
  names = [path.name for path in sorted((workdir / 'models').iterdir())]
  found = distillation.collect(workdir)
  found.pop('steps')
  data = {
    path.parent.name: path.read_text()
    for path in sorted((workdir / 'samples').glob('*/conversations.jsonl'))
  }
  marks = {n: models.fingerprint_of(workdir / 'models' / n) for n in names}
  return marks, found, data


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_distillation_smoke_killed_at_random_gives_the_same_results(tmp_path):
  output = finish(tmp_path / 'whole')
  assert 'agentic_search: no specialist' in output
  assert (tmp_path / 'whole' / 'report.md').exists()
  again = finish(tmp_path / 'whole')
  assert 'student: done already, skipped' in again
  rng = random.Random(0)
  for _ in range(6):
    process = start(tmp_path / 'killed', '--workers=2')
    time.sleep(rng.uniform(15, 60))
    process.send_signal(signal.SIGKILL)
    process.communicate()
  finish(tmp_path / 'killed', '--workers=2')
  assert outcome(tmp_path / 'killed') == outcome(tmp_path / 'whole')
