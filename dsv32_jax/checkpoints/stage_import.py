"""Reads what a training stage left into a model and its variables."""

import os

from dsv32_jax.checkpoints.hf_import import variable_shapes
from dsv32_jax.checkpoints.reading import load_params, read_extra
from dsv32_jax.config import convert
from dsv32_jax.config.model import ModelConfig
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.sharding.parallel import Parallel


def load_stage(
  path: str | os.PathLike, parallel: Parallel | None = None
) -> tuple[DeepSeekV32, dict]:
  """Loads the newest sound checkpoint of a training stage.

  Args:
    path: directory of a stage (WORKDIR/stages/NAME), or of one checkpoint.
    parallel: lays the variables out, however they were when they were saved.

  Returns:
    The model as the stage trained it (every checkpoint records its
    configuration), and {'params': ..., 'router_bias': ...}.

  Raises:
    CheckpointError: there is no undamaged checkpoint.
    ValueError: the checkpoint does not say which model it is of.
  """
  _, extra = read_extra(path)
  if 'model' not in extra:
    raise ValueError(
      f'{os.fspath(path)}: the checkpoint records {sorted(extra)}, expected '
      "'model', the configuration of its model"
    )
  model = DeepSeekV32(convert.from_dict(ModelConfig, extra['model']))
  return model, load_params(path, variable_shapes(model, parallel)).state
