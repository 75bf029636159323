"""Models that a chain of trainings hands on: parameters, without optimizers."""

import hashlib
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dsv32_jax.checkpoints import CheckpointManager, load_params, read_extra
from dsv32_jax.config.model import ModelConfig
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.training import state as state_lib


def load(directory: pathlib.Path, model: ModelConfig) -> dict[str, Any]:
  """Variables from any directory that `load_params` takes.

  Raises:
    CheckpointError, ValueError: see there.
  """
  shapes = state_lib.variable_shapes(DeepSeekV32(model))
  return load_params(directory, shapes).state


def hand_on(
  source: pathlib.Path,
  target: pathlib.Path,
  model: ModelConfig,
  record: Mapping[str, Any],
) -> str:
  """Copies a trained model out of its training state.

  Args:
    source: a directory that `load_params` takes.
    target: gets a checkpoint of parameters and router biases.
    model: the architecture.
    record: JSON-able facts kept with it.

  Returns:
    `fingerprint` of the model.
  """
  variables = load(source, model)
  mark = fingerprint(variables)
  # An earlier attempt may have been cut short.
  shutil.rmtree(target, ignore_errors=True)
  with CheckpointManager(target, keep=1) as checkpoints:
    checkpoints.save(0, variables, {**record, 'weights': mark})
    checkpoints.wait()
  return mark


def fingerprint_of(directory: pathlib.Path) -> str:
  """`fingerprint` of a model that was handed on."""
  return read_extra(directory)[1]['weights']


def fingerprint(variables: Mapping[str, Any]) -> str:
  """Names the values of a model's arrays; equal for equal values."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(dict(variables)):
    array = np.asarray(leaf)
    digest.update(
      f'{jax.tree_util.keystr(path)}{array.shape}{array.dtype}'.encode()
    )
    digest.update(array.tobytes())
  return digest.hexdigest()[:16]
