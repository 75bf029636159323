"""The synthetic checkpoint has what the published one has (spec section 7)."""

import dataclasses
import json
import math
import re

import jax
import numpy as np
import pytest

from dsv32_jax import checkpoints
from dsv32_jax.checkpoints import hf_files, hf_mapping, synthetic
from dsv32_jax.config import presets

NUM_TENSORS = 92_425
MTP = 'model.layers.61.'


def test_synthesize_small_checkpoint_loads_with_scales_elsewhere(tmp_path):
  path = tmp_path / 'tiny'
  synthetic.synthesize(path, presets.tiny(), num_shards=7, seed=1)
  plan = checkpoints.check_hf(path)
  elsewhere = [
    name
    for name, entry in plan.stored.items()
    if name.endswith('_scale_inv')
    and plan.stored[name.removesuffix('_scale_inv')].file != entry.file
  ]
  assert len(elsewhere) >= 4
  model, variables = checkpoints.load_hf(path)
  assert model.cfg.num_nextn_predict_layers == 1
  assert all(
    np.isfinite(np.asarray(leaf, np.float32)).all()
    for leaf in jax.tree.leaves(variables)
  )
  other = tmp_path / 'other'
  synthetic.synthesize(other, presets.tiny(), num_shards=7, seed=1)
  for file in path.iterdir():
    assert file.read_bytes() == (other / file.name).read_bytes()


def test_synthesize_unquantised_and_without_mtp(tmp_path):
  cfg = dataclasses.replace(presets.tiny(), num_nextn_predict_layers=0)
  path = tmp_path / 'plain'
  synthetic.synthesize(path, cfg, num_shards=4, quantize=None)
  plan = checkpoints.check_hf(path)
  assert len(list(path.glob('*.safetensors'))) == 4
  assert {entry.dtype for entry in plan.stored.values()} == {'BF16', 'F32'}


def test_synthesize_impossible_requests_are_refused(tmp_path):
  with pytest.raises(ValueError, match='exists'):
    synthetic.synthesize(tmp_path)
  with pytest.raises(ValueError, match='num_shards: got 1000'):
    synthetic.synthesize(tmp_path / 'x', presets.tiny(), num_shards=1000)


@pytest.mark.slow
def test_synthesized_published_layout_has_every_name_and_imports(tmp_path):
  """Bar 2: 163 shards, 92,425 names, placed as the published ones are."""
  path = tmp_path / 'published'
  synthetic.synthesize(path)
  files = sorted(file.name for file in path.glob('*.safetensors'))
  assert len(files) == 163
  assert files[0] == 'model-00001-of-000163.safetensors'
  weight_map = json.loads((path / hf_files.INDEX).read_text())['weight_map']
  full = presets.deepseek_v32_671b()
  names = set()
  for tensor in hf_mapping.tensors(full):
    names.add(tensor.name)
    if tensor.fp8:
      names.add(hf_mapping.scale_name(tensor))
  assert len(names) == NUM_TENSORS
  assert set(weight_map) == names
  assert re.search(r'-00160-', weight_map['lm_head.weight'])
  assert re.search(r'-00160-', weight_map['model.norm.weight'])
  for extra in ('eh_proj', 'embed_tokens', 'shared_head.head', 'enorm'):
    assert re.search(r'-00163-', weight_map[f'{MTP}{extra}.weight'])
  apart = sum(
    weight_map[f'{name}_scale_inv'] != file
    for name, file in weight_map.items()
    if f'{name}_scale_inv' in weight_map
  )
  print(f'{apart} scales in another shard than their weight')
  assert apart > 100
  lines = []
  model, variables = checkpoints.load_hf(path, report=lines.append)
  cfg = model.cfg
  assert (cfg.num_hidden_layers, cfg.n_routed_experts) == (61, 256)
  size = sum(leaf.size for leaf in jax.tree.leaves(variables))
  assert size == sum(
    math.prod(tensor.shape)
    for tensor in hf_mapping.tensors(cfg)
    if tensor.targets
  )
  assert 'all powers of two' in lines[0]
  # One expert of the last layer, by hand.
  plan = checkpoints.check_hf(path)
  name = 'model.layers.60.mlp.experts.255.down_proj.weight'
  with hf_files.Reader() as reader:
    values = reader.read(plan.stored[name]).astype(np.float32)
    scale = reader.read(plan.stored[f'{name}_scale_inv'])
  rows, columns = np.indices(values.shape) // 128
  experts = variables['params']['moe_layers']['layers']['moe']['experts']
  found = np.asarray(experts['w_down'][57, 255], np.float32)
  np.testing.assert_array_equal(found, (values * scale[rows, columns]).T)
