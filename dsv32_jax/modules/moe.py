"""DeepSeekMoE: sigmoid router, routed experts without dropping, shared experts.

Source: DeepSeek-V3 report (arXiv:2412.19437) Eq. 12-20; spec section 3.7.

Letters: B batch, T tokens, D hidden_size, E experts, A experts a token, F
expert width, M sorted (token, expert) rows, B T A of them on one device.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from dsv32_jax.config.model import ModelConfig
from dsv32_jax.functional import expert_dispatch, precision, routing
from dsv32_jax.functional.expert_exchange import Exchange
from dsv32_jax.functional.recorded import Recorded
from dsv32_jax.losses import load_balance
from dsv32_jax.modules.feed_forward import SwiGLU, swiglu
from dsv32_jax.modules.weights import weight
from dsv32_jax.sharding import axes, expert_parallel
from dsv32_jax.sharding.parallel import active

ROUTER_BIAS = 'router_bias'
"""Collection of the selection biases: no gradient, no optimizer, no decay."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEAux:
  """What one MoE layer reports.

  Attributes:
    expert_load_E: tokens each expert received, padding not counted.
    balance_loss: alpha times the sequence-wise balance loss, float32.
    expert_index_BTA: the experts of each token, best first, if asked for.
    mismatch: own choices against recorded ones, if these were given.
  """

  expert_load_E: Any
  balance_loss: Any
  expert_index_BTA: Any = None
  mismatch: Any = None


class Router(nn.Module):
  """Scores experts in float32 and picks them with the selection bias."""

  cfg: ModelConfig

  @nn.compact
  def __call__(
    self,
    x_BTD: Float[Array, 'B T D'],
    valid_BT: Bool[Array, 'B T'],
    recorded: Recorded | None = None,
  ) -> routing.Routing:
    cfg = self.cfg
    E = cfg.n_routed_experts
    wide = precision.accumulator(cfg.precision.param)
    w_router = weight(
      self,
      cfg,
      'w_router',
      (cfg.hidden_size, E),
      (axes.EMBED, axes.ROUTER),
      dtype=wide,
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
    # Tokens keep their dims: these may be cut over devices.
    logits_BTE = jnp.einsum('btd,de->bte', x_BTD.astype(wide), w_router)
    return routing.route(
      logits_BTE,
      bias_E,
      num_experts_per_tok=cfg.num_experts_per_tok,
      n_group=cfg.n_group,
      topk_group=cfg.topk_group,
      routed_scaling_factor=cfg.routed_scaling_factor,
      norm_topk_prob=cfg.norm_topk_prob,
      scoring_func=cfg.scoring_func,
      topk_method=cfg.topk_method,
      recorded=recorded,
      valid=valid_BT,
    )


def swiglu_experts(
  x_MD: Float[Array, 'M D'],
  weights: Sequence[Array],
  group_sizes_E: Int[Array, ' E'],
) -> Float[Array, 'M D']:
  """SwiGLU of rows sorted by expert, each with its expert's matrices."""
  w_gate, w_up, w_down = weights
  hidden_MF = swiglu(
    pallas_kernels.grouped_matmul(x_MD, w_gate, group_sizes_E),
    pallas_kernels.grouped_matmul(x_MD, w_up, group_sizes_E),
  )
  return pallas_kernels.grouped_matmul(hidden_MF, w_down, group_sizes_E)


class RoutedExperts(nn.Module):
  """SwiGLU experts on tokens sorted by expert; every token is served.

  Attributes:
    cfg: the model.
    exchange: how tokens travel where experts are on several devices.
  """

  cfg: ModelConfig
  exchange: Exchange = Exchange()

  @nn.compact
  def __call__(
    self, x_BTD: Float[Array, 'B T D'], route: routing.Routing
  ) -> Float[Array, 'B T D']:
    """Returns the gated sum over each token's experts, at least float32."""
    cfg = self.cfg
    E, D, F = cfg.n_routed_experts, cfg.hidden_size, cfg.moe_intermediate_size
    wide = (axes.EXPERTS, axes.EMBED, axes.EXPERT_MLP)
    narrow = (axes.EXPERTS, axes.EXPERT_MLP, axes.EMBED)
    w_gate = weight(self, cfg, 'w_gate', (E, D, F), wide)
    w_up = weight(self, cfg, 'w_up', (E, D, F), wide)
    w_down = weight(self, cfg, 'w_down', (E, F, D), narrow)
    weights = w_gate, w_up, w_down
    if parallel := active():
      return expert_parallel.routed_experts(
        parallel,
        swiglu_experts,
        weights,
        (wide, wide, narrow),
        x_BTD,
        route.expert_index,
        route.gate,
        exchange=expert_parallel.sized(self.exchange, cfg, parallel),
      )
    A = cfg.num_experts_per_tok
    dispatch = expert_dispatch.sort_by_expert(
      route.expert_index.reshape(-1, A), num_experts=E
    )
    x_MD = expert_dispatch.permute(x_BTD.reshape(-1, D), dispatch)
    y_MD = swiglu_experts(x_MD, weights, dispatch.group_sizes_E)
    y_ND = expert_dispatch.combine(y_MD, route.gate.reshape(-1, A), dispatch)
    return y_ND.reshape(x_BTD.shape)


class MoE(nn.Module):
  """Routed experts plus shared experts, summed in float32 (spec 3.7).

  Attributes:
    cfg: the model.
    exchange: passed to the routed experts.
    record: report which experts each token went to.
  """

  cfg: ModelConfig
  exchange: Exchange = Exchange()
  record: bool = False

  @nn.compact
  def __call__(
    self,
    x_BTD: Float[Array, 'B T D'],
    valid_BT: Bool[Array, 'B T'],
    recorded: Recorded | None = None,
  ) -> tuple[Float[Array, 'B T D'], MoEAux]:
    """Applies the layer.

    Args:
      x_BTD: normed block input.
      valid_BT: false for padding, which is routed like any token but counts
        neither for the load nor for the balance loss.
      recorded: experts to take, or to compare with.

    Returns:
      The output in the input's dtype, and `MoEAux`, of the whole batch however
      it is cut over devices.
    """
    cfg = self.cfg
    with jax.named_scope('router'):
      route = Router(cfg, name='router')(x_BTD, valid_BT, recorded)
    # Nothing orders these two, so that the compiler may compute the shared
    # experts while tokens travel.
    with jax.named_scope('routed_experts'):
      y_BTD = RoutedExperts(cfg, self.exchange, name='experts')(x_BTD, route)
    if cfg.n_shared_experts:
      with jax.named_scope('shared_experts'):
        width = cfg.n_shared_experts * cfg.moe_intermediate_size
        shared = SwiGLU(cfg, width, name='shared')(x_BTD)
        y_BTD = y_BTD + shared.astype(y_BTD.dtype)
    load_E = routing.expert_load(
      route.expert_index, valid_BT, num_experts=cfg.n_routed_experts
    )
    balance = load_balance.sequence_balance_loss(
      route.scores,
      valid_BT,
      num_experts_per_tok=cfg.num_experts_per_tok,
      alpha=cfg.balance_loss_alpha,
    )
    return y_BTD.astype(x_BTD.dtype), MoEAux(
      expert_load_E=load_E,
      balance_loss=balance,
      expert_index_BTA=route.expert_index if self.record else None,
      mismatch=route.mismatch,
    )
