"""Loading the model of a training stage from its checkpoints alone."""

import dataclasses

import jax
import numpy as np
import pytest

from dsv32_jax import DeepSeekV32, checkpoints
from dsv32_jax.checkpoints import hf_import
from dsv32_jax.config import convert, presets
from dsv32_jax.config.model import RopeScaling

CFG = dataclasses.replace(
  presets.tiny(),
  num_hidden_layers=2,
  index_topk=5,
  rope_scaling=RopeScaling(original_max_position_embeddings=16),
)


def _state(cfg):
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype),
    hf_import.variable_shapes(DeepSeekV32(cfg)),
  )


def _save(path, state, extra):
  with checkpoints.CheckpointManager(path) as manager:
    manager.save(7, {**state, 'opt_state': {'m': np.ones(3)}}, extra)
    manager.wait()


def test_load_stage_gives_the_model_and_the_variables_saved(tmp_path):
  state = _state(CFG)
  _save(tmp_path, state, {'model': convert.to_dict(CFG)})
  model, variables = checkpoints.load_stage(tmp_path)
  assert model.cfg == CFG
  assert jax.tree.structure(variables) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, variables, state)


def test_load_stage_of_an_unknown_model_is_refused(tmp_path):
  _save(tmp_path, _state(CFG), {'stage': 'pretrain'})
  with pytest.raises(ValueError, match=r"records .'stage'., expected 'model'"):
    checkpoints.load_stage(tmp_path)


def test_load_stage_of_an_empty_directory_is_refused(tmp_path):
  with pytest.raises(checkpoints.CheckpointError):
    checkpoints.load_stage(tmp_path)
