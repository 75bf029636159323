"""Multi-head latent attention: projections, MHA mode and MQA (absorbed) mode.

Source: DeepSeek-V2/V3 reports; arXiv:2512.02556 appendix A; spec section 3.3.

Letters: B batch, T query tokens, S key tokens, D hidden_size, H heads,
Q q_lora_rank, C kv_lora_rank, N qk_nope_head_dim, R qk_rope_head_dim,
U v_head_dim, X width of a concatenated query or key, Y of one in MHA mode.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv32_jax.config.model import ModelConfig
from dsv32_jax.functional import quantization, rotary
from dsv32_jax.modules.norms import RMSNorm
from dsv32_jax.modules.rope import inverse_frequencies
from dsv32_jax.modules.weights import product, weight
from dsv32_jax.sharding import axes

_LATENT_BLOCK = 128
"""Latents that share a scale in float8 (spec 3.3)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MLAProjections:
  """What attention and the indexer read.

  Per-head queries are not here: they are H times as wide as the latents, and
  made for a chunk of queries at a time (`queries`, `absorbed_queries`).

  Attributes:
    q_in_BTQ: what queries are made of: the query latent after its norm, or the
      block input where the model has no q_lora_rank.
    latent_BTX: rows [c_kv after its norm ; k_rope rotated], X = C + R.
  """

  q_in_BTQ: Any
  latent_BTX: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MLAWeights:
  """The matrices that have heads, in the type they are multiplied in.

  All that is made with them is a function of this file, so attention can run on
  any share of the heads.

  Attributes:
    w_uq: [Q, H, N].
    w_qr: [Q, H, R].
    w_uk: [C, H, N].
    w_uv: [C, H, U].
    w_o: [H, U, D].
  """

  w_uq: Any
  w_qr: Any
  w_uk: Any
  w_uv: Any
  w_o: Any


def weight_axes(cfg: ModelConfig) -> MLAWeights:
  """The logical axes of the matrices that have heads."""
  q_axis = axes.EMBED if cfg.q_lora_rank is None else axes.Q_LATENT
  head = (axes.HEADS, axes.HEAD_DIM)
  return MLAWeights(
    w_uq=(q_axis, *head),
    w_qr=(q_axis, axes.HEADS, axes.ROPE_DIM),
    w_uk=(axes.KV_LATENT, *head),
    w_uv=(axes.KV_LATENT, *head),
    w_o=(*head, axes.EMBED),
  )


class MultiHeadLatentAttention(nn.Module):
  """Parameters of MLA and its down-projections."""

  cfg: ModelConfig

  def setup(self):
    cfg = self.cfg
    D, H = cfg.hidden_size, cfg.num_attention_heads
    C, N = cfg.kv_lora_rank, cfg.qk_nope_head_dim
    R, U = cfg.qk_rope_head_dim, cfg.v_head_dim
    Q = D if cfg.q_lora_rank is None else cfg.q_lora_rank
    if cfg.q_lora_rank is not None:
      self.w_dq = weight(self, cfg, 'w_dq', (D, Q), (axes.EMBED, axes.Q_LATENT))
      self.q_norm = RMSNorm(Q, cfg.rms_norm_eps)
    over = weight_axes(cfg)
    self.w_uq = weight(self, cfg, 'w_uq', (Q, H, N), over.w_uq)
    self.w_qr = weight(self, cfg, 'w_qr', (Q, H, R), over.w_qr)
    self.w_dkv = weight(
      self, cfg, 'w_dkv', (D, C), (axes.EMBED, axes.KV_LATENT)
    )
    self.kv_norm = RMSNorm(C, cfg.rms_norm_eps)
    self.w_kr = weight(self, cfg, 'w_kr', (D, R), (axes.EMBED, axes.ROPE_DIM))
    self.w_uk = weight(self, cfg, 'w_uk', (C, H, N), over.w_uk)
    self.w_uv = weight(self, cfg, 'w_uv', (C, H, U), over.w_uv)
    self.w_o = weight(self, cfg, 'w_o', (H, U, D), over.w_o)

  def weights(self) -> MLAWeights:
    """The matrices of all heads."""
    return MLAWeights(self.w_uq, self.w_qr, self.w_uk, self.w_uv, self.w_o)

  def project(
    self, x_BTD: Float[Array, 'B T D'], positions_BT: Int[Array, 'B T']
  ) -> MLAProjections:
    """Down-projections, and RoPE of the shared key (interleaved pairs)."""
    q_in_BTQ = x_BTD
    if self.cfg.q_lora_rank is not None:
      q_in_BTQ = self.q_norm(product('btd,dq->btq', x_BTD, self.w_dq))
    c_kv_BTC = self.kv_norm(product('btd,dc->btc', x_BTD, self.w_dkv))
    if self.cfg.latent_fp8:
      c_kv_BTC = quantization.fake_quantize(c_kv_BTC, block=(_LATENT_BLOCK,))
    k_rope_BTR = rotary.apply(
      product('btd,dr->btr', x_BTD, self.w_kr),
      positions_BT,
      inverse_frequencies(self.cfg),
      interleaved=True,
    )
    return MLAProjections(
      q_in_BTQ=q_in_BTQ,
      latent_BTX=jnp.concatenate([c_kv_BTC, k_rope_BTR], axis=-1),
    )


