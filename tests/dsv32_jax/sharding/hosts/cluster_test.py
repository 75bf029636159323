"""Environments as the schedulers set them, and what becomes of them."""

import pytest

from dsv32_jax.sharding.hosts import cluster
from dsv32_jax.sharding.hosts.job import HostOptions

_SLURM = {
  'SLURM_JOB_ID': '4242',
  'SLURM_STEP_NODELIST': 'node[01-02]',
  'SLURM_NTASKS': '2',
  'SLURM_PROCID': '1',
  'SLURM_LOCALID': '0',
  'SLURM_NODEID': '1',
  'SLURM_STEP_TASKS_PER_NODE': '1(x2)',
}
_OPEN_MPI = {
  'OMPI_COMM_WORLD_SIZE': '4',
  'OMPI_COMM_WORLD_RANK': '3',
  'OMPI_COMM_WORLD_LOCAL_RANK': '1',
  'OMPI_COMM_WORLD_LOCAL_SIZE': '2',
}
_KUBERNETES = {
  'JOB_COMPLETION_INDEX': '1',
  'JAX_COORDINATOR_ADDRESS': 'run-train-0-0.run:55527',
}


def find(environment, **options):
  return cluster.find_job(HostOptions(**options), environment)


@pytest.mark.parametrize(
  'environment',
  [
    {},
    # A batch script or an interactive allocation: not a task of a step.
    {'SLURM_JOB_ID': '1', 'SLURM_NTASKS': '8', 'SLURM_PROCID': '0'},
    # Pods of a sweep have indices too.
    {'JOB_COMPLETION_INDEX': '1'},
    {**_SLURM, 'SLURM_NTASKS': '1', 'SLURM_PROCID': '0'},
  ],
)
def test_find_job_one_process_starts_nothing(environment):
  assert find(environment) is None


def test_find_job_one_process_by_flags_starts_nothing():
  flags = {'coordinator_address': 'a:1', 'num_processes': 1, 'process_id': 0}
  assert find({}, **flags) is None


def test_find_job_off_ignores_the_environment():
  assert find(_SLURM, distributed='off') is None


def test_find_job_on_leaves_unknown_clusters_to_jax():
  job = find({}, distributed='on')
  assert job is not None
  assert job.found_in == 'jax'
  assert job.num_processes is None
  assert job.detection is None


def test_find_job_flags_win_over_the_environment():
  job = find(_SLURM, coordinator_address='a:1', num_processes=8, process_id=5)
  assert (job.found_in, job.num_processes, job.process_id) == ('flags', 8, 5)
  assert job.local_device_ids == ()
  assert job.detection == 'deactivate'


def test_find_job_flags_that_lack_something_are_refused():
  message = r'process_id: not given, expected --process_id beside'
  with pytest.raises(ValueError, match=message):
    find({}, coordinator_address='a:1', num_processes=2)


def test_find_job_slurm_leaves_the_address_to_jax():
  job = find(_SLURM)
  assert (job.num_processes, job.process_id) == (2, 1)
  assert job.coordinator_address is None
  assert job.detection is None
  # One process a node: it takes every GPU, not the first alone.
  assert job.local_device_ids == ()


def test_find_job_slurm_contradicted_by_a_flag_is_refused():
  message = 'num_processes: got 3, expected 2 as SLURM says'
  with pytest.raises(ValueError, match=message):
    find(_SLURM, num_processes=3)


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    # A process a GPU.
    ({'CUDA_VISIBLE_DEVICES': '0,1,2,3', 'local': 3, 'tasks': '4'}, (3,)),
    ({'CUDA_VISIBLE_DEVICES': '0,1,2,3', 'local': 1, 'tasks': '2'}, (2, 3)),
    # SLURM shows each process its own (--gpus-per-task).
    ({'CUDA_VISIBLE_DEVICES': '2', 'local': 1, 'tasks': '4'}, ()),
    (
      {
        'CUDA_VISIBLE_DEVICES': '0,1',
        'SLURM_GPUS_ON_NODE': '4',
        'local': 1,
        'tasks': '2',
      },
      (),
    ),
    # Nothing is known of GPUs: jax gives each process one.
    ({'local': 1, 'tasks': '4'}, None),
    ({'local': 1, 'tasks': 'odd'}, None),
  ],
)
def test_find_job_slurm_shares_the_gpus_of_a_node(changes, expected):
  local, tasks = changes.pop('local'), changes.pop('tasks')
  environment = {
    **_SLURM,
    'SLURM_NTASKS': '8',
    'SLURM_PROCID': str(4 + local),
    'SLURM_LOCALID': str(local),
    'SLURM_STEP_TASKS_PER_NODE': f'4,{tasks}',
    **changes,
  }
  assert find(environment).local_device_ids == expected


