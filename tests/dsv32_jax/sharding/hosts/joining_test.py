"""Real processes that find each other, fail and stop; without a model."""

import inspect
import os
import pathlib
import re
import signal
import sys
import threading
import time
from collections.abc import Callable

import jax
import pytest

from dsv32_jax.sharding.hosts import agreement, joining, launching
from dsv32_jax.sharding.hosts.job import HostOptions, Job
from dsv32_jax.sharding.hosts.local_processes import Command, LocalProcesses

ROOT = pathlib.Path(__file__).parents[4]
_SOON = ('--heartbeat_timeout_s=8',)
_REAL_INITIALIZE = jax.distributed.initialize


def test_start_gives_jax_what_it_takes(monkeypatch):
  given = {}
  monkeypatch.setattr(
    jax.distributed, 'initialize', lambda **k: given.update(k)
  )
  job = Job(
    found_in='flags',
    coordinator_address='127.0.0.1:1',
    num_processes=2,
    process_id=1,
    local_device_ids=(),
    detection='deactivate',
  )
  joining.start(job, HostOptions(initialization_timeout_s=7))
  inspect.signature(_REAL_INITIALIZE).bind(**given)
  assert given['heartbeat_timeout_seconds'] <= 30
  assert given['local_device_ids'] == []
  assert given['initialization_timeout'] == 7


def test_start_that_fails_says_who_was_expected(monkeypatch):
  def refuse(**_):
    raise RuntimeError('no route to host')

  monkeypatch.setattr(jax.distributed, 'initialize', refuse)
  job = Job(found_in='SLURM', num_processes=4, process_id=2)
  with pytest.raises(RuntimeError) as error:
    joining.start(job, HostOptions(initialization_timeout_s=7))
  assert str(error.value) == (
    'the processes did not find each other within 7 s (told by SLURM: '
    'process 2 of 4, address detected by jax): no route to host'
  )


def test_agreement_of_one_process_is_its_own():
  assert agreement.is_main()
  assert agreement.is_alone()
  agreement.barrier('alone')
  agreement.check_same('seed', '1')
  assert agreement.from_main(lambda: {'a': (1, 2)}) == {'a': [1, 2]}
  with pytest.raises(ZeroDivisionError):
    agreement.from_main(lambda: 1 / 0)


def test_interrupts_of_one_process_note_the_first_signal_only():
  previous = signal.getsignal(signal.SIGTERM)
  heard = []
  signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
  try:
    with agreement.interrupts() as interrupts:
      assert interrupts.check() is None
      signal.raise_signal(signal.SIGTERM)
      assert interrupts.check() == signal.SIGTERM
      assert heard == []
      signal.raise_signal(signal.SIGTERM)
      assert heard == [1]
  finally:
    signal.signal(signal.SIGTERM, previous)


class _Job:
  """Two processes of `tests.support.host_program`, and what they print."""

  def __init__(
    self,
    mode: str,
    *,
    flags: tuple[str, ...] = (),
    environments: tuple[dict, dict] | None = None,
  ):
    self.lines: list[str] = []
    port = launching.free_port()
    common = {
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
      'PYTHONPATH': str(ROOT),
      'JAX_COORDINATOR_PORT': str(port),
    }
    commands = []
    for index in range(2):
      own: tuple[str, ...] = ()
      if environments is None:
        own = (
          f'--coordinator_address=127.0.0.1:{port}',
          '--num_processes=2',
          f'--process_id={index}',
        )
      argv = ('-m', 'tests.support.host_program', f'--mode={mode}')
      values = {} if environments is None else environments[index]
      commands.append(
        Command(
          argv=(sys.executable, *argv, *own, *flags),
          environment={
            **common,
            **{k: v.replace('PORT', str(port)) for k, v in values.items()},
          },
        )
      )
    self.processes = LocalProcesses(commands, report=self.lines.append)

  def __enter__(self) -> '_Job':
    return self

  def __exit__(self, *_) -> None:
    self.processes.__exit__()

  def when_running(self, act: Callable[[], None]) -> None:
    """Calls `act` once process 0 has said that it runs."""

    def wait() -> None:
      while '[0] running' not in self.lines:
        time.sleep(0.05)
      act()

    threading.Thread(target=wait, daemon=True).start()

  def end(self) -> int:
    """Exit status, once both have ended by themselves."""
    status = self.processes.wait(grace_s=90.0)
    assert not any('are killed' in line for line in self.lines), self.lines
    return status

  def errors(self) -> list[str]:
    return [line for line in self.lines if 'error: ' in line]


def child_of(process: int) -> int:
  path = pathlib.Path(f'/proc/{process}/task/{process}/children')
  return int(path.read_text().split()[0])


