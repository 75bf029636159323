import json

import pytest

from dsv32_jax.config import presets
from dsv32_jax.config.model import RopeScaling

pytestmark = pytest.mark.usefixtures('without_type_hook')

# Section 1 of the specification, as the published config.json spells it.
PUBLISHED = {
  'architectures': ['DeepseekV32ForCausalLM'],
  'model_type': 'deepseek_v32',
  'attention_bias': False,
  'bos_token_id': 0,
  'eos_token_id': 1,
  'ep_size': 1,
  'first_k_dense_replace': 3,
  'hidden_act': 'silu',
  'hidden_size': 7168,
  'index_head_dim': 128,
  'index_n_heads': 64,
  'index_topk': 2048,
  'initializer_range': 0.006,
  'intermediate_size': 18432,
  'kv_lora_rank': 512,
  'max_position_embeddings': 163840,
  'moe_intermediate_size': 2048,
  'moe_layer_freq': 1,
  'n_group': 8,
  'n_routed_experts': 256,
  'n_shared_experts': 1,
  'norm_topk_prob': True,
  'num_attention_heads': 128,
  'num_experts_per_tok': 8,
  'num_hidden_layers': 61,
  'num_key_value_heads': 128,
  'num_nextn_predict_layers': 1,
  'q_lora_rank': 1536,
  'qk_nope_head_dim': 128,
  'qk_rope_head_dim': 64,
  'rms_norm_eps': 1e-06,
  'rope_scaling': {
    'beta_fast': 32,
    'beta_slow': 1,
    'factor': 40,
    'mscale': 1.0,
    'mscale_all_dim': 1.0,
    'original_max_position_embeddings': 4096,
    'type': 'yarn',
  },
  'rope_theta': 10000,
  'routed_scaling_factor': 2.5,
  'scoring_func': 'sigmoid',
  'tie_word_embeddings': False,
  'topk_group': 4,
  'topk_method': 'noaux_tc',
  'torch_dtype': 'bfloat16',
  'v_head_dim': 128,
  'vocab_size': 129280,
}


def test_presets_are_listed_under_their_names():
  assert list(presets.PRESETS) == [
    'tiny', 'cpu', 'mini', 'small', 'v2_lite_dsa', 'deepseek_v32_671b',
  ]  # fmt: skip
  for name, preset in presets.PRESETS.items():
    assert presets.get(name) == preset()
    preset().require_indexer()


def test_get_unknown_preset_names_those_there_are():
  with pytest.raises(
    ValueError, match=r"preset: got 'huge', expected one of .*'tiny'"
  ):
    presets.get('huge')


def test_from_hf_json_published_file_is_the_671b_preset(tmp_path):
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(PUBLISHED))
  expected = presets.deepseek_v32_671b()
  assert presets.from_hf_json(path) == expected
  assert presets.from_hf_json(PUBLISHED) == expected


def test_from_hf_json_reads_rope_parameters_of_transformers_5():
  raw = dict(PUBLISHED)
  scaling = dict(raw.pop('rope_scaling'), rope_type='yarn')
  del scaling['type']
  scaling['rope_theta'] = raw.pop('rope_theta')
  raw['rope_parameters'] = scaling
  raw['dtype'] = raw.pop('torch_dtype')
  assert presets.from_hf_json(raw) == presets.deepseek_v32_671b()


def test_from_hf_json_without_scaling_has_none():
  raw = PUBLISHED | {'rope_scaling': None, 'rope_theta': 50000}
  cfg = presets.from_hf_json(raw)
  assert cfg.rope_scaling is None
  assert cfg.rope_theta == 50000
  default = PUBLISHED | {'rope_parameters': {'rope_type': 'default'}}
  del default['rope_scaling']
  assert presets.from_hf_json(default).rope_scaling is None


def test_from_hf_json_does_not_change_its_argument():
  before = json.dumps(PUBLISHED)
  presets.from_hf_json(PUBLISHED)
  assert json.dumps(PUBLISHED) == before


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'attention_bias': True}, 'attention_bias: got True, expected False'),
    ({'hidden_act': 'gelu'}, "hidden_act: got 'gelu', expected 'silu'"),
    ({'moe_layer_freq': 2}, 'moe_layer_freq: got 2, expected 1'),
    (
      {'num_key_value_heads': 8},
      'num_key_value_heads: got 8, expected num_attention_heads 128',
    ),
    ({'n_group': 7}, 'n_group: got 7, expected a divisor'),
    ({'hidden_size': '7168'}, "hidden_size: got '7168', expected int"),
    ({'torch_dtype': 'float8'}, "precision.param: got 'float8', expected"),
    (
      {'rope_scaling': {'type': 'linear', 'factor': 2}},
      "rope_scaling.type: got 'linear', expected 'yarn'",
    ),
  ],
)
def test_from_hf_json_other_architectures_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    presets.from_hf_json(PUBLISHED | changes)


def test_from_hf_json_missing_fields_are_all_named():
  raw = {
    k: v for k, v in PUBLISHED.items() if k not in ('index_topk', 'hidden_size')
  }
  with pytest.raises(
    ValueError, match='missing hidden_size, index_topk; expected'
  ):
    presets.from_hf_json(raw)


def test_from_hf_json_missing_file_is_an_error(tmp_path):
  with pytest.raises(FileNotFoundError):
    presets.from_hf_json(tmp_path / 'config.json')


def test_long_context_presets_are_extended_by_yarn():
  for name in ('small', 'deepseek_v32_671b'):
    cfg = presets.get(name)
    assert cfg.rope_scaling == RopeScaling()
    assert cfg.max_position_embeddings == 40 * 4096
