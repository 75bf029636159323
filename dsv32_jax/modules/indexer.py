"""The lightning indexer's queries, keys and head weights.

Source: arXiv:2512.02556 Eq. 1; spec section 3.4.

Letters: B batch, T tokens, D hidden_size, Q q_lora_rank, J indexer heads,
I index_head_dim, R rotated channels (the first of I).
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv32_jax.config.model import ModelConfig
from dsv32_jax.functional import quantization, rotary
from dsv32_jax.modules.norms import LayerNorm
from dsv32_jax.modules.rope import inverse_frequencies
from dsv32_jax.modules.weights import product, weight
from dsv32_jax.sharding import axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IndexerProjections:
  """Operands of the index score I[t,s] = sum_j w[t,j] ReLU(q[t,j] . k[s]).

  Attributes:
    q_index_BTJI: queries, compute dtype.
    k_index_BTI: keys, one a token for all indexer heads.
    w_index_BTJ: head weights, float32, scaled by J^-1/2 I^-1/2.
  """

  q_index_BTJI: Any
  k_index_BTI: Any
  w_index_BTJ: Any


class LightningIndexer(nn.Module):
  """Makes the operands of the index score from detached inputs."""

  cfg: ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: Float[Array, 'B T D'],
    c_q_BTQ: Float[Array, 'B T Q'],
    positions_BT: Int[Array, 'B T'],
  ) -> IndexerProjections:
    """Projects the normed block input and the normed query latent."""
    cfg = self.cfg
    J, I = cfg.index_n_heads, cfg.index_head_dim
    # "we detach the indexer input from the computational graph for separate
    # optimization" (arXiv:2512.02556, section 2.1): the KL never reaches the
    # main model, in either stage.
    x_BTD = jax.lax.stop_gradient(x_BTD)
    c_q_BTQ = jax.lax.stop_gradient(c_q_BTQ)
    w_iq = weight(
      self,
      cfg,
      'w_iq',
      (c_q_BTQ.shape[-1], J, I),
      (axes.Q_LATENT, axes.INDEX_HEADS, axes.INDEX_DIM),
    )
    w_ik = weight(
      self,
      cfg,
      'w_ik',
      (cfg.hidden_size, I),
      (axes.EMBED, axes.INDEX_DIM),
    )
    # float32 weight and input: a bfloat16 product raises the tie count (spec
    # section 9, item 5).
    w_iw = weight(
      self,
      cfg,
      'w_iw',
      (cfg.hidden_size, J),
      (axes.EMBED, axes.INDEX_HEADS),
      dtype=jnp.float32,
    )
    q_BTJI = product('btq,qji->btji', c_q_BTQ, w_iq)
    k_BTI = LayerNorm(I, name='k_norm')(product('btd,di->bti', x_BTD, w_ik))
    q_BTJI = self._rotate(q_BTJI, positions_BT)
    k_BTI = self._rotate(k_BTI, positions_BT)
    if cfg.index_hadamard:
      q_BTJI = quantization.hadamard_rotation(q_BTJI)
      k_BTI = quantization.hadamard_rotation(k_BTI)
    if cfg.index_fp8:
      # After the rotation, which is there to spread what would be cut off.
      q_BTJI = quantization.fake_quantize(q_BTJI, block=(I,))
      k_BTI = quantization.fake_quantize(k_BTI, block=(I,))
    w_BTJ = jnp.einsum('btd,dj->btj', x_BTD.astype(jnp.float32), w_iw)
    return IndexerProjections(
      q_index_BTJI=q_BTJI,
      k_index_BTI=k_BTI,
      w_index_BTJ=w_BTJ * (J**-0.5 * I**-0.5),
    )

  def _rotate(self, x: Array, positions_BT: Array) -> Array:
    # [rope | nope]: the rotated channels come first here, last in MLA, and
    # pair up half-split here, interleaved in MLA (spec section 9, items 1-3).
    R = self.cfg.qk_rope_head_dim
    rotated = rotary.apply(
      x[..., :R],
      positions_BT,
      inverse_frequencies(self.cfg),
      interleaved=self.cfg.indexer_rope_interleave,
    )
    return jnp.concatenate([rotated, x[..., R:]], axis=-1)
