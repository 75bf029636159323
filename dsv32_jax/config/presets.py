"""Named model sizes, from a unit-test model to the published 671B one."""

import dataclasses
import json
import os
from collections.abc import Mapping

from dsv32_jax.config.model import ModelConfig, Precision, RopeScaling

_BF16 = Precision(param='float32', compute='bfloat16', logits='float32')


def tiny() -> ModelConfig:
  """Unit tests: three layers of width 64."""
  return ModelConfig(
    vocab_size=512,
    hidden_size=64,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=4,
    q_lora_rank=32,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    intermediate_size=128,
    moe_intermediate_size=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    n_group=4,
    topk_group=2,
    index_n_heads=16,
    index_head_dim=16,
    index_topk=32,
    num_nextn_predict_layers=1,
    max_position_embeddings=32768,
  )


def cpu() -> ModelConfig:
  """Learning results on two cores; k is T/8 at the recipe's T of 512."""
  return ModelConfig(
    vocab_size=512,
    hidden_size=128,
    num_hidden_layers=4,
    first_k_dense_replace=1,
    num_attention_heads=4,
    q_lora_rank=64,
    kv_lora_rank=32,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    intermediate_size=256,
    moe_intermediate_size=64,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    index_n_heads=8,
    index_head_dim=32,
    index_topk=64,
    max_position_embeddings=4096,
    # About hidden_size^-1/2: with 0.02 the recall task is not learned in the
    # schedule that experiments/configs/continued_training.py gives it.
    initializer_range=0.06,
    remat='none',
  )


def mini() -> ModelConfig:
  """Learning results on one GPU; about 28.5M parameters."""
  return ModelConfig(
    vocab_size=4096,
    hidden_size=384,
    num_hidden_layers=8,
    first_k_dense_replace=1,
    num_attention_heads=8,
    q_lora_rank=128,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    intermediate_size=1024,
    moe_intermediate_size=256,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    index_n_heads=16,
    index_head_dim=64,
    index_topk=512,
    max_position_embeddings=4096,
    precision=_BF16,
  )


def small() -> ModelConfig:
  """Throughput at V3.2's attention shape; about 423M parameters."""
  return ModelConfig(
    vocab_size=16384,
    hidden_size=1024,
    num_hidden_layers=8,
    first_k_dense_replace=1,
    num_attention_heads=64,
    q_lora_rank=384,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    intermediate_size=2816,
    moe_intermediate_size=512,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_shared_experts=1,
    index_n_heads=32,
    index_head_dim=128,
    index_topk=1024,
    max_position_embeddings=163840,
    rope_scaling=RopeScaling(),
    precision=_BF16,
  )


def v2_lite_dsa() -> ModelConfig:
  """DeepSeek-V2-Lite's sizes with a q latent of 512 added, which DSA needs."""
  return ModelConfig(
    vocab_size=102400,
    hidden_size=2048,
    num_hidden_layers=27,
    first_k_dense_replace=1,
    num_attention_heads=16,
    q_lora_rank=512,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    n_routed_experts=64,
    num_experts_per_tok=6,
    n_shared_experts=2,
    routed_scaling_factor=1.0,
    norm_topk_prob=False,
    scoring_func='softmax',
    topk_method='greedy',
    index_n_heads=64,
    index_head_dim=128,
    index_topk=2048,
    max_position_embeddings=163840,
    rope_scaling=RopeScaling(mscale=0.707, mscale_all_dim=0.707),
    bos_token_id=100000,
    eos_token_id=100001,
    precision=_BF16,
  )


def deepseek_v32_671b() -> ModelConfig:
  """The published model (spec section 1), MTP module included."""
  return ModelConfig(
    vocab_size=129280,
    hidden_size=7168,
    num_hidden_layers=61,
    first_k_dense_replace=3,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    num_experts_per_tok=8,
    n_shared_experts=1,
    n_group=8,
    topk_group=4,
    index_n_heads=64,
    index_head_dim=128,
    index_topk=2048,
    num_nextn_predict_layers=1,
    max_position_embeddings=163840,
    rope_scaling=RopeScaling(),
    initializer_range=0.006,
    precision=Precision(param='bfloat16', compute='bfloat16'),
  )


