"""Training state on disk, and weights from elsewhere."""

from dsv32_jax.checkpoints.hf_check import check as check_hf
from dsv32_jax.checkpoints.hf_export import save_hf
from dsv32_jax.checkpoints.hf_import import load_hf
from dsv32_jax.checkpoints.manager import CheckpointManager
from dsv32_jax.checkpoints.reading import (
  CheckpointError,
  Restored,
  load_params,
  read_extra,
)
from dsv32_jax.checkpoints.stage_import import load_stage

__all__ = [
  'CheckpointError',
  'CheckpointManager',
  'Restored',
  'check_hf',
  'load_hf',
  'load_params',
  'load_stage',
  'read_extra',
  'save_hf',
]
