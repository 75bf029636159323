"""Random checkpoints made with transformers, and what it computes with them.

The oracle of the tests on checkpoints: transformers 5.23.0 writes the files and
the logits, none of our code does. Needs torch; `write_fixtures` makes those
that tests/fixtures/ holds:

  python -m tests.support.transformers_checkpoints tests/fixtures
"""

import json
import pathlib
import sys

import numpy as np
import safetensors.torch
import torch
import transformers

BLOCK = 128
E4M3_MAX = 448.0
LENGTH, PROMPT, NEW = 24, 8, 8

_COMMON = {
  'vocab_size': 48,
  'hidden_size': 32,
  'intermediate_size': 24,
  'moe_intermediate_size': 12,
  'num_hidden_layers': 2,
  'first_k_dense_replace': 1,
  'num_attention_heads': 2,
  'num_key_value_heads': 2,
  'n_shared_experts': 1,
  'n_routed_experts': 4,
  'num_experts_per_tok': 2,
  'n_group': 2,
  'topk_group': 1,
  'routed_scaling_factor': 2.5,
  'norm_topk_prob': True,
  'q_lora_rank': 16,
  'kv_lora_rank': 12,
  'qk_nope_head_dim': 8,
  'qk_rope_head_dim': 4,
  'v_head_dim': 12,
  # Fewer make exact ties of zero scores, which torch breaks as it likes.
  'index_n_heads': 16,
  'index_head_dim': 8,
  'index_topk': 7,
  'max_position_embeddings': 128,
  'attn_implementation': 'eager',
  'experts_implementation': 'eager',
}
_YARN = {
  'rope_type': 'yarn',
  'rope_theta': 10000.0,
  'factor': 8.0,
  'beta_fast': 32,
  'beta_slow': 1,
  'mscale': 1.0,
  'mscale_all_dim': 1.0,
  'original_max_position_embeddings': 8,
}
_NO_YARN = {'rope_type': 'default', 'rope_theta': 50000.0}

# Each differs from hf_tiny_v32 in what its name says, and in its sizes.
VARIANTS = {
  'hf_no_yarn': {'rope_parameters': _NO_YARN},
  'hf_ungrouped': {
    'rope_parameters': _YARN,
    'n_group': 1,
    'topk_group': 1,
    'n_routed_experts': 6,
    'num_experts_per_tok': 3,
    'n_shared_experts': 2,
    'num_attention_heads': 3,
    'num_key_value_heads': 3,
    'first_k_dense_replace': 0,
    'routed_scaling_factor': 1.5,
  },
  'hf_sharded': {
    'rope_parameters': _YARN,
    'num_hidden_layers': 3,
    'first_k_dense_replace': 2,
    'index_topk': 5,
  },
  # Rows of heads (40) and of [latent ; key] (120 + 16) straddle blocks of 128,
  # and most matrices end in an edge block.
  'hf_fp8': {
    'rope_parameters': _YARN,
    'hidden_size': 40,
    'num_attention_heads': 4,
    'num_key_value_heads': 4,
    'q_lora_rank': 24,
    'kv_lora_rank': 120,
    'qk_nope_head_dim': 24,
    'qk_rope_head_dim': 16,
    'intermediate_size': 144,
    'index_head_dim': 20,
    'v_head_dim': 36,
  },
  # No indexer: DeepSeek-V3's own architecture.
  'hf_v3': {'rope_parameters': _YARN},
}
SHARDED = ('hf_sharded',)


def make(name: str, path: pathlib.Path, *, seed: int = 0) -> None:
  """Writes one checkpoint and `expected.npz` beside it.

  Args:
    name: of `VARIANTS`.
    path: directory to make.
    seed: of the weights and the tokens.
  """
  torch.manual_seed(seed)
  model = build(name)
  _randomise(model)
  path.mkdir(parents=True)
  size = '30KB' if name in SHARDED else '5GB'
  if name == 'hf_fp8':
    _write_fp8(model, path)
  else:
    model.save_pretrained(path, max_shard_size=size)
  np.savez(path / 'expected.npz', **expected(model, seed=seed + 1))


def build(name: str):
  """A model of random weights."""
  sizes = _COMMON | VARIANTS[name]
  if name == 'hf_v3':
    sizes = {k: v for k, v in sizes.items() if not k.startswith('index_')}
    config = transformers.DeepseekV3Config(**sizes)
    model = transformers.DeepseekV3ForCausalLM(config)
  else:
    config = transformers.DeepseekV32Config(**sizes)
    model = transformers.DeepseekV32ForCausalLM(config)
  return model.to(torch.float32).eval()


def _randomise(model) -> None:
  """What is constant in a fresh model is random in a trained one."""
  with torch.no_grad():
    for name, value in (*model.named_parameters(), *model.named_buffers()):
      if name.endswith(('e_score_correction_bias', 'k_norm.bias')):
        value.copy_(0.1 * torch.randn_like(value))
      elif 'norm' in name and name.endswith('weight'):
        value.copy_(1 + 0.1 * torch.randn_like(value))
      elif value.ndim >= 2:
        value.mul_(3)


