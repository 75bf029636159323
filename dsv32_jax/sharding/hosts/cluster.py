"""Which processes belong to a run: from flags, or from what started them.

jax itself detects SLURM, Open MPI and Kubernetes once it is told to start; here
it is decided whether there is anything to start, flags that cannot be right are
refused, and what jax does not detect is filled in.
"""

import importlib.util
import re
import zlib
from collections.abc import Mapping

from dsv32_jax.sharding.hosts.job import HostOptions, Job, is_address, require

_SLURM = (
  'SLURM_JOB_ID',
  'SLURM_STEP_NODELIST',
  'SLURM_NTASKS',
  'SLURM_PROCID',
  'SLURM_LOCALID',
)
_OPEN_MPI = (
  'OMPI_COMM_WORLD_SIZE',
  'OMPI_COMM_WORLD_RANK',
  'OMPI_COMM_WORLD_LOCAL_RANK',
)
_OPEN_MPI_4_URI = 'OMPI_MCA_orte_hnp_uri'
_KUBERNETES = 'JOB_COMPLETION_INDEX'
_ADDRESS = 'JAX_COORDINATOR_ADDRESS'


def find_job(
  options: HostOptions, environment: Mapping[str, str]
) -> Job | None:
  """Finds the processes that belong together.

  Args:
    options: from the flags. Address, number and index together win over the
      environment; fewer of them must agree with it.
    environment: variables of the process.

  Returns:
    None if this process is alone.

  Raises:
    ValueError: if something is missing or contradicts itself.
  """
  if options.distributed == 'off':
    return None
  given = {
    name: getattr(options, name)
    for name in ('coordinator_address', 'num_processes', 'process_id')
  }
  if None not in given.values():
    job = Job(
      found_in='flags',
      **given,
      local_device_ids=options.local_device_ids or (),
      detection='deactivate',
    )
  elif all(name in environment for name in _OPEN_MPI):
    job = _open_mpi(options, environment)
  elif all(name in environment for name in _SLURM):
    job = _slurm(options, environment)
  elif _KUBERNETES in environment and (
    options.coordinator_address or _ADDRESS in environment
  ):
    job = _kubernetes(options, environment)
  elif options.distributed == 'on':
    # A Cloud TPU pod, MPI through mpi4py, Kubernetes with its Python client.
    job = Job(
      found_in='jax', **given, local_device_ids=options.local_device_ids
    )
  else:
    missing = [name for name, value in given.items() if value is None]
    require(
      len(missing) == len(given),
      f'{missing[0]}: not given, expected --{" and --".join(missing)} beside '
      'the other flags of the processes (neither SLURM, Open MPI nor a '
      'Kubernetes Job tells them)',
    )
    return None
  return None if job.num_processes == 1 else job


def _open_mpi(options: HostOptions, environment: Mapping[str, str]) -> Job:
  size, rank, local_rank = (int(environment[name]) for name in _OPEN_MPI)
  size, rank = _checked('Open MPI', options, size, rank)
  local_size = int(environment.get('OMPI_COMM_WORLD_LOCAL_SIZE', '0')) or None
  address = options.coordinator_address or environment.get(_ADDRESS)
  ids = options.local_device_ids
  if ids is None:
    ids = local_devices(environment, tasks=local_size, local_id=local_rank)
  known = {
    'found_in': 'Open MPI',
    'num_processes': size,
    'process_id': rank,
    'local_device_ids': ids,
  }
  if address is None and _OPEN_MPI_4_URI in environment:
    return Job(**known)
  if address is None and size > 1:
    # From version 5 on Open MPI does not say where its first process runs.
    if local_size == size:
      # All on one host; two jobs there need two ports.
      name = environment.get('PMIX_NAMESPACE', '').encode()
      address = f'127.0.0.1:{61440 + zlib.crc32(name) % 4096}'
    elif importlib.util.find_spec('mpi4py') is not None:
      return Job(**known, detection='mpi4py')
    else:
      raise ValueError(
        'coordinator_address: not given and not told by Open MPI 5, expected '
        '--coordinator_address=HOST:PORT of the host of rank 0 (or mpi4py '
        'installed)'
      )
  ids = (local_rank,) if ids is None else ids
  return Job(
    **{**known, 'local_device_ids': ids},
    coordinator_address=address,
    detection='deactivate',
  )


