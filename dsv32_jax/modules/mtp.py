"""Multi-token prediction, depth 1: predicts the token after the next one.

Source: DeepSeek-V3 report (arXiv:2412.19437) Eq. 21-25; spec section 3.8.

Letters: B batch, T tokens, D hidden_size.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv32_jax.config.model import AttentionMode, ModelConfig
from dsv32_jax.functional.latent_cache import LatentCache
from dsv32_jax.modules.block import Block, BlockAux, rematted
from dsv32_jax.modules.dsa import AttentionContext
from dsv32_jax.modules.norms import RMSNorm
from dsv32_jax.modules.weights import weight
from dsv32_jax.sharding import axes


class MultiTokenPrediction(nn.Module):
  """[norm(e) ; norm(h)] -> projection -> one MoE block -> its own final norm.

  The embedding half comes first, as in the released weights (the paper's
  Eq. 21 writes it second). Embedding and output head belong to the main model.
  """

  cfg: ModelConfig
  mode: AttentionMode

  @nn.compact
  def __call__(
    self,
    h_BTD: Float[Array, 'B T D'],
    next_embedding_BTD: Float[Array, 'B T D'],
    context: AttentionContext,
    cache: LatentCache | None = None,
  ) -> tuple[Float[Array, 'B T D'], BlockAux]:
    """Returns hidden states that predict t_{i+2}, and the block's report.

    Args:
      h_BTD: main model representation after its final norm.
      next_embedding_BTD: embedding of t_{i+1} at position i.
      context: as for the main model.
      cache: the block's own, for decoding.
    """
    cfg = self.cfg
    D, eps = cfg.hidden_size, cfg.rms_norm_eps
    w_eh = weight(self, cfg, 'w_eh', (2 * D, D), (axes.MTP_CONCAT, axes.EMBED))
    joined = jnp.concatenate(
      [
        RMSNorm(D, eps, name='embedding_norm')(next_embedding_BTD),
        RMSNorm(D, eps, name='hidden_norm')(h_BTD),
      ],
      axis=-1,
    )
    z_BTD = jnp.einsum('btm,md->btd', joined, w_eh)
    block = rematted(Block, cfg.remat, scanned=False)
    z_BTD, aux = block(cfg, self.mode, True, name='block')(
      z_BTD, context, cache
    )
    return RMSNorm(D, eps, name='head_norm')(z_BTD), aux