def expected(model, *, seed: int) -> dict[str, np.ndarray]:
  """Tokens, logits and greedy continuations."""
  torch.manual_seed(seed)
  ids = torch.randint(0, model.config.vocab_size, (2, LENGTH))
  with torch.no_grad():
    logits = model(ids, use_cache=False).logits
    greedy = ids[:, :PROMPT]
    for _ in range(NEW):
      step = model(greedy, use_cache=False).logits[:, -1]
      greedy = torch.cat([greedy, step.argmax(-1, keepdim=True)], 1)
  return {
    'input_ids': ids.numpy().astype(np.int32),
    'logits': logits.numpy(),
    'prompt_len': np.int64(PROMPT),
    'greedy_ids': greedy[:, PROMPT:].numpy().astype(np.int32),
  }


def _write_fp8(model, path: pathlib.Path) -> None:
  """Quantises as the published checkpoint is, and the model with it."""
  model.save_pretrained(path)
  file = path / 'model.safetensors'
  tensors = safetensors.torch.load_file(file)
  written = {}
  for name, value in tensors.items():
    if not _is_fp8(name):
      # Whatever is not norm or bias is bfloat16 there.
      rounded = value.to(torch.bfloat16) if value.ndim > 1 else value
      written[name] = rounded
      tensors[name] = rounded.to(torch.float32)
      continue
    quantised, scale = quantise(value)
    written[name] = quantised
    written[f'{name}_scale_inv'] = scale
    tensors[name] = dequantise(quantised, scale)
  file.unlink()
  names = sorted(written)
  # Every third to each file: most scales are not where their weight is.
  weight_map = {}
  for part in range(3):
    own = f'model-{part + 1:05d}-of-000003.safetensors'
    some = {name: written[name].contiguous() for name in names[part::3]}
    safetensors.torch.save_file(some, path / own, metadata={'format': 'pt'})
    weight_map |= dict.fromkeys(some, own)
  (path / 'model.safetensors.index.json').write_text(
    json.dumps({'metadata': {}, 'weight_map': weight_map}, indent=1)
  )
  raw = json.loads((path / 'config.json').read_text())
  raw['quantization_config'] = {
    'activation_scheme': 'dynamic',
    'fmt': 'e4m3',
    'quant_method': 'fp8',
    'scale_fmt': 'ue8m0',
    'weight_block_size': [BLOCK, BLOCK],
  }
  (path / 'config.json').write_text(json.dumps(raw, indent=2))
  load_into(model, tensors)


def load_into(model, tensors: dict) -> None:
  """Gives a model the weights of a file, experts fused as it holds them."""
  own = model.state_dict()
  for name in own:
    if name in tensors:
      own[name] = tensors[name]
      continue
    prefix, _, kind = name.rpartition('.')
    count = model.config.n_routed_experts
    parts = {
      k: torch.stack(
        [tensors[f'{prefix}.{e}.{k}_proj.weight'] for e in range(count)]
      )
      for k in ('gate', 'up', 'down')
    }
    joined = torch.cat([parts['gate'], parts['up']], 1)
    own[name] = joined if kind == 'gate_up_proj' else parts['down']
  model.load_state_dict(own)


def _is_fp8(name: str) -> bool:
  """Spec section 7: attention's and the feed-forwards' matrices."""
  if name.endswith('weights_proj.weight'):
    return False
  return name.endswith(
    ('_proj.weight', '_with_mqa.weight', '.wq_b.weight', '.wk.weight')
  )


def quantise(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
  """float8_e4m3fn and ue8m0 scales, block by block."""
  rows, columns = matrix.shape
  values = torch.empty(matrix.shape, dtype=torch.float8_e4m3fn)
  scale = torch.empty(-(-rows // BLOCK), -(-columns // BLOCK))
  for i in range(scale.shape[0]):
    for j in range(scale.shape[1]):
      at = (
        slice(i * BLOCK, (i + 1) * BLOCK),
        slice(j * BLOCK, (j + 1) * BLOCK),
      )
      amax = matrix[at].abs().max().clamp(min=1e-4).double()
      scale[i, j] = torch.exp2(torch.ceil(torch.log2(amax / E4M3_MAX)))
      values[at] = (
        (matrix[at] / scale[i, j])
        .clamp(-E4M3_MAX, E4M3_MAX)
        .to(torch.float8_e4m3fn)
      )
  return values, scale


def dequantise(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
  rows, columns = values.shape
  spread = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
  return values.to(torch.float32) * spread[:rows, :columns]


def write_fixtures(root: pathlib.Path) -> None:
  for name in VARIANTS:
    make(name, root / name)
    print(name, sum(f.stat().st_size for f in (root / name).iterdir()))


if __name__ == '__main__':
  write_fixtures(pathlib.Path(sys.argv[1]))
