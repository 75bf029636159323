"""DeepSeekMoE: sigmoid router, routed experts without dropping, shared experts.

Source: DeepSeek-V3 report (arXiv:2412.19437) Eq. 12-20; spec section 3.7.

Letters: B batch, T tokens, N = B * T, D hidden_size, E experts, A experts a
token, F expert width, M = N * A sorted (token, expert) rows.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

import pallas_kernels
from dsv32_jax.config.model import ModelConfig
from dsv32_jax.functional import expert_dispatch, routing
from dsv32_jax.losses import load_balance
from dsv32_jax.modules.feed_forward import SwiGLU, swiglu
from dsv32_jax.modules.weights import weight
from dsv32_jax.sharding import axes

ROUTER_BIAS = 'router_bias'
"""Collection of the selection biases: no gradient, no optimizer, no decay."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEAux:
  """What one MoE layer reports.

  Attributes:
    expert_load_E: tokens each expert received, padding not counted.
    balance_loss: alpha times the sequence-wise balance loss, float32.
  """

  expert_load_E: Any
  balance_loss: Any


class Router(nn.Module):
  """Scores experts in float32 and picks them with the selection bias."""

  cfg: ModelConfig

  @nn.compact
  def __call__(self, x_ND: Float[Array, 'N D']) -> routing.Routing:
    cfg = self.cfg
    E = cfg.n_routed_experts
    w_router = weight(
      self,
      cfg,
      'w_router',
      (cfg.hidden_size, E),
      (axes.EMBED, axes.ROUTER),
      dtype='float32',
    )
    bias_E = None
    if cfg.has_router_bias:
      bias_E = self.variable(
        ROUTER_BIAS,
        'e_score_correction_bias',
        nn.with_logical_partitioning(
          lambda: jnp.zeros((E,), jnp.float32), (axes.ROUTER,)
        ),
      ).value
    logits_NE = jnp.einsum('nd,de->ne', x_ND.astype(jnp.float32), w_router)
    return routing.route(
      logits_NE,
      bias_E,
      num_experts_per_tok=cfg.num_experts_per_tok,
      n_group=cfg.n_group,
      topk_group=cfg.topk_group,
      routed_scaling_factor=cfg.routed_scaling_factor,
      norm_topk_prob=cfg.norm_topk_prob,
      scoring_func=cfg.scoring_func,
      topk_method=cfg.topk_method,
    )


class RoutedExperts(nn.Module):
  """SwiGLU experts on tokens sorted by expert; every token is served."""

  cfg: ModelConfig

  @nn.compact
  def __call__(
    self, x_ND: Float[Array, 'N D'], route: routing.Routing
  ) -> Float[Array, 'N D']:
    """Returns the gated sum over each token's experts, float32."""
    cfg = self.cfg
    E, D, F = cfg.n_routed_experts, cfg.hidden_size, cfg.moe_intermediate_size
    wide = (axes.EXPERTS, axes.EMBED, axes.EXPERT_MLP)
    narrow = (axes.EXPERTS, axes.EXPERT_MLP, axes.EMBED)
    w_gate = weight(self, cfg, 'w_gate', (E, D, F), wide)
    w_up = weight(self, cfg, 'w_up', (E, D, F), wide)
    w_down = weight(self, cfg, 'w_down', (E, F, D), narrow)
    dispatch = expert_dispatch.sort_by_expert(
      route.expert_index_NA, num_experts=E
    )
    sizes_E = dispatch.group_sizes_E
    x_MD = expert_dispatch.permute(x_ND, dispatch)
    hidden_MF = swiglu(
      pallas_kernels.grouped_matmul(x_MD, w_gate, sizes_E),
      pallas_kernels.grouped_matmul(x_MD, w_up, sizes_E),
    )
    y_MD = pallas_kernels.grouped_matmul(hidden_MF, w_down, sizes_E)
    return expert_dispatch.combine(y_MD, route.gate_NA, dispatch)


class MoE(nn.Module):
  """Routed experts plus shared experts, summed in float32 (spec 3.7)."""

  cfg: ModelConfig

  @nn.compact
  def __call__(
    self, x_BTD: Float[Array, 'B T D'], valid_BT: Bool[Array, 'B T']
  ) -> tuple[Float[Array, 'B T D'], MoEAux]:
    """Applies the layer.

    Args:
      x_BTD: normed block input.
      valid_BT: false for padding, which is routed like any token but counts
        neither for the load nor for the balance loss.

    Returns:
      The output in the input's dtype, and `MoEAux`.
    """
    cfg = self.cfg
    B, T, D = x_BTD.shape
    x_ND = x_BTD.reshape(B * T, D)
    with jax.named_scope('router'):
      route = Router(cfg, name='router')(x_ND)
    with jax.named_scope('routed_experts'):
      y_ND = RoutedExperts(cfg, name='experts')(x_ND, route)
    y_BTD = y_ND.reshape(B, T, D).astype(jnp.float32)
    if cfg.n_shared_experts:
      with jax.named_scope('shared_experts'):
        width = cfg.n_shared_experts * cfg.moe_intermediate_size
        shared = SwiGLU(cfg, width, name='shared')(x_BTD)
        y_BTD = y_BTD + shared.astype(jnp.float32)
    load_E = routing.expert_load(
      route.expert_index_NA,
      valid_BT.reshape(B * T),
      num_experts=cfg.n_routed_experts,
    )
    balance = load_balance.sequence_balance_loss(
      route.scores_NE.reshape(B, T, -1),
      valid_BT,
      num_experts_per_tok=cfg.num_experts_per_tok,
      alpha=cfg.balance_loss_alpha,
    )
    return y_BTD.astype(x_BTD.dtype), MoEAux(
      expert_load_E=load_E, balance_loss=balance
    )
