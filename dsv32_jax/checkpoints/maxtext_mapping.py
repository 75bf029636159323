"""MaxText's DeepSeek-V3.2 parameters, array by array, in our tree.

For comparisons on equal weights (experiments/bench_maxtext.py). MaxText 0.2.5
names its arrays `decoder/<stack>/<path>`, stores every matrix as [in, ...,
out] as we do, and gives stacked arrays their layer axis at position 1. It
fuses what we keep apart: `wq_b` is [q latent, heads, nope | rope], `wkv_a`
[hidden, latent | rope] and `wkv_b` [latent, heads, nope | value].

Letters: C kv_lora_rank, N qk_nope_head_dim.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dsv32_jax.config.model import ModelConfig
from dsv32_jax.modules.transformer import DeepSeekV32

_TOP = {
  'embedding': 'token_embedder/embedding',
  'final_norm/scale': 'decoder/decoder_norm/scale',
  'lm_head': 'decoder/logits_dense/kernel',
}

# Below `<stack>/layers/` here and `decoder/<stack>/` there.
_IN_EVERY_BLOCK = {
  'attention_norm/scale': 'pre_self_attention_layer_norm/scale',
  'ffn_norm/scale': 'post_self_attention_layer_norm/scale',
  'attention/mla/w_dq': 'self_attention/wq_a/kernel',
  'attention/mla/q_norm/scale': 'self_attention/q_norm/scale',
  'attention/mla/w_uq': 'self_attention/wq_b/kernel',
  'attention/mla/w_qr': 'self_attention/wq_b/kernel',
  'attention/mla/w_dkv': 'self_attention/wkv_a/kernel',
  'attention/mla/w_kr': 'self_attention/wkv_a/kernel',
  'attention/mla/kv_norm/scale': 'self_attention/kv_norm/scale',
  'attention/mla/w_uk': 'self_attention/wkv_b/kernel',
  'attention/mla/w_uv': 'self_attention/wkv_b/kernel',
  'attention/mla/w_o': 'self_attention/out/kernel',
  'attention/indexer/w_iq': 'self_attention/indexer/wq_b/kernel',
  'attention/indexer/w_ik': 'self_attention/indexer/wk/kernel',
  'attention/indexer/k_norm/scale': 'self_attention/indexer/k_norm/scale',
  'attention/indexer/k_norm/bias': 'self_attention/indexer/k_norm/bias',
  'attention/indexer/w_iw': 'self_attention/indexer/weights_proj/kernel',
}
_FEED_FORWARD = {'w_gate': 'wi_0', 'w_up': 'wi_1', 'w_down': 'wo'}
_IN_DENSE_BLOCK = {
  f'ffn/{ours}': f'mlp/{theirs}/kernel'
  for ours, theirs in _FEED_FORWARD.items()
}
_MOE = 'DeepSeekMoeBlock_0'
_IN_MOE_BLOCK = {
  'moe/router/w_router': f'{_MOE}/MoeBlock_0/gate/kernel',
  **{
    f'moe/experts/{ours}': f'{_MOE}/MoeBlock_0/{theirs}'
    for ours, theirs in _FEED_FORWARD.items()
  },
  **{
    f'moe/shared/{ours}': f'{_MOE}/shared_experts/{theirs}/kernel'
    for ours, theirs in _FEED_FORWARD.items()
  },
}


def variables_from_arrays(
  arrays: Mapping[str, np.ndarray],
  cfg: ModelConfig,
  *,
  indexer: Literal['required', 'zeros'] = 'required',
) -> dict[str, Any]:
  """Builds our variables from MaxText's parameters.

  Args:
    arrays: by MaxText's name; every parameter of its model.
    cfg: our model of the same sizes, scanned.
    indexer: 'zeros' fills the indexers in when `arrays` has none, for a
      MaxText model built without them; then only dense attention makes sense.

  Returns:
    `params`, and the router biases as MaxText starts them: zero.

  Raises:
    ValueError: if an array is missing, left over or of another shape than the
      model's, or if `cfg` does not scan its layers.
  """
  if not cfg.scan_layers:
    raise ValueError('scan_layers: got False, expected True (stacked arrays)')
  shapes = _variable_shapes(cfg)
  expected = traverse_util.flatten_dict(shapes['params'], sep='/')
  sources = _sources(cfg)
  has_indexer = any('/indexer/' in name for name in arrays)
  params, used = {}, set()
  for name, shape in expected.items():
    source = sources[name]
    if indexer == 'zeros' and not has_indexer and '/indexer/' in source:
      params[name] = jnp.zeros(shape.shape, shape.dtype)
      continue
    if source not in arrays:
      raise ValueError(f'{source}: missing; expected it for our {name}')
    used.add(source)
    value = _transform(name, np.asarray(arrays[source]), cfg)
    if value.shape != shape.shape:
      raise ValueError(
        f'{source}: got {value.shape} for our {name}, expected {shape.shape}'
      )
    params[name] = jnp.asarray(value, shape.dtype)
  left = sorted(set(arrays) - used)
  if left:
    raise ValueError(f'{left[0]}: left over; expected {len(used)} arrays only')
  return {
    **jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes),
    'params': traverse_util.unflatten_dict(params, sep='/'),
  }


@functools.cache
def _variable_shapes(cfg: ModelConfig) -> Any:
  tokens_BT = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  init = DeepSeekV32(cfg).init
  return nn.unbox(jax.eval_shape(init, jax.random.key(0), tokens_BT))


def _sources(cfg: ModelConfig) -> dict[str, str]:
  """Our path of each parameter -> MaxText's name."""
  sources = dict(_TOP)
  stacks = []
  if cfg.first_k_dense_replace:
    stacks.append(('dense_layers', _IN_DENSE_BLOCK))
  if cfg.num_moe_layers:
    stacks.append(('moe_layers', _IN_MOE_BLOCK))
  for stack, own in stacks:
    for ours, theirs in {**_IN_EVERY_BLOCK, **own}.items():
      sources[f'{stack}/layers/{ours}'] = f'decoder/{stack}/{theirs}'
  return sources


def _transform(name: str, value: np.ndarray, cfg: ModelConfig) -> np.ndarray:
  """Layer axis to the front, then this parameter's share of a fused array."""
  if name in _TOP:
    return value
  value = np.moveaxis(value, 1, 0)
  N, C = cfg.qk_nope_head_dim, cfg.kv_lora_rank
  match name.rpartition('/')[2]:
    case 'w_uq' | 'w_uk':
      return value[..., :N]
    case 'w_qr' | 'w_uv':
      return value[..., N:]
    case 'w_dkv':
      return value[..., :C]
    case 'w_kr':
      return value[..., C:]
  return value
