r"""Starts a training run on this machine, on SLURM or on Kubernetes.

What follows `--` are the arguments of experiments/continued_training.py. With
--dry_run it prints what would start and starts nothing:

    python experiments/launch/launch.py --on=local --processes_per_node=2 \
      --devices_per_node=8 --dry_run -- --workdir=runs/two \
      --config=experiments/configs/continued_training.py:smoke
"""

import os
import pathlib
import subprocess
import sys

from absl import app, flags

from dsv32_jax.sharding.hosts import launching
from dsv32_jax.sharding.hosts.local_processes import LocalProcesses

_HERE = pathlib.Path('experiments/launch')
_ON = flags.DEFINE_enum(
  'on', 'local', ['local', 'slurm', 'kubernetes'], 'Where it runs.'
)
_NODES = flags.DEFINE_integer('nodes', 1, 'Hosts.')
_PROCESSES = flags.DEFINE_integer('processes_per_node', 1, 'On each host.')
_DEVICES = flags.DEFINE_integer('devices_per_node', 1, 'On each host.')
_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Print and start nothing.')
_PLATFORM = flags.DEFINE_enum(
  'platform', 'cpu', ['cpu', 'gpu'], 'Of a local run; cpu: virtual devices.'
)
_PORT = flags.DEFINE_integer('port', 0, 'Of a local run; 0 takes a free one.')
_GRACE_S = flags.DEFINE_float(
  'grace_s', 45.0, 'Time for the other processes of a local run to notice.'
)
_NAME = flags.DEFINE_string('name', 'dsv32', 'Of the JobSet.')
_IMAGE = flags.DEFINE_string('image', 'dsv32', 'Container with this checkout.')
_CLAIM = flags.DEFINE_string('claim', 'shared', 'PersistentVolumeClaim.')


def main(argv: list[str]) -> None:
  arguments = argv[1:]
  try:
    shape = launching.Shape(
      nodes=_NODES.value,
      processes_per_node=_PROCESSES.value,
      devices_per_node=_DEVICES.value,
    )
    print('\n'.join(shape.describe()), flush=True)
    start = {'local': locally, 'slurm': on_slurm, 'kubernetes': on_kubernetes}
    sys.exit(start[_ON.value](arguments, shape))
  except ValueError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(1)


def locally(arguments: list[str], shape: launching.Shape) -> int:
  commands = launching.local_commands(
    arguments,
    shape,
    platform=_PLATFORM.value,
    port=_PORT.value or launching.free_port(),
  )
  if _DRY_RUN.value:
    print('\n'.join(map(launching.shell_line, commands)))
    return 0
  with LocalProcesses(commands) as processes:
    return processes.wait(grace_s=_GRACE_S.value)


def on_slurm(arguments: list[str], shape: launching.Shape) -> int:
  command = launching.slurm_command(arguments, shape, script=_HERE / 'slurm.sh')
  print(launching.shell_line(command), flush=True)
  if not _DRY_RUN.value:
    return subprocess.run(command.argv, check=False).returncode
  print('which runs, on its first node:', flush=True)
  preview = launching.slurm_preview(arguments, script=_HERE / 'slurm.sh')
  environment = {**os.environ, **preview.environment}
  return subprocess.run(preview.argv, env=environment, check=False).returncode


def on_kubernetes(arguments: list[str], shape: launching.Shape) -> int:
  manifest = launching.kubernetes_manifest(
    arguments,
    shape,
    template=_HERE / 'kubernetes_jobset.yaml',
    values={
      'NAME': _NAME.value,
      'IMAGE': _IMAGE.value,
      'CLAIM': _CLAIM.value,
    },
  )
  command = ('kubectl', 'apply', '--filename=-')
  print(f"{' '.join(command)} <<'END'\n{manifest}END", flush=True)
  if _DRY_RUN.value:
    return 0
  done = subprocess.run(command, input=manifest, text=True, check=False)
  return done.returncode


if __name__ == '__main__':
  app.run(main)
