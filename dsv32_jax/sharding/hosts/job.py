"""What is known of the processes of a run, from the flags or a scheduler."""

import dataclasses
import re

INITIALIZATION_TIMEOUT_S = 300
"""Hosts of one job may start minutes apart."""
HEARTBEAT_TIMEOUT_S = 30
"""A process that is silent for so long is lost, and the job ends."""

MODES = ('auto', 'on', 'off')


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostOptions:
  """What a user says about the processes; None is left to the environment.

  Attributes:
    distributed: 'auto' starts the runtime if the environment or the flags tell
      of several processes, 'on' insists (and lets jax detect clusters of other
      kinds), 'off' never does.
    coordinator_address: HOST:PORT of process 0, a free port of its host.
    num_processes: of the job.
    process_id: of this one, from 0.
    local_device_ids: devices of the host that this process takes; () takes all.
    initialization_timeout_s: how long to wait for the other processes.
    heartbeat_timeout_s: silence after which a process counts as lost.
    log_dir: gets a file for each process but the first, with what it prints.
  """

  distributed: str = 'auto'
  coordinator_address: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  local_device_ids: tuple[int, ...] | None = None
  initialization_timeout_s: int = INITIALIZATION_TIMEOUT_S
  heartbeat_timeout_s: int = HEARTBEAT_TIMEOUT_S
  log_dir: str | None = None

  def __post_init__(self):
    require(
      self.distributed in MODES,
      f'distributed: got {self.distributed!r}, expected one of {MODES}',
    )
    address, count = self.coordinator_address, self.num_processes
    require(
      address is None or is_address(address),
      f'coordinator_address: got {address!r}, expected HOST:PORT',
    )
    require(
      count is None or count >= 1,
      f'num_processes: got {count}, expected at least 1',
    )
    below = '' if count is None else f' and less than num_processes {count}'
    require(
      self.process_id is None
      or 0
      <= self.process_id
      < (self.process_id + 1 if count is None else count),
      f'process_id: got {self.process_id}, expected 0 or more{below}',
    )
    ids = self.local_device_ids or ()
    require(
      all(i >= 0 for i in ids) and len(set(ids)) == len(ids),
      f'local_device_ids: got {ids}, expected different numbers from 0',
    )
    for name in ('initialization_timeout_s', 'heartbeat_timeout_s'):
      value = getattr(self, name)
      require(value >= 1, f'{name}: got {value}, expected at least 1')
    if self.distributed == 'off':
      for name in ('coordinator_address', 'num_processes', 'process_id'):
        value = getattr(self, name)
        require(
          value is None,
          f"{name}: got {value!r} with distributed 'off', expected none",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """The arguments of `jax.distributed.initialize`; None is detected by jax.

  Attributes:
    found_in: what told of several processes.
    coordinator_address: HOST:PORT of process 0.
    num_processes: of the job.
    process_id: of this one.
    local_device_ids: devices that this process takes; () takes all.
    detection: jax's `cluster_detection_method`.
  """

  found_in: str
  coordinator_address: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  local_device_ids: tuple[int, ...] | None = None
  detection: str | None = None


def is_address(text: str) -> bool:
  """Whether it is HOST:PORT."""
  match = re.fullmatch(r'(\[[0-9a-fA-F:.]+\]|[^\s:]+):(\d+)', text)
  return match is not None and 0 < int(match[2]) < 65536


def require(condition: bool, message: str) -> None:
  """Raises ValueError(message) unless the condition holds."""
  if not condition:
    raise ValueError(message)
