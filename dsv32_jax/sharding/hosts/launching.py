"""What starts where: the processes of a run on one machine or on a cluster.

`experiments/launch/launch.py` prints or starts what is made here.
"""

import dataclasses
import json
import pathlib
import shlex
import socket
import string
import sys
from collections.abc import Mapping, Sequence

from dsv32_jax.sharding.hosts.local_processes import Command

_SCRIPT = 'experiments/continued_training.py'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """The processes and devices of a job.

  Attributes:
    nodes: hosts.
    processes_per_node: on each host; the devices of a host are shared evenly.
    devices_per_node: on each host.
  """

  nodes: int = 1
  processes_per_node: int = 1
  devices_per_node: int = 1

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if value < 1:
        raise ValueError(f'{field.name}: got {value}, expected at least 1')
    if self.devices_per_node % self.processes_per_node:
      raise ValueError(
        f'processes_per_node: got {self.processes_per_node}, expected a '
        f'divisor of devices_per_node {self.devices_per_node}'
      )

  @property
  def num_processes(self) -> int:
    """Of the whole job."""
    return self.nodes * self.processes_per_node

  @property
  def devices_per_process(self) -> int:
    """Devices of each process."""
    return self.devices_per_node // self.processes_per_node

  def describe(self) -> list[str]:
    """Lines: totals, and the devices of each process."""
    total = self.nodes * self.devices_per_node
    lines = [
      f'{self.nodes} nodes x {self.processes_per_node} processes x '
      f'{self.devices_per_process} devices = {self.num_processes} processes, '
      f'{total} devices'
    ]
    for index in range(self.num_processes):
      node, place = divmod(index, self.processes_per_node)
      first = place * self.devices_per_process
      last = first + self.devices_per_process - 1
      devices = f'{first}' if first == last else f'{first}-{last}'
      lines.append(f'process {index}: node {node}, devices {devices}')
    return lines


def local_commands(
  arguments: Sequence[str], shape: Shape, *, platform: str, port: int
) -> list[Command]:
  """Processes of this machine, that find each other through flags.

  Args:
    arguments: of experiments/continued_training.py.
    shape: of one node.
    platform: 'cpu' makes the devices virtual, 'gpu' shares out the machine's.
    port: free, for the coordination service.

  Raises:
    ValueError: for more than one node.
  """
  if shape.nodes != 1:
    raise ValueError(f'nodes: got {shape.nodes}, expected 1 on this machine')
  share = shape.devices_per_process
  environment = {'JAX_PLATFORMS': 'cpu'} if platform == 'cpu' else {}
  if platform == 'cpu':
    environment['XLA_FLAGS'] = f'--xla_force_host_platform_device_count={share}'
  commands = []
  for index in range(shape.num_processes):
    flags = [
      f'--coordinator_address=127.0.0.1:{port}',
      f'--num_processes={shape.num_processes}',
      f'--process_id={index}',
    ]
    if platform == 'gpu':
      ids = range(index * share, (index + 1) * share)
      flags.append(f'--local_device_ids={",".join(map(str, ids))}')
    commands.append(
      Command(
        argv=(sys.executable, _SCRIPT, *arguments, *flags),
        environment=environment,
      )
    )
  return commands


def slurm_command(
  arguments: Sequence[str], shape: Shape, *, script: pathlib.Path
) -> Command:
  """The submission of `experiments/launch/slurm.sh`.

  More options of sbatch (partition, account, time) are read by it from its own
  variables, SBATCH_PARTITION and so on.
  """
  return Command(
    argv=(
      'sbatch',
      f'--nodes={shape.nodes}',
      f'--ntasks-per-node={shape.processes_per_node}',
      f'--gpus-per-node={shape.devices_per_node}',
      str(script),
      *arguments,
    )
  )


def kubernetes_manifest(
  arguments: Sequence[str],
  shape: Shape,
  *,
  template: pathlib.Path,
  values: Mapping[str, str],
) -> str:
  """Fills `experiments/launch/kubernetes_jobset.yaml`.

  Args:
    arguments: of experiments/continued_training.py.
    shape: one process a node: a pod is a process.
    template: the file.
    values: NAME, IMAGE and CLAIM of the template.

  Raises:
    ValueError: for several processes a node, or a value that is missing.
  """
  if shape.processes_per_node != 1:
    raise ValueError(
      f'processes_per_node: got {shape.processes_per_node}, expected 1 (a pod '
      'is one process and has all devices of its node)'
    )
  filled = {
    'NODES': str(shape.nodes),
    'GPUS': str(shape.devices_per_node),
    # JSON's strings are YAML's.
    'ARGUMENTS': ', '.join(map(json.dumps, arguments)),
    **values,
  }
  text = template.read_text(encoding='utf-8')
  try:
    return string.Template(text).substitute(filled)
  except KeyError as error:
    raise ValueError(f'{error.args[0]}: not given, expected a value') from None


def shell_line(command: Command) -> str:
  """The command as one types it, its variables in front."""
  variables = [f'{k}={shlex.quote(v)}' for k, v in command.environment.items()]
  return ' '.join([*variables, shlex.join(command.argv)])


def slurm_preview(arguments: Sequence[str], *, script: pathlib.Path) -> Command:
  """A command that prints what the batch job would run."""
  return Command(
    argv=('bash', str(script), *arguments),
    environment={'DRY_RUN': '1', 'SLURM_SUBMIT_DIR': '.'},
  )


def free_port() -> int:
  """A port of this machine that nothing listens on now."""
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    return found.getsockname()[1]
