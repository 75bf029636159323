"""One pre-norm decoder block: attention, then a dense FFN or MoE.

Letters: B batch, T tokens, D hidden_size, E experts.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from dsv32_jax.config.model import AttentionMode, ModelConfig
from dsv32_jax.functional.latent_cache import LatentCache
from dsv32_jax.modules import remat
from dsv32_jax.modules.attention_core import AttentionContext
from dsv32_jax.modules.dsa import DeepSeekSparseAttention
from dsv32_jax.modules.feed_forward import SwiGLU
from dsv32_jax.modules.moe import MoE
from dsv32_jax.modules.norms import RMSNorm
from dsv32_jax.modules.replay import Replay
from dsv32_jax.sharding import axes
from dsv32_jax.sharding.parallel import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockAux:
  """What one block reports; `moe` is None in dense blocks."""

  attention: Any
  moe: Any


class Block(nn.Module):
  """h += Attention(norm(h)); h += FFN(norm(h)).

  Attributes:
    cfg: the model.
    mode: passed to attention.
    use_moe: MoE instead of the dense FFN.
  """

  cfg: ModelConfig
  mode: AttentionMode
  use_moe: bool

  @nn.compact
  def __call__(
    self,
    h_BTD: Float[Array, 'B T D'],
    context: AttentionContext,
    cache: LatentCache | None = None,
    replay: Replay | None = None,
  ) -> tuple[Float[Array, 'B T D'], BlockAux]:
    cfg = self.cfg
    replay = replay or Replay()
    D, eps = cfg.hidden_size, cfg.rms_norm_eps
    u_BTD, attention_aux = DeepSeekSparseAttention(
      cfg, self.mode, name='attention'
    )(
      RMSNorm(D, eps, name='attention_norm')(h_BTD),
      context,
      cache,
      replay.selected,
    )
    h_BTD = constrain(h_BTD + u_BTD, axes.BATCH, axes.SEQUENCE, None)
    x_BTD = RMSNorm(D, eps, name='ffn_norm')(h_BTD)
    moe_aux = None
    with jax.named_scope('ffn'):
      if self.use_moe:
        valid_BT = context.key_end_BT > context.key_start_BT
        y_BTD, moe_aux = MoE(cfg, record=self.mode.record, name='moe')(
          x_BTD, valid_BT, replay.experts
        )
      else:
        y_BTD = SwiGLU(cfg, cfg.intermediate_size, name='ffn')(x_BTD)
    h_BTD = constrain(h_BTD + y_BTD, axes.BATCH, axes.SEQUENCE, None)
    return h_BTD, BlockAux(attention=attention_aux, moe=moe_aux)


def rematted(block: type[nn.Module], policy: str, *, scanned: bool):
  """Block class whose backward recomputes what `policy` does not keep.

  Args:
    block: the module class.
    policy: `ModelConfig.remat`.
    scanned: whether it runs inside a scan (then CSE cannot undo it).

  Returns:
    The class, wrapped unless the policy is 'none'.
  """
  if policy == 'none':
    return block
  return nn.remat(block, policy=remat.policy(policy), prevent_cse=not scanned)


class Stack(nn.Module):
  """Equal blocks one after the other, scanned or unrolled.

  Attributes:
    cfg: the model; `scan_layers` chooses.
    mode: passed to the blocks.
    use_moe: passed to the blocks.
    num_layers: how many.
  """

  cfg: ModelConfig
  mode: AttentionMode
  use_moe: bool
  num_layers: int

  @nn.compact
  def __call__(
    self,
    h_BTD: Float[Array, 'B T D'],
    context: AttentionContext,
    caches: tuple[LatentCache, ...] | None = None,
    replay: Replay | None = None,
  ) -> tuple[Float[Array, 'B T D'], list[BlockAux] | BlockAux]:
    """Applies the blocks.

    Args:
      h_BTD: the first one's input.
      context: for all of them.
      caches: one a block.
      replay: records with a leading dim of blocks.

    Returns:
      The hidden states and the blocks' reports: a list of them if unrolled,
      one with a leading layer axis on every leaf if scanned.
    """
    cfg = self.cfg
    block = rematted(Block, cfg.remat, scanned=cfg.scan_layers)
    if not cfg.scan_layers:
      reports = []
      for layer in range(self.num_layers):
        h_BTD, aux = block(cfg, self.mode, self.use_moe, name=f'layer_{layer}')(
          h_BTD,
          context,
          None if caches is None else caches[layer],
          None if replay is None else replay.of_layer(layer),
        )
        reports.append(aux)
      return h_BTD, reports
    scanned = nn.scan(
      block,
      variable_axes={'params': 0, 'router_bias': 0},
      split_rngs={'params': True, 'selection': True},
      # Context and caches (none here) for all, records for each.
      in_axes=(nn.broadcast, nn.broadcast, 0),
      length=self.num_layers,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    return scanned(cfg, self.mode, self.use_moe, name='layers')(
      h_BTD, context, None, replay
    )