# MHA mode expands each latent into per-head keys and values; MQA (absorbed)
# mode moves w_uk to the queries and w_uv to the output, so that all heads share
# the latent rows. The two are equal in exact arithmetic.


def expand(
  weights: MLAWeights, latent_BSX: Float[Array, 'B S X']
) -> tuple[Float[Array, 'B S H Y'], Float[Array, 'B S H U']]:
  """MHA mode: per-head keys [k_nope ; k_rope] and values of latent rows."""
  C = weights.w_uk.shape[0]
  c_kv_BSC, k_rope_BSR = latent_BSX[..., :C], latent_BSX[..., C:]
  k_nope_BSHN = jnp.einsum('bsc,chn->bshn', c_kv_BSC, weights.w_uk)
  k_rope_BSHR = jnp.broadcast_to(
    k_rope_BSR[:, :, None, :],
    (*k_nope_BSHN.shape[:3], k_rope_BSR.shape[-1]),
  )
  v_BSHU = jnp.einsum('bsc,chu->bshu', c_kv_BSC, weights.w_uv)
  return jnp.concatenate([k_nope_BSHN, k_rope_BSHR], axis=-1), v_BSHU


def queries(
  cfg: ModelConfig,
  weights: MLAWeights,
  q_in_BTQ: Float[Array, 'B T Q'],
  positions_BT: Int[Array, 'B T'],
) -> Float[Array, 'B T H Y']:
  """MHA mode: [q_nope ; q_rope]."""
  heads = _query_heads(cfg, weights, q_in_BTQ, positions_BT)
  return jnp.concatenate(heads, axis=-1)


def absorbed_queries(
  cfg: ModelConfig,
  weights: MLAWeights,
  q_in_BTQ: Float[Array, 'B T Q'],
  positions_BT: Int[Array, 'B T'],
) -> Float[Array, 'B T H X']:
  """MQA mode: [W_uk^T q_nope ; q_rope], to be dotted with latent rows."""
  q_nope_BTHN, q_rope_BTHR = _query_heads(cfg, weights, q_in_BTQ, positions_BT)
  q_latent_BTHC = jnp.einsum('bthn,chn->bthc', q_nope_BTHN, weights.w_uk)
  return jnp.concatenate([q_latent_BTHC, q_rope_BTHR], axis=-1)


def _query_heads(
  cfg: ModelConfig, weights: MLAWeights, q_in_BTQ: Array, positions_BT: Array
) -> tuple[Array, Array]:
  """Up-projections with RoPE: the position-free and the rotated part."""
  q_nope_BTHN = product('btq,qhn->bthn', q_in_BTQ, weights.w_uq)
  q_rope_BTHR = rotary.apply(
    product('btq,qhr->bthr', q_in_BTQ, weights.w_qr),
    positions_BT,
    inverse_frequencies(cfg),
    interleaved=True,
  )
  return q_nope_BTHN, q_rope_BTHR


def output(
  weights: MLAWeights, out_BTHU: Float[Array, 'B T H U']
) -> Float[Array, 'B T D']:
  """MHA mode: the output projection, summed over the heads there are."""
  return product('bthu,hud->btd', out_BTHU, weights.w_o)


def absorbed_output(
  weights: MLAWeights, out_BTHC: Float[Array, 'B T H C']
) -> Float[Array, 'B T D']:
  """MQA mode: per-head values from attended latents, then the output."""
  out_BTHU = jnp.einsum('bthc,chu->bthu', out_BTHC, weights.w_uv)
  return output(weights, out_BTHU)
