"""Command-line boundary: ConfigDict outside, frozen dataclasses inside.

A frozen dataclass cannot be a flag, so `--config.a.b=v` acts on an
`ml_collections.ConfigDict` made from it; `resolve` checks and builds the
dataclass again.
"""

import dataclasses
import functools
import sys
import typing
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_dict

from dsv32_jax.checkpoints import CheckpointError
from dsv32_jax.config import convert
from dsv32_jax.config.training import RunConfig
from dsv32_jax.sharding.hosts import job, joining
from dsv32_jax.training.loop import NonFiniteError

# What a user can cause: said in one line, without a traceback.
USER_ERRORS = (ValueError, OSError, CheckpointError, NonFiniteError)

_SCALARS = (bool, int, float, str)


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
  """The ConfigDict that a config file's `get_config` returns.

  Args:
    config: a config dataclass. A number or string that is None becomes a
      placeholder, so that an override must have the field's type.
  """
  return _config_dict(config)


def resolve(
  config: Mapping | ml_collections.ConfigDict, cls: type = RunConfig
) -> Any:
  """The checked configuration behind a ConfigDict with its overrides.

  Args:
    config: from a config file.
    cls: the dataclass that it describes.

  Raises:
    ValueError: naming the field, its value and what was expected.
  """
  is_flag = isinstance(config, ml_collections.ConfigDict)
  plain = config.to_dict() if is_flag else config
  return convert.from_dict(cls, plain)


def define_hosts() -> Callable[[], job.HostOptions]:
  """Defines the flags of a program that may run in several processes.

  Returns:
    Their values, once flags are parsed.
  """
  mode = flags.DEFINE_enum(
    'distributed',
    'auto',
    list(job.MODES),
    'Join other processes: if SLURM, Open MPI, a Kubernetes Job or the flags '
    'below tell of some (auto), in any case, or never.',
  )
  address = flags.DEFINE_string(
    'coordinator_address', None, 'HOST:PORT of process 0.'
  )
  count = flags.DEFINE_integer('num_processes', None, 'Of the whole job.')
  index = flags.DEFINE_integer('process_id', None, 'Of this one, from 0.')
  devices = flags.DEFINE_string(
    'local_device_ids',
    None,
    "The host's devices that this process takes: 0,1 or all.",
  )
  timeout_s = flags.DEFINE_integer(
    'initialization_timeout_s',
    job.INITIALIZATION_TIMEOUT_S,
    'How long to wait for the other processes to start.',
  )
  heartbeat_s = flags.DEFINE_integer(
    'heartbeat_timeout_s',
    job.HEARTBEAT_TIMEOUT_S,
    'Silence after which a process counts as lost and the job ends.',
  )

  def options() -> job.HostOptions:
    return job.HostOptions(
      distributed=mode.value,
      coordinator_address=address.value,
      num_processes=count.value,
      process_id=index.value,
      local_device_ids=_device_ids(devices.value),
      initialization_timeout_s=timeout_s.value,
      heartbeat_timeout_s=heartbeat_s.value,
      # absl's own flag.
      log_dir=flags.FLAGS.log_dir or None,
    )

  return options


def run(
  main: Callable[[list[str]], Any],
  *,
  hosts: Callable[[], job.HostOptions] | None = None,
) -> None:
  """`app.run`, but a user's error is one line and exit status 1.

  Args:
    main: takes the arguments that are no flags.
    hosts: of `define_hosts`, for a program that may run in several processes.
  """

  def parse(argv: list[str]) -> list[str]:
    try:
      return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, OSError) as error:
      # A config file's own error comes wrapped in its traceback.
      lines = [line for line in str(error).splitlines() if line.strip()]
      _stop(lines[-1] if lines else repr(error))
      raise

  def guarded(argv: list[str]) -> Any:
    if len(argv) > 1:
      _stop(f'arguments: got {argv[1:]}, expected flags only')
    try:
      if hosts is None:
        return main(argv)
      return joining.run(
        functools.partial(main, argv), hosts(), user_errors=USER_ERRORS
      )
    except USER_ERRORS as error:
      _stop(error)

  # Orbax tells absl's log about every file; the user reads our own lines.
  logging.set_verbosity(logging.WARNING)
  app.run(guarded, flags_parser=parse)


def _device_ids(text: str | None) -> tuple[int, ...] | None:
  if text is None:
    return None
  if text == 'all':
    return ()
  try:
    return tuple(int(item) for item in text.split(','))
  except ValueError:
    raise ValueError(
      f"local_device_ids: got {text!r}, expected numbers such as 0,1 or 'all'"
    ) from None


def _stop(error: object) -> None:
  print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
  sys.exit(1)


def _config_dict(config: Any) -> ml_collections.ConfigDict:
  """Of a dataclass, or of a mapping with dataclasses in it."""
  result = ml_collections.ConfigDict()
  is_mapping = isinstance(config, Mapping)
  kinds = {} if is_mapping else {f.name: f.type for f in _fields(config)}
  values = config if is_mapping else {n: getattr(config, n) for n in kinds}
  for name, value in values.items():
    if dataclasses.is_dataclass(value) or isinstance(value, Mapping):
      result[name] = _config_dict(value)
    elif value is None and (kind := _scalar(kinds.get(name))):
      result[name] = config_dict.placeholder(kind)
    else:
      result[name] = convert.plain(value)
  return result


def _fields(config: Any) -> tuple[dataclasses.Field, ...]:
  return dataclasses.fields(config)


def _scalar(kind: Any) -> type | None:
  """X of an annotation `X | None`, if X is a number or a string."""
  options = [k for k in typing.get_args(kind) if k is not type(None)]
  if len(options) == 1 and options[0] in _SCALARS:
    return options[0]
  return None
