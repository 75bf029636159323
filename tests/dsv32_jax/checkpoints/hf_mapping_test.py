"""The table of Hugging Face names (T14 of the specification) and layouts."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from dsv32_jax.checkpoints import hf_import, hf_mapping
from dsv32_jax.config import presets
from dsv32_jax.modules.transformer import DeepSeekV32

# Spec section 1, of the published checkpoint.
NUM_TENSORS = 92_425
NUM_PARAMETERS = 685_355_329_792
NUM_SCALES = 41_591_584
MAIN_PARAMETERS = 671_877_944_064
MTP_PARAMETERS = 11_624_027_648


def _size(tensors) -> int:
  return sum(math.prod(tensor.shape) for tensor in tensors)


@pytest.fixture(scope='module')
def published():
  return list(hf_mapping.tensors(presets.deepseek_v32_671b()))


def test_mapping_published_checkpoint_has_the_exact_totals(published):
  fp8 = [tensor for tensor in published if tensor.fp8]
  scales = [hf_mapping.scale_shape(tensor) for tensor in fp8]
  names = {tensor.name for tensor in published}
  names |= {hf_mapping.scale_name(tensor) for tensor in fp8}
  assert len(names) == NUM_TENSORS
  assert _size(published) == NUM_PARAMETERS
  assert sum(map(math.prod, scales)) == NUM_SCALES


def test_mapping_main_model_and_mtp_have_the_exact_totals(published):
  prefix = 'model.layers.61.'
  own = [tensor for tensor in published if tensor.targets]
  mtp = [tensor for tensor in own if tensor.name.startswith(prefix)]
  assert _size(mtp) == MTP_PARAMETERS
  assert _size(own) - _size(mtp) == MAIN_PARAMETERS
  assert _size(hf_mapping.tensors(presets.deepseek_v32_671b(), mtp=False)) == (
    MAIN_PARAMETERS
  )


@pytest.mark.parametrize(
  ('name', 'shape', 'scale'),
  [
    ('model.embed_tokens.weight', (129280, 7168), None),
    ('lm_head.weight', (129280, 7168), None),
    ('model.norm.weight', (7168,), None),
    ('model.layers.60.post_attention_layernorm.weight', (7168,), None),
    ('model.layers.0.self_attn.q_a_proj.weight', (1536, 7168), (12, 56)),
    ('model.layers.0.self_attn.q_b_proj.weight', (24576, 1536), (192, 12)),
    (
      'model.layers.9.self_attn.kv_a_proj_with_mqa.weight',
      (576, 7168),
      (5, 56),
    ),
    ('model.layers.9.self_attn.kv_b_proj.weight', (32768, 512), (256, 4)),
    ('model.layers.9.self_attn.o_proj.weight', (7168, 16384), (56, 128)),
    ('model.layers.9.self_attn.indexer.wq_b.weight', (8192, 1536), (64, 12)),
    ('model.layers.9.self_attn.indexer.wk.weight', (128, 7168), (1, 56)),
    ('model.layers.61.self_attn.indexer.k_norm.bias', (128,), None),
    ('model.layers.9.self_attn.indexer.weights_proj.weight', (64, 7168), None),
    ('model.layers.2.mlp.down_proj.weight', (7168, 18432), (56, 144)),
    ('model.layers.3.mlp.gate.weight', (256, 7168), None),
    ('model.layers.3.mlp.gate.e_score_correction_bias', (256,), None),
    (
      'model.layers.61.mlp.experts.255.up_proj.weight',
      (2048, 7168),
      (16, 56),
    ),
    (
      'model.layers.3.mlp.shared_experts.down_proj.weight',
      (7168, 2048),
      (56, 16),
    ),
    ('model.layers.61.eh_proj.weight', (7168, 14336), None),
    ('model.layers.61.shared_head.norm.weight', (7168,), None),
    ('model.layers.61.shared_head.head.weight', (129280, 7168), None),
  ],
)
def test_mapping_published_name_has_the_published_shape(
  published, name, shape, scale
):
  (tensor,) = [tensor for tensor in published if tensor.name == name]
  assert tensor.shape == shape
  assert tensor.fp8 == (scale is not None)
  if scale is not None:
    assert hf_mapping.scale_shape(tensor) == scale


@pytest.mark.parametrize('scan_layers', [True, False])
@pytest.mark.parametrize(
  'preset',
  [
    'tiny',
    pytest.param('v2_lite_dsa', marks=pytest.mark.slow),
    'deepseek_v32_671b',
  ],
)
def test_mapping_fills_every_parameter_exactly_once(preset, scan_layers):
  cfg = dataclasses.replace(presets.get(preset), scan_layers=scan_layers)
  if preset == 'deepseek_v32_671b' and not scan_layers:
    # Unrolled init of 61 layers takes long to trace; depth adds nothing here.
    cfg = dataclasses.replace(cfg, num_hidden_layers=4)
  flat, _ = jax.tree_util.tree_flatten_with_path(
    hf_import.variable_shapes(DeepSeekV32(cfg))
  )
  leaves = {tuple(key.key for key in path): leaf for path, leaf in flat}
  filled = dict.fromkeys(leaves, 0)
  seen = set()
  for tensor in hf_mapping.tensors(cfg):
    parts = [tensor.factored] * max(len(tensor.targets), 1)
    if tensor.cut_sizes:
      parts = [
        (
          *tensor.factored[: tensor.cut_axis],
          size,
          *tensor.factored[tensor.cut_axis + 1 :],
        )
        for size in tensor.cut_sizes
      ]
    for target, part in zip(tensor.targets, parts, strict=False):
      assert (target.path, target.index) not in seen
      seen.add((target.path, target.index))
      shape = tuple(part[axis] for axis in target.order)
      assert shape == leaves[target.path].shape[len(target.index) :]
      filled[target.path] += math.prod(shape)
  assert filled == {path: leaf.size for path, leaf in leaves.items()}


@pytest.mark.parametrize('fused', [False, True])
def test_mapping_join_inverts_split(fused):
  for tensor in hf_mapping.tensors(presets.tiny(), fused_experts=fused):
    if not tensor.targets:
      continue
    value = np.arange(math.prod(tensor.shape)).reshape(tensor.shape)
    np.testing.assert_array_equal(tensor.join(tensor.split(value)), value)


def _tensor(name: str) -> hf_mapping.Tensor:
  prefix = f'model.layers.1.{name}'
  (tensor,) = [
    tensor
    for tensor in hf_mapping.tensors(presets.tiny())
    if tensor.name == prefix
  ]
  return tensor


def test_mapping_query_rows_are_nope_then_rope_of_each_head():
  H, N, R, Q = 4, 16, 8, 32
  value = np.arange(H * (N + R) * Q).reshape(H * (N + R), Q)
  w_uq, w_qr = _tensor('self_attn.q_b_proj.weight').split(value)
  for head in range(H):
    top = head * (N + R)
    np.testing.assert_array_equal(w_uq[:, head], value[top : top + N].T)
    np.testing.assert_array_equal(w_qr[:, head], value[top + N : top + N + R].T)


def test_mapping_kv_up_rows_are_keys_then_values_of_each_head():
  H, N, U, C = 4, 16, 16, 16
  value = np.arange(H * (N + U) * C).reshape(H * (N + U), C)
  w_uk, w_uv = _tensor('self_attn.kv_b_proj.weight').split(value)
  for head in range(H):
    top = head * (N + U)
    np.testing.assert_array_equal(w_uk[:, head], value[top : top + N].T)
    np.testing.assert_array_equal(w_uv[:, head], value[top + N : top + N + U].T)


def test_mapping_kv_down_rows_are_latent_then_rope():
  C, R, D = 16, 8, 64
  value = np.arange((C + R) * D).reshape(C + R, D)
  w_dkv, w_kr = _tensor('self_attn.kv_a_proj_with_mqa.weight').split(value)
  np.testing.assert_array_equal(w_dkv, value[:C].T)
  np.testing.assert_array_equal(w_kr, value[C:].T)


def test_mapping_output_columns_are_head_major():
  H, U, D = 4, 16, 64
  value = np.arange(D * H * U).reshape(D, H * U)
  (w_o,) = _tensor('self_attn.o_proj.weight').split(value)
  for head in range(H):
    np.testing.assert_array_equal(
      w_o[head], value[:, head * U : (head + 1) * U].T
    )


def test_mapping_experts_go_to_their_own_slot():
  tensor = _tensor('mlp.experts.5.up_proj.weight')
  assert tensor.targets[0].index == (0, 5)
  assert tensor.targets[0].path[-3:] == ('moe', 'experts', 'w_up')
