"""Training state on disk, and weights from elsewhere."""

from dsv32_jax.checkpoints.hf_import import load_hf
from dsv32_jax.checkpoints.manager import CheckpointManager
from dsv32_jax.checkpoints.reading import (
  CheckpointError,
  Restored,
  load_params,
  read_extra,
)

__all__ = [
  'CheckpointError',
  'CheckpointManager',
  'Restored',
  'load_hf',
  'load_params',
  'read_extra',
]
