"""The rotary tables of a model configuration, shared by MLA and the indexer."""

from jaxtyping import Array, Float

from dsv32_jax.config.model import ModelConfig
from dsv32_jax.functional import rotary


def inverse_frequencies(cfg: ModelConfig) -> Float[Array, ' r']:
  """Angle per position of each channel pair, YaRN included (spec 3.2)."""
  scaling = cfg.rope_scaling
  if scaling is None:
    return rotary.inverse_frequencies(
      cfg.qk_rope_head_dim, theta=cfg.rope_theta
    )
  return rotary.inverse_frequencies(
    cfg.qk_rope_head_dim,
    theta=cfg.rope_theta,
    factor=scaling.factor,
    beta_fast=scaling.beta_fast,
    beta_slow=scaling.beta_slow,
    original_max_position_embeddings=scaling.original_max_position_embeddings,
  )


def softmax_scale(cfg: ModelConfig) -> float:
  """Scale of the attention scores, YaRN's temperature included (spec 3.2)."""
  scaling = cfg.rope_scaling
  return rotary.softmax_scale(
    cfg.qk_head_dim,
    factor=None if scaling is None else scaling.factor,
    mscale_all_dim=0.0 if scaling is None else scaling.mscale_all_dim,
  )
