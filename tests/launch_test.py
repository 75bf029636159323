"""experiments/launch: what would start, and the files that it starts from."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import yaml

from dsv32_jax.sharding.hosts import launching

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAUNCH = ROOT / 'experiments' / 'launch'
CONFIG = '--config=experiments/configs/continued_training.py:smoke'


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    (sys.executable, 'experiments/launch/launch.py', *arguments),
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT), **environment},
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    ({'nodes': 0}, 'nodes: got 0, expected at least 1'),
    (
      {'processes_per_node': 3, 'devices_per_node': 8},
      'processes_per_node: got 3, expected a divisor of devices_per_node 8',
    ),
  ],
)
def test_shape_impossible_sizes_are_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    launching.Shape(**sizes)


def test_shape_describes_every_process():
  shape = launching.Shape(nodes=2, processes_per_node=2, devices_per_node=8)
  assert shape.describe() == [
    '2 nodes x 2 processes x 4 devices = 4 processes, 16 devices',
    'process 0: node 0, devices 0-3',
    'process 1: node 0, devices 4-7',
    'process 2: node 1, devices 0-3',
    'process 3: node 1, devices 4-7',
  ]


@pytest.mark.parametrize('platform', ['cpu', 'gpu'])
def test_local_commands_share_out_the_devices(platform):
  shape = launching.Shape(processes_per_node=2, devices_per_node=4)
  one, two = launching.local_commands(
    ['--workdir=w'], shape, platform=platform, port=1234
  )
  assert one.argv[1:3] == ('experiments/continued_training.py', '--workdir=w')
  assert '--coordinator_address=127.0.0.1:1234' in two.argv
  assert '--num_processes=2' in two.argv
  assert '--process_id=1' in two.argv
  if platform == 'gpu':
    assert two.argv[-1] == '--local_device_ids=2,3'
    assert two.environment == {}
  else:
    assert two.environment == {
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
    }


def test_local_commands_of_several_nodes_are_refused():
  with pytest.raises(ValueError, match='nodes: got 2, expected 1 on this'):
    launching.local_commands(
      [], launching.Shape(nodes=2), platform='cpu', port=1
    )


def manifest(nodes: int = 3, arguments: tuple[str, ...] = ()) -> dict:
  text = launching.kubernetes_manifest(
    arguments,
    launching.Shape(nodes=nodes, devices_per_node=8),
    template=LAUNCH / 'kubernetes_jobset.yaml',
    values={'NAME': 'run', 'IMAGE': 'registry/image:1', 'CLAIM': 'disk'},
  )
  return yaml.safe_load(text)


def test_kubernetes_manifest_starts_one_process_a_node():
  arguments = ('--workdir=/shared/a "b"', '--config.mesh.fsdp=24')
  found = manifest(arguments=arguments)
  assert (found['apiVersion'], found['kind']) == (
    'jobset.x-k8s.io/v1alpha2',
    'JobSet',
  )
  [replicated] = found['spec']['replicatedJobs']
  job = replicated['template']['spec']
  assert job['completionMode'] == 'Indexed'
  assert job['completions'] == job['parallelism'] == 3
  pod = job['template']['spec']
  [container] = pod['containers']
  assert container['command'][-1] == '--num_processes=3'
  assert container['args'] == list(arguments)
  assert container['resources']['limits'] == {'nvidia.com/gpu': 8}
  environment = {entry['name']: entry['value'] for entry in container['env']}
  # <JobSet>-<replicated job>-<job>-<pod>.<JobSet>
  host = f'{found["metadata"]["name"]}-{replicated["name"]}-0-0.run'
  assert environment['JAX_COORDINATOR_ADDRESS'] == f'{host}:55527'
  volumes = {volume['name']: volume for volume in pod['volumes']}
  assert {mount['name'] for mount in container['volumeMounts']} == set(volumes)
  assert volumes['shared']['persistentVolumeClaim'] == {'claimName': 'disk'}


def test_kubernetes_manifest_several_processes_a_pod_are_refused():
  with pytest.raises(ValueError, match='processes_per_node: got 2, expected 1'):
    launching.kubernetes_manifest(
      [],
      launching.Shape(processes_per_node=2, devices_per_node=2),
      template=LAUNCH / 'kubernetes_jobset.yaml',
      values={},
    )


def test_kubernetes_manifest_missing_value_is_named():
  with pytest.raises(ValueError, match='NAME: not given, expected a value'):
    launching.kubernetes_manifest(
      [],
      launching.Shape(),
      template=LAUNCH / 'kubernetes_jobset.yaml',
      values={'IMAGE': 'i', 'CLAIM': 'c'},
    )


def test_slurm_script_is_sound():
  script = LAUNCH / 'slurm.sh'
  subprocess.run(('bash', '-n', script), check=True)
  lines = script.read_text().splitlines()
  assert lines[0] == '#!/bin/bash'
  options = [line for line in lines if line.startswith('#SBATCH')]
  assert '#SBATCH --signal=TERM@120' in options
  assert '#SBATCH --requeue' in options
  # sbatch reads options up to the first command.
  first = next(n for n, line in enumerate(lines) if not line.startswith('#'))
  assert all(lines.index(line) < first for line in options)


def test_slurm_script_runs_the_arguments_and_says_how_it_ended(tmp_path):
  srun = tmp_path / 'srun'
  srun.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\nexit 137\n')
  srun.chmod(0o755)
  done = subprocess.run(
    ('bash', LAUNCH / 'slurm.sh', '--workdir=a b', CONFIG),
    env={
      'PATH': f'{tmp_path}:{os.environ["PATH"]}',
      'PYTHON': 'python3.12',
      'SLURM_SUBMIT_DIR': str(ROOT),
    },
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 137
  said = done.stdout.splitlines()
  assert said[said.index('python3.12') :] == [
    'python3.12',
    'experiments/continued_training.py',
    '--workdir=a b',
    CONFIG,
  ]
  assert '--wait=45' in said
  assert 'submit the same command again' in done.stderr


def test_dry_run_local_prints_the_commands_and_starts_nothing(tmp_path):
  workdir = tmp_path / 'run'
  done = launch(
    '--on=local',
    '--processes_per_node=2',
    '--devices_per_node=8',
    '--port=4321',
    '--dry_run',
    '--',
    f'--workdir={workdir}',
    CONFIG,
  )
  assert done.returncode == 0, done.stderr
  shape, *where, first, second = done.stdout.splitlines()
  assert shape == '1 nodes x 2 processes x 4 devices = 2 processes, 8 devices'
  assert where == [
    'process 0: node 0, devices 0-3',
    'process 1: node 0, devices 4-7',
  ]
  variables = (
    'JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4'
  )
  for index, line in enumerate((first, second)):
    assert line == (
      f'{variables} {sys.executable} experiments/continued_training.py '
      f'--workdir={workdir} {CONFIG} --coordinator_address=127.0.0.1:4321 '
      f'--num_processes=2 --process_id={index}'
    )
  assert not workdir.exists()


def test_dry_run_slurm_prints_the_submission_and_what_it_runs():
  done = launch(
    '--on=slurm',
    '--nodes=2',
    '--devices_per_node=8',
    '--dry_run',
    '--',
    '--workdir=/shared/run',
    PYTHON='python3',
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-3:] == [
    'sbatch --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 '
    'experiments/launch/slurm.sh --workdir=/shared/run',
    'which runs, on its first node:',
    'srun --kill-on-bad-exit=0 --wait=45 --label python3 '
    'experiments/continued_training.py --workdir=/shared/run ',
  ]


def test_dry_run_kubernetes_prints_the_manifest():
  done = launch('--on=kubernetes', '--nodes=2', '--dry_run', '--', '--a=b')
  assert done.returncode == 0, done.stderr
  _, _, text = done.stdout.partition("kubectl apply --filename=- <<'END'\n")
  found = yaml.safe_load(text.removesuffix('END\n'))
  assert found['metadata']['name'] == 'dsv32'
  assert json.dumps(found).count('--a=b') == 1


def test_launch_impossible_shape_is_one_line_and_exit_1():
  done = launch('--processes_per_node=3', '--devices_per_node=2', '--dry_run')
  assert done.returncode == 1
  assert done.stderr.startswith('error: processes_per_node: got 3, expected')
  assert len(done.stderr.splitlines()) == 1
