"""Multi-head latent attention: projections, MHA mode and MQA (absorbed) mode.

Source: DeepSeek-V2/V3 reports; arXiv:2512.02556 appendix A; spec section 3.3.

Letters: B batch, T query tokens, S key tokens, D hidden_size, H heads,
Q q_lora_rank, C kv_lora_rank, N qk_nope_head_dim, R qk_rope_head_dim,
U v_head_dim, X width of a concatenated query or key.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv32_jax.config.model import ModelConfig
from dsv32_jax.functional import rotary
from dsv32_jax.modules.norms import RMSNorm
from dsv32_jax.modules.rope import inverse_frequencies, softmax_scale
from dsv32_jax.modules.weights import weight
from dsv32_jax.sharding import axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MLAProjections:
  """What attention and the indexer read.

  Per-head queries are not here: they are H times as wide as the latents, and
  made for a chunk of queries at a time (`queries`, `absorbed_queries`).

  Attributes:
    q_in_BTQ: what queries are made of: the query latent after its norm, or the
      block input where the model has no q_lora_rank.
    positions_BT: positions of the queries.
    latent_BTX: rows [c_kv after its norm ; k_rope rotated], X = C + R.
  """

  q_in_BTQ: Any
  positions_BT: Any
  latent_BTX: Any


class MultiHeadLatentAttention(nn.Module):
  """Parameters of MLA and the maps between its two modes.

  MHA mode expands each latent into per-head keys and values; MQA (absorbed)
  mode moves `w_uk` to the queries and `w_uv` to the output, so that all heads
  share the latent rows. The two are equal in exact arithmetic.
  """

  cfg: ModelConfig

  def setup(self):
    cfg = self.cfg
    D, H = cfg.hidden_size, cfg.num_attention_heads
    C, N = cfg.kv_lora_rank, cfg.qk_nope_head_dim
    R, U = cfg.qk_rope_head_dim, cfg.v_head_dim
    if cfg.q_lora_rank is None:
      q_in, q_axis = D, axes.EMBED
    else:
      q_in, q_axis = cfg.q_lora_rank, axes.Q_LATENT
      self.w_dq = weight(self, cfg, 'w_dq', (D, q_in), (axes.EMBED, q_axis))
      self.q_norm = RMSNorm(q_in, cfg.rms_norm_eps)
    head = (axes.HEADS, axes.HEAD_DIM)
    self.w_uq = weight(self, cfg, 'w_uq', (q_in, H, N), (q_axis, *head))
    self.w_qr = weight(
      self, cfg, 'w_qr', (q_in, H, R), (q_axis, axes.HEADS, axes.ROPE_DIM)
    )
    self.w_dkv = weight(
      self, cfg, 'w_dkv', (D, C), (axes.EMBED, axes.KV_LATENT)
    )
    self.kv_norm = RMSNorm(C, cfg.rms_norm_eps)
    self.w_kr = weight(self, cfg, 'w_kr', (D, R), (axes.EMBED, axes.ROPE_DIM))
    self.w_uk = weight(self, cfg, 'w_uk', (C, H, N), (axes.KV_LATENT, *head))
    self.w_uv = weight(self, cfg, 'w_uv', (C, H, U), (axes.KV_LATENT, *head))
    self.w_o = weight(self, cfg, 'w_o', (H, U, D), (*head, axes.EMBED))

  @property
  def scale(self) -> float:
    """Softmax scale, YaRN's temperature included."""
    return softmax_scale(self.cfg)

  def project(
    self, x_BTD: Float[Array, 'B T D'], positions_BT: Int[Array, 'B T']
  ) -> MLAProjections:
    """Down-projections, and RoPE of the shared key (interleaved pairs)."""
    q_in_BTQ = x_BTD
    if self.cfg.q_lora_rank is not None:
      q_in_BTQ = self.q_norm(jnp.einsum('btd,dq->btq', x_BTD, self.w_dq))
    c_kv_BTC = self.kv_norm(jnp.einsum('btd,dc->btc', x_BTD, self.w_dkv))
    k_rope_BTR = rotary.apply(
      jnp.einsum('btd,dr->btr', x_BTD, self.w_kr),
      positions_BT,
      inverse_frequencies(self.cfg),
      interleaved=True,
    )
    return MLAProjections(
      q_in_BTQ=q_in_BTQ,
      positions_BT=positions_BT,
      latent_BTX=jnp.concatenate([c_kv_BTC, k_rope_BTR], axis=-1),
    )

  def expand(
    self, latent_BSX: Float[Array, 'B S X']
  ) -> tuple[Float[Array, 'B S H Y'], Float[Array, 'B S H U']]:
    """MHA mode: per-head keys [k_nope ; k_rope] and values of latent rows."""
    C = self.cfg.kv_lora_rank
    c_kv_BSC, k_rope_BSR = latent_BSX[..., :C], latent_BSX[..., C:]
    k_nope_BSHN = jnp.einsum('bsc,chn->bshn', c_kv_BSC, self.w_uk)
    k_rope_BSHR = jnp.broadcast_to(
      k_rope_BSR[:, :, None, :],
      (*k_nope_BSHN.shape[:3], k_rope_BSR.shape[-1]),
    )
    v_BSHU = jnp.einsum('bsc,chu->bshu', c_kv_BSC, self.w_uv)
    return jnp.concatenate([k_nope_BSHN, k_rope_BSHR], axis=-1), v_BSHU

  def queries(self, projections: MLAProjections) -> Float[Array, 'B T H Y']:
    """MHA mode: [q_nope ; q_rope]."""
    return jnp.concatenate(self._query_heads(projections), axis=-1)

  def absorbed_queries(
    self, projections: MLAProjections
  ) -> Float[Array, 'B T H X']:
    """MQA mode: [W_uk^T q_nope ; q_rope], to be dotted with latent rows."""
    q_nope_BTHN, q_rope_BTHR = self._query_heads(projections)
    q_latent_BTHC = jnp.einsum('bthn,chn->bthc', q_nope_BTHN, self.w_uk)
    return jnp.concatenate([q_latent_BTHC, q_rope_BTHR], axis=-1)

  def _query_heads(self, projections: MLAProjections) -> tuple[Array, Array]:
    """Up-projections with RoPE: the position-free and the rotated part."""
    q_in_BTQ = projections.q_in_BTQ
    q_nope_BTHN = jnp.einsum('btq,qhn->bthn', q_in_BTQ, self.w_uq)
    q_rope_BTHR = rotary.apply(
      jnp.einsum('btq,qhr->bthr', q_in_BTQ, self.w_qr),
      projections.positions_BT,
      inverse_frequencies(self.cfg),
      interleaved=True,
    )
    return q_nope_BTHN, q_rope_BTHR

  def output(self, out_BTHU: Float[Array, 'B T H U']) -> Float[Array, 'B T D']:
    """MHA mode: the output projection."""
    return jnp.einsum('bthu,hud->btd', out_BTHU, self.w_o)

  def absorbed_output(
    self, out_BTHC: Float[Array, 'B T H C']
  ) -> Float[Array, 'B T D']:
    """MQA mode: per-head values from attended latents, then the output."""
    return self.output(jnp.einsum('bthc,chu->bthu', out_BTHC, self.w_uv))
