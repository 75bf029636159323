"""Runs the scripts as a reader would."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from dsv32_jax.config.training import RunConfig
from dsv32_jax.training import flags as run_flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG = 'experiments/configs/continued_training.py'


def script(name: str, *arguments: str) -> subprocess.CompletedProcess:
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  environment.pop('XLA_FLAGS', None)
  return subprocess.run(
    (sys.executable, f'experiments/{name}.py', *arguments),
    cwd=ROOT,
    env={**environment, 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )


def get_config(preset: str):
  names: dict = {}
  exec((ROOT / CONFIG).read_text(), names)
  return names['get_config'](preset)


@pytest.mark.parametrize('preset', ['smoke', 'quick', 'cpu', 'mini'])
def test_continued_training_preset_resolves(preset):
  config = run_flags.resolve(get_config(preset))
  assert isinstance(config, RunConfig)
  kinds = {config.stages[name].kind for name in config.order}
  assert {'pretrain', 'dense_warmup', 'sparse_training'} <= kinds


def test_continued_training_unknown_preset_is_refused():
  with pytest.raises(ValueError, match=r"got 'huge', expected one of"):
    get_config('huge')


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (('model', 'index_topk', 0), 'index_topk: got 0'),
    (('model', 'qk_rope_head_dim', 7), 'qk_rope_head_dim: got 7'),
    (('model', 'n_group', 3), 'n_group: got 3'),
    (('model', 'topk_group', 9), 'topk_group: got 9'),
    (('model', 'num_experts_per_tok', 99), 'num_experts_per_tok: got 99'),
    (('model', 'first_k_dense_replace', 9), 'first_k_dense_replace: got 9'),
    (('model', 'index_head_dim', 4), 'index_head_dim: got 4'),
    (('model', 'vocab_size', 0), 'vocab_size: got 0'),
    (('model', 'q_lora_rank', None), 'q_lora_rank: got None'),
    (('stages', 'pretrain', 'steps', 0), 'stages.pretrain: steps: got 0'),
    (('stages', 'pretrain', 'micro_batches', 3), 'micro_batches: got 3'),
    (('stages', 'dense_warmup', 'init_from', None), 'init_from: got None'),
    (('stages', 'dense_warmup', 'init_from', 'sparse_training'), 'init_from'),
    (('order', ('pretrain', 'nothing')), "order: got 'nothing'"),
    (('model', 'index_topk', 128), 'index_topk: got 128'),
  ],
)
def test_continued_training_impossible_config_is_refused(change, message):
  config = run_flags.resolve(get_config('smoke'))
  values = run_flags.to_config_dict(config).to_dict()
  *path, field, value = change
  node = values
  for name in path:
    node = node[name]
  node[field] = value
  with pytest.raises(ValueError, match='expected') as error:
    run_flags.resolve(values)
  assert message in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (('--config.model.no_such_field=1',), 'no_such_field'),
    (('--config.stages.pretrain.steps=soon',), 'soon'),
    (('--config.model.qk_rope_head_dim=7',), 'qk_rope_head_dim: got 7'),
  ],
)
def test_continued_training_bad_flag_is_one_line_and_exit_1(
  arguments, message, tmp_path
):
  done = script(
    'continued_training',
    f'--config={CONFIG}:smoke',
    f'--workdir={tmp_path / "run"}',
    *arguments,
  )
  assert done.returncode == 1
  lines = done.stderr.strip().splitlines()
  assert len(lines) == 1, done.stderr
  assert lines[0].startswith('error: ')
  assert message in lines[0]
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_continued_training_smoke_runs_resumes_evaluates_and_generates(
  tmp_path,
):
  workdir = tmp_path / 'run'
  run = ('continued_training', f'--config={CONFIG}:smoke')
  first = script(*run, f'--workdir={workdir}', '--stage=pretrain')
  assert first.returncode == 0, first.stderr
  assert not (workdir / 'report.md').exists()
  rest = script(*run, f'--workdir={workdir}')
  assert rest.returncode == 0, rest.stderr
  assert 'pretrain: done already, skipped' in rest.stdout
  assert (workdir / 'report.html').stat().st_size > 50_000
  again = script('evaluate', f'--workdir={workdir}', '--rows=4')
  assert again.returncode == 0, again.stderr
  results = json.loads((workdir / 'report' / 'results.json').read_text())
  assert set(results['loss']['by_length']) == {'128'}
  text = script(
    'generate',
    f'--checkpoint={workdir / "stages" / "sparse_training"}',
    '--prompt=import os',
    '--max_new_tokens=4',
  )
  assert text.returncode == 0, text.stderr