PRESETS = {
  preset.__name__: preset
  for preset in (tiny, cpu, mini, small, v2_lite_dsa, deepseek_v32_671b)
}


def get(name: str) -> ModelConfig:
  """Returns the preset called `name`.

  Raises:
    ValueError: if there is none; lists those there are.
  """
  if name not in PRESETS:
    raise ValueError(f'preset: got {name!r}, expected one of {sorted(PRESETS)}')
  return PRESETS[name]()


# Fields of a published config.json that say nothing about the architecture or
# that this code derives, so they may be present and are not read.
_HF_DERIVED = {'qk_head_dim', 'head_dim', 'num_key_value_heads'}
_HF_REQUIRED_VALUES = {
  'attention_bias': False,
  'mlp_bias': False,
  'hidden_act': 'silu',
  'moe_layer_freq': 1,
}


def from_hf_json(source: str | os.PathLike | Mapping) -> ModelConfig:
  """Reads a Hugging Face `config.json` of a DeepSeek-V3.2-like model.

  Both spellings of the rotary settings are understood: `rope_scaling` with a
  separate `rope_theta` (the published file) and `rope_parameters`
  (transformers 5).

  Args:
    source: path of a config.json, or its parsed content.

  Returns:
    The model configuration; computes in the file's `dtype` / `torch_dtype`.

  Raises:
    ValueError: if a needed field is missing or has a value that this
      architecture does not have.
    FileNotFoundError: if the path does not exist.
  """
  if isinstance(source, Mapping):
    raw = dict(source)
  else:
    with open(source, encoding='utf-8') as file:
      raw = json.load(file)
  for name, expected in _HF_REQUIRED_VALUES.items():
    if raw.get(name, expected) != expected:
      raise ValueError(
        f'config.json {name}: got {raw[name]!r}, expected {expected!r}'
      )
  heads = raw.get('num_attention_heads')
  if raw.get('num_key_value_heads', heads) != heads:
    raise ValueError(
      f'config.json num_key_value_heads: got {raw["num_key_value_heads"]}, '
      f'expected num_attention_heads {heads} (MLA has no grouped heads)'
    )
  dtype = raw.get('dtype') or raw.get('torch_dtype') or 'bfloat16'
  rope = dict(raw.get('rope_parameters') or {})
  theta = raw.get('rope_theta', rope.pop('rope_theta', 10000.0))
  scaling = _rope_scaling(rope or raw.get('rope_scaling') or {})
  own = {
    'precision',
    'rope_scaling',
    'rope_theta',
    'scan_layers',
    'remat',
    'query_chunk',
  }
  fields = [
    field for field in dataclasses.fields(ModelConfig) if field.name not in own
  ]
  required = [
    field.name
    for field in fields
    if field.default is dataclasses.MISSING and field.name not in raw
  ]
  # A dense DeepSeek-V3 file has no indexer: its absence is an error here, not
  # a guess; callers that add one pass a completed mapping.
  if required:
    raise ValueError(
      f'config.json: missing {", ".join(required)}; expected a DeepSeek-V3.2 '
      'config (model_type deepseek_v32)'
    )
  return ModelConfig(
    **_values(fields, raw),
    rope_theta=float(theta),
    rope_scaling=scaling,
    precision=Precision(param=dtype, compute=dtype, logits='float32'),
  )


def _rope_scaling(raw: Mapping) -> RopeScaling | None:
  kind = raw.get('rope_type', raw.get('type', 'default'))
  if kind == 'default':
    return None
  if kind != 'yarn':
    raise ValueError(
      f"config.json rope_scaling.type: got {kind!r}, expected 'yarn' or "
      "'default'"
    )
  fields = [
    field
    for field in dataclasses.fields(RopeScaling)
    if field.name != 'rope_type'
  ]
  return RopeScaling(**_values(fields, raw))


def _values(fields: list[dataclasses.Field], raw: Mapping) -> dict:
  """The fields that a file has; JSON writes 32.0 as 32."""
  values = {}
  for field in fields:
    if field.name in raw:
      value = raw[field.name]
      is_whole = field.type is float and type(value) is int
      values[field.name] = float(value) if is_whole else value
  return values