def _slurm(options: HostOptions, environment: Mapping[str, str]) -> Job:
  size, rank = _checked(
    'SLURM',
    options,
    int(environment['SLURM_NTASKS']),
    int(environment['SLURM_PROCID']),
  )
  ids = options.local_device_ids
  if ids is None:
    ids = local_devices(
      environment,
      tasks=_slurm_tasks_here(environment),
      local_id=int(environment['SLURM_LOCALID']),
    )
  return Job(
    found_in='SLURM',
    coordinator_address=options.coordinator_address,
    num_processes=size,
    process_id=rank,
    local_device_ids=ids,
  )


def _kubernetes(options: HostOptions, environment: Mapping[str, str]) -> Job:
  address = options.coordinator_address or environment[_ADDRESS]
  require(
    is_address(address),
    f'{_ADDRESS}: got {address!r}, expected HOST:PORT',
  )
  require(
    options.num_processes is not None,
    'num_processes: not given, expected --num_processes, the completions of '
    'the Kubernetes Job',
  )
  index = int(environment[_KUBERNETES])
  count, index = _checked(
    'the Kubernetes Job', options, options.num_processes or 0, index
  )
  return Job(
    found_in='Kubernetes',
    coordinator_address=address,
    num_processes=count,
    process_id=index,
    local_device_ids=options.local_device_ids or (),
    detection='deactivate',
  )


def _checked(
  where: str, options: HostOptions, size: int, rank: int
) -> tuple[int, int]:
  """Size and rank of the environment, which flags may not contradict."""
  for name, told in (('num_processes', size), ('process_id', rank)):
    value = getattr(options, name)
    require(
      value is None or value == told,
      f'{name}: got {value}, expected {told} as {where} says (or all of '
      '--coordinator_address, --num_processes and --process_id)',
    )
  require(
    rank < size,
    f'num_processes: got {size}, expected more than process_id {rank}, which '
    f'{where} says',
  )
  return size, rank


def local_devices(
  environment: Mapping[str, str], *, tasks: int | None, local_id: int
) -> tuple[int, ...] | None:
  """The GPUs of this host that a process takes, as places among the visible.

  jax gives every process of a scheduler's job the one GPU whose number is the
  process's on its host. That is wrong with fewer processes than GPUs, and where
  the scheduler lets each process see its own GPUs only.

  Args:
    environment: variables of the process.
    tasks: processes on this host, if known.
    local_id: this one's number among them.

  Returns:
    Places; () takes all that are visible, None leaves it to jax.

  Raises:
    ValueError: if the GPUs cannot be shared evenly.
  """
  if tasks is None:
    return None
  if tasks == 1:
    return ()
  listed = environment.get('CUDA_VISIBLE_DEVICES')
  if listed is None:
    return None
  visible = len([name for name in listed.split(',') if name.strip()])
  # SLURM counts what the job has on this host, whichever the process may see.
  total = int(environment.get('SLURM_GPUS_ON_NODE') or visible)
  if visible < max(total, tasks):
    return ()
  require(
    visible % tasks == 0,
    f'local_device_ids: {visible} GPUs and {tasks} processes on this host, '
    'expected a number of processes that divides the GPUs, or '
    '--local_device_ids',
  )
  share = visible // tasks
  return tuple(range(local_id * share, (local_id + 1) * share))


def _slurm_tasks_here(environment: Mapping[str, str]) -> int | None:
  """Processes of the job step on this host: item SLURM_NODEID of '8(x2),4'."""
  text = environment.get('SLURM_STEP_TASKS_PER_NODE')
  if text is None:
    return None
  counts: list[int] = []
  for item in text.split(','):
    match = re.fullmatch(r'(\d+)(?:\(x(\d+)\))?', item.strip())
    if match is None:
      return None
    counts += [int(match[1])] * int(match[2] or 1)
  place = int(environment.get('SLURM_NODEID', '0'))
  return counts[place] if place < len(counts) else None
