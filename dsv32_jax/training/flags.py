"""Command-line boundary: ConfigDict outside, frozen dataclasses inside.

A frozen dataclass cannot be a flag, so `--config.a.b=v` acts on an
`ml_collections.ConfigDict` made from it; `resolve` checks and builds the
dataclass again.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_dict

from dsv32_jax.checkpoints import CheckpointError
from dsv32_jax.config import convert
from dsv32_jax.config.training import RunConfig
from dsv32_jax.training.loop import NonFiniteError

# What a user can cause: said in one line, without a traceback.
USER_ERRORS = (ValueError, OSError, CheckpointError, NonFiniteError)

# Fields whose default is None, and the type that an override must have.
_OPTIONAL = {
  'init_from': str,
  'index_topk': int,
  'q_lora_rank': int,
  'vocab_size': int,
  'max_gap': int,
  'first_token': int,
}


def to_config_dict(config: RunConfig) -> ml_collections.ConfigDict:
  """The ConfigDict that a config file's `get_config` returns."""
  return _with_placeholders(convert.to_dict(config))


def resolve(config: Mapping | ml_collections.ConfigDict) -> RunConfig:
  """The checked configuration behind a ConfigDict with its overrides.

  Raises:
    ValueError: naming the field, its value and what was expected.
  """
  is_flag = isinstance(config, ml_collections.ConfigDict)
  plain = config.to_dict() if is_flag else config
  return convert.from_dict(RunConfig, plain)


def run(main: Callable[[list[str]], Any]) -> None:
  """`app.run`, but a user's error is one line and exit status 1.

  Args:
    main: takes the arguments that are no flags.
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
      return main(argv)
    except USER_ERRORS as error:
      _stop(error)

  # Orbax tells absl's log about every file; the user reads our own lines.
  logging.set_verbosity(logging.WARNING)
  app.run(guarded, flags_parser=parse)


def _stop(error: object) -> None:
  print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
  sys.exit(1)


def _with_placeholders(values: Mapping) -> ml_collections.ConfigDict:
  result = ml_collections.ConfigDict()
  for name, value in values.items():
    if isinstance(value, Mapping):
      result[name] = _with_placeholders(value)
    elif value is None and name in _OPTIONAL:
      result[name] = config_dict.placeholder(_OPTIONAL[name])
    else:
      result[name] = value
  return result