@pytest.mark.slow
@pytest.mark.exhaustive
def test_run_only_process_0_prints_and_others_write_to_their_log(tmp_path):
  with _Job('devices', flags=(f'--log_dir={tmp_path}',)) as job:
    assert job.end() == 0
  said = [line for line in job.lines if 'Gloo' not in line]
  assert said == [
    '[0] process 0 of 2 in mode devices',
    '[0] 4 from all devices',
  ]
  log = (tmp_path / 'process_00001.log').read_text()
  assert 'process 1 of 2 in mode devices\n' in log
  assert '4 from all devices' in log


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
  'environments',
  [
    pytest.param(
      tuple(
        {
          'SLURM_JOB_ID': '77',
          'SLURM_STEP_NODELIST': 'localhost',
          'SLURM_NTASKS': '2',
          'SLURM_PROCID': str(index),
          'SLURM_LOCALID': str(index),
        }
        for index in range(2)
      ),
      id='slurm',
    ),
    pytest.param(
      tuple(
        {
          'OMPI_COMM_WORLD_SIZE': '2',
          'OMPI_COMM_WORLD_RANK': str(index),
          'OMPI_COMM_WORLD_LOCAL_RANK': str(index),
          'OMPI_COMM_WORLD_LOCAL_SIZE': '2',
          'PMIX_NAMESPACE': f'prterun-test-{os.getpid()}@1',
        }
        for index in range(2)
      ),
      id='open_mpi',
    ),
    pytest.param(
      tuple(
        {
          'JOB_COMPLETION_INDEX': str(index),
          'JAX_COORDINATOR_ADDRESS': 'localhost:PORT',
        }
        for index in range(2)
      ),
      id='kubernetes',
    ),
  ],
)
def test_run_schedulers_environments_start_the_processes(environments, request):
  flags = ()
  if 'kubernetes' in request.node.name:
    flags = ('--num_processes=2',)
  with _Job('devices', flags=flags, environments=environments) as job:
    assert job.end() == 0, job.lines
  assert '[0] 4 from all devices' in job.lines


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
  ('mode', 'expected'),
  [
    ('all_fail', [r'\[0\] error: seed: got 3, expected 4']),
    (
      'main_fails',
      [r"\[0\] error: invalid literal for int\(\) with base 10: 'x'"],
    ),
  ],
)
def test_run_common_error_is_said_once(mode, expected):
  with _Job(mode) as job:
    assert job.end() == 1
  assert len(job.errors()) == len(expected), job.lines
  for line, pattern in zip(job.errors(), expected, strict=True):
    assert re.fullmatch(pattern, line)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
  ('mode', 'message'),
  [
    (
      'one_differs',
      "corpus: got '1' in process 1, expected '0' as in process 0 (all "
      'processes need the same command, files and versions)',
    ),
    ('one_fails', 'Traceback (most recent call last):'),
  ],
)
def test_run_error_of_one_process_is_named_and_ends_the_job(mode, message):
  with _Job(mode, flags=_SOON) as job:
    began = time.monotonic()
    assert job.end() == 1
    assert time.monotonic() - began < 60
  [mine] = [line for line in job.errors() if line.startswith('[1] ')]
  assert re.match(r'\[1\] error: process 1 of 2 on \S+: ', mine)
  assert mine.endswith(message)
  # The other one notices that it is alone.
  [other] = [line for line in job.errors() if line.startswith('[0] ')]
  assert 'The job ends. Its newest checkpoint is intact: the same' in other


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
  ('victim', 'which', 'flags'),
  [
    (0, 'guard', ()),
    (0, 'child', ()),
    # The time a user gets, in one of the cases that wait for it.
    (1, 'guard', ()),
    (1, 'child', _SOON),
  ],
)
def test_run_killed_process_ends_the_others_with_a_message(
  victim, which, flags
):
  with _Job('run', flags=flags) as job:
    killed = []

    def kill() -> None:
      process = job.processes.ids[victim]
      killed.append(time.monotonic())
      os.kill(
        process if which == 'guard' else child_of(process), signal.SIGKILL
      )

    job.when_running(kill)
    assert job.end() == 137
    assert time.monotonic() - killed[0] < 60
  said = {line[:3]: line for line in job.errors()}
  other = said[f'[{1 - victim}]']
  assert 'another process of the job' in other
  assert 'the same command, on the same or another number of devices' in other
  if which == 'child':
    assert 'was killed (SIGKILL)' in said[f'[{victim}]']


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize('victim', [0, 1])
def test_run_sigterm_at_one_process_stops_all_at_one_step(victim):
  with _Job('run') as job:
    job.when_running(lambda: os.kill(job.processes.ids[victim], signal.SIGTERM))
    status = job.end()
  # A SystemExit with a text is status 1, and said.
  assert status == 1
  stops = [
    match[1]
    for line in job.lines
    if (match := re.search(r'process \d stops after step (\d+)', line))
  ]
  assert len(stops) == 2, job.lines
  assert stops[0] == stops[1]
