"""One table between Hugging Face tensor names and this model's parameters.

A row of the table gives a tensor's name, the layout of its axes in the file
and, for each parameter it feeds, the path in our tree and the layout there.
Both directions and all shapes follow from the row.

Layouts are letters (`sizes` says what they measure). Axes are separated by
spaces; within an axis of the file '.' multiplies, the slower factor first, and
'+' concatenates: 'H.N+R Q' is [H * (N + R), Q], each head's N rows above its
R rows. A concatenated factor is cut into one parameter a part, in order.

Sources: spec sections 7 and 8.4; weights there are [out, in], as in torch.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from dsv32_jax.config.model import ModelConfig

PARAMS = 'params'
ROUTER_BIAS = 'router_bias'


@dataclasses.dataclass(frozen=True)
class Row:
  """One kind of tensor.

  Attributes:
    name: what follows the scope's prefix; '{expert}' stands for an index.
    layout: axes in the file.
    parts: (path, layout) of each parameter; none for a copy of a tensor that
      the model shares. With '{expert}' the parameter has a leading 'E' which
      the file's layout lacks.
    collection: flax collection of the parameters.
    when: whether a model has this tensor.
    fp8: stored as float8 with block scales in the published checkpoint.
    fp32: stored as float32 in the published checkpoint, else bfloat16.
  """

  name: str
  layout: str
  parts: tuple[tuple[str, str], ...]
  collection: str = PARAMS
  when: Callable[[ModelConfig], bool] = lambda cfg: True
  fp8: bool = False
  fp32: bool = False


def _row(name: str, layout: str, *parts: str, **options: Any) -> Row:
  """Parts are written 'path: layout'."""
  pairs = tuple(tuple(part.split(': ')) for part in parts)
  return Row(name=name, layout=layout, parts=pairs, **options)  # pyrefly: ignore


def _has_q_latent(cfg: ModelConfig) -> bool:
  return cfg.q_lora_rank is not None


def _has_shared(cfg: ModelConfig) -> bool:
  return cfg.n_shared_experts > 0


MODEL = (
  _row('embed_tokens.weight', 'V D', 'embedding: V D'),
  _row('norm.weight', 'D', 'final_norm/scale: D', fp32=True),
)
HEAD = (
  _row(
    'lm_head.weight',
    'V D',
    'lm_head: D V',
    when=lambda cfg: not cfg.tie_word_embeddings,
  ),
)
ATTENTION = (
  _row('input_layernorm.weight', 'D', 'attention_norm/scale: D', fp32=True),
  _row('post_attention_layernorm.weight', 'D', 'ffn_norm/scale: D', fp32=True),
  _row(
    'self_attn.q_proj.weight',
    'H.N+R D',
    'attention/mla/w_uq: D H N',
    'attention/mla/w_qr: D H R',
    when=lambda cfg: not _has_q_latent(cfg),
    fp8=True,
  ),
  _row(
    'self_attn.q_a_proj.weight',
    'Q D',
    'attention/mla/w_dq: D Q',
    when=_has_q_latent,
    fp8=True,
  ),
  _row(
    'self_attn.q_a_layernorm.weight',
    'Q',
    'attention/mla/q_norm/scale: Q',
    when=_has_q_latent,
    fp32=True,
  ),
  _row(
    'self_attn.q_b_proj.weight',
    'H.N+R Q',
    'attention/mla/w_uq: Q H N',
    'attention/mla/w_qr: Q H R',
    when=_has_q_latent,
    fp8=True,
  ),
  _row(
    'self_attn.kv_a_proj_with_mqa.weight',
    'C+R D',
    'attention/mla/w_dkv: D C',
    'attention/mla/w_kr: D R',
    fp8=True,
  ),
  _row(
    'self_attn.kv_a_layernorm.weight',
    'C',
    'attention/mla/kv_norm/scale: C',
    fp32=True,
  ),
  _row(
    'self_attn.kv_b_proj.weight',
    'H.N+U C',
    'attention/mla/w_uk: C H N',
    'attention/mla/w_uv: C H U',
    fp8=True,
  ),
  _row(
    'self_attn.o_proj.weight', 'D H.U', 'attention/mla/w_o: H U D', fp8=True
  ),
  # The rotated channels come first in an indexer head (spec 3.4), in the file
  # as here, so its rows stay in order.
  _row(
    'self_attn.indexer.wq_b.weight',
    'J.I Q',
    'attention/indexer/w_iq: Q J I',
    when=_has_q_latent,
    fp8=True,
  ),
  _row(
    'self_attn.indexer.wk.weight',
    'I D',
    'attention/indexer/w_ik: D I',
    when=_has_q_latent,
    fp8=True,
  ),
  _row(
    'self_attn.indexer.k_norm.weight',
    'I',
    'attention/indexer/k_norm/scale: I',
    when=_has_q_latent,
    fp32=True,
  ),
  _row(
    'self_attn.indexer.k_norm.bias',
    'I',
    'attention/indexer/k_norm/bias: I',
    when=_has_q_latent,
    fp32=True,
  ),
  _row(
    'self_attn.indexer.weights_proj.weight',
    'J D',
    'attention/indexer/w_iw: D J',
    when=_has_q_latent,
  ),
)
DENSE_FFN = (
  _row('mlp.gate_proj.weight', 'W D', 'ffn/w_gate: D W', fp8=True),
  _row('mlp.up_proj.weight', 'W D', 'ffn/w_up: D W', fp8=True),
  _row('mlp.down_proj.weight', 'D W', 'ffn/w_down: W D', fp8=True),
)
ROUTED = (
  _row(
    'mlp.experts.{expert}.gate_proj.weight',
    'F D',
    'moe/experts/w_gate: E D F',
    fp8=True,
  ),
  _row(
    'mlp.experts.{expert}.up_proj.weight',
    'F D',
    'moe/experts/w_up: E D F',
    fp8=True,
  ),
  _row(
    'mlp.experts.{expert}.down_proj.weight',
    'D F',
    'moe/experts/w_down: E F D',
    fp8=True,
  ),
)
# What transformers 5 holds in memory; `save_pretrained` writes the form above.
ROUTED_FUSED = (
  _row(
    'mlp.experts.gate_up_proj',
    'E F+F D',
    'moe/experts/w_gate: E D F',
    'moe/experts/w_up: E D F',
  ),
  _row('mlp.experts.down_proj', 'E D F', 'moe/experts/w_down: E F D'),
)
MOE = (
  _row('mlp.gate.weight', 'E D', 'moe/router/w_router: D E'),
  _row(
    'mlp.gate.e_score_correction_bias',
    'E',
    'moe/router/e_score_correction_bias: E',
    collection=ROUTER_BIAS,
    when=lambda cfg: cfg.has_router_bias,
    fp32=True,
  ),
  *(
    _row(
      f'mlp.shared_experts.{ours}_proj.weight',
      'D G' if ours == 'down' else 'G D',
      f'moe/shared/w_{ours}: ' + ('G D' if ours == 'down' else 'D G'),
      when=_has_shared,
      fp8=True,
    )
    for ours in ('gate', 'up', 'down')
  ),
)
MTP = (
  _row('enorm.weight', 'D', 'embedding_norm/scale: D', fp32=True),
  _row('hnorm.weight', 'D', 'hidden_norm/scale: D', fp32=True),
  # Columns are [embedding ; hidden], the order in which `mtp.py` joins them.
  _row('eh_proj.weight', 'D M', 'w_eh: M D'),
  _row('shared_head.norm.weight', 'D', 'head_norm/scale: D', fp32=True),
  _row('embed_tokens.weight', 'V D'),
  _row('shared_head.head.weight', 'V D'),
)


def sizes(cfg: ModelConfig) -> dict[str, int]:
  return {
    'V': cfg.vocab_size,
    'D': cfg.hidden_size,
    'H': cfg.num_attention_heads,
    'Q': cfg.q_lora_rank or 0,
    'C': cfg.kv_lora_rank,
    'N': cfg.qk_nope_head_dim,
    'R': cfg.qk_rope_head_dim,
    'U': cfg.v_head_dim,
    'J': cfg.index_n_heads,
    'I': cfg.index_head_dim,
    'W': cfg.intermediate_size,
    'E': cfg.n_routed_experts,
    'F': cfg.moe_intermediate_size,
    'G': cfg.n_shared_experts * cfg.moe_intermediate_size,
    'M': 2 * cfg.hidden_size,
  }