def test_find_job_slurm_gpus_that_cannot_be_shared_are_refused():
  environment = {
    **_SLURM,
    'SLURM_STEP_TASKS_PER_NODE': '3(x2)',
    'SLURM_NTASKS': '6',
    'CUDA_VISIBLE_DEVICES': '0,1,2,3',
  }
  message = 'local_device_ids: 4 GPUs and 3 processes on this host'
  with pytest.raises(ValueError, match=message):
    find(environment)
  assert find(environment, local_device_ids=(1,)).local_device_ids == (1,)


def test_find_job_open_mpi_4_leaves_the_address_to_jax():
  job = find({**_OPEN_MPI, 'OMPI_MCA_orte_hnp_uri': '1.0;tcp://10.0.0.1:1'})
  assert (job.num_processes, job.process_id) == (4, 3)
  assert job.coordinator_address is None
  assert job.detection is None


def test_find_job_open_mpi_5_takes_the_address_from_the_flag():
  job = find(_OPEN_MPI, coordinator_address='node1:5000')
  assert (job.coordinator_address, job.process_id) == ('node1:5000', 3)
  assert job.local_device_ids == (1,)
  assert job.detection == 'deactivate'


def test_find_job_open_mpi_5_without_an_address_is_refused(monkeypatch):
  monkeypatch.setattr(cluster.importlib.util, 'find_spec', lambda name: None)
  message = 'coordinator_address: not given and not told by Open MPI 5'
  with pytest.raises(ValueError, match=message):
    find(_OPEN_MPI)


def test_find_job_open_mpi_5_on_one_host_needs_no_address():
  environment = {**_OPEN_MPI, 'OMPI_COMM_WORLD_LOCAL_SIZE': '4'}
  first = find({**environment, 'PMIX_NAMESPACE': 'prterun-host-11@1'})
  again = find({**environment, 'PMIX_NAMESPACE': 'prterun-host-11@1'})
  other = find({**environment, 'PMIX_NAMESPACE': 'prterun-host-12@1'})
  assert first.coordinator_address.startswith('127.0.0.1:')
  assert first.coordinator_address == again.coordinator_address
  assert first.coordinator_address != other.coordinator_address


def test_find_job_kubernetes_takes_index_and_address():
  job = find(_KUBERNETES, num_processes=4)
  assert (job.num_processes, job.process_id) == (4, 1)
  assert job.coordinator_address == 'run-train-0-0.run:55527'
  assert job.local_device_ids == ()


@pytest.mark.parametrize(
  ('environment', 'options', 'message'),
  [
    (_KUBERNETES, {}, 'num_processes: not given, expected --num_processes'),
    (
      _KUBERNETES,
      {'num_processes': 4, 'process_id': 2},
      'process_id: got 2, expected 1 as the Kubernetes Job says',
    ),
    (
      {**_KUBERNETES, 'JOB_COMPLETION_INDEX': '7'},
      {'num_processes': 4},
      'num_processes: got 4, expected more than process_id 7',
    ),
    (
      {**_KUBERNETES, 'JAX_COORDINATOR_ADDRESS': 'run'},
      {'num_processes': 4},
      "JAX_COORDINATOR_ADDRESS: got 'run', expected HOST:PORT",
    ),
  ],
)
def test_find_job_kubernetes_that_cannot_be_is_refused(
  environment, options, message
):
  with pytest.raises(ValueError, match=message):
    find(environment, **options)
