"""DeepSeek Sparse Attention: MLA, the lightning indexer and the selector.

Source: arXiv:2512.02556 section 2.1 (Eq. 1-4); spec sections 3.3-3.5 and 5.

Letters: B batch, T query tokens, S key tokens, D hidden_size, H heads,
X width of a query or key, J indexer heads, I index_head_dim, K selected tokens.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv32_jax.config.model import AttentionMode, ModelConfig
from dsv32_jax.functional import latent_cache
from dsv32_jax.functional.recorded import Recorded
from dsv32_jax.modules import mla as mla_fn
from dsv32_jax.modules import remat
from dsv32_jax.modules.attention_core import (
  AttentionContext,
  AttentionCore,
  Keys,
  Queries,
)
from dsv32_jax.modules.indexer import LightningIndexer
from dsv32_jax.modules.mla import MultiHeadLatentAttention
from dsv32_jax.sharding import attention_region, zigzag


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionTrace:
  """One layer's operands, for diagnostics of the selection.

  Attributes:
    q_BTHX: MHA-mode queries.
    k_BSHX: MHA-mode keys.
    q_index_BTJI: indexer queries.
    k_index_BSI: indexer keys.
    w_index_BTJ: indexer head weights.
    indices_BTK: the selected set, or None in dense attention.
  """

  q_BTHX: Any
  k_BSHX: Any
  q_index_BTJI: Any
  k_index_BSI: Any
  w_index_BTJ: Any
  indices_BTK: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionAux:
  """What one layer's attention reports beside its output.

  Attributes:
    indexer_kl: this layer's L^I, the row-weighted sum of KL; float32.
    num_pairs: (query, key) pairs attended to, float32.
    trace: operands for diagnostics, if asked for.
    cache: the longer cache, if one was given.
    selected_BTK: the selected set, if the mode records.
    mismatch: own selections against recorded ones, if these were given.
  """

  indexer_kl: Any
  num_pairs: Any
  trace: Any = None
  cache: Any = None
  selected_BTK: Any = None
  mismatch: Any = None


class DeepSeekSparseAttention(nn.Module):
  """MLA over the tokens that a selector keeps.

  The parameters do not depend on the mode: the indexer's exist in every mode
  as soon as the model has a q latent.

  Attributes:
    cfg: the model.
    mode: dense or sparse, selector, indexer loss.
  """

  cfg: ModelConfig
  mode: AttentionMode

  @nn.compact
  def __call__(
    self,
    x_BTD: Float[Array, 'B T D'],
    context: AttentionContext,
    cache: latent_cache.LatentCache | None = None,
    recorded: Recorded | None = None,
  ) -> tuple[Float[Array, 'B T D'], AttentionAux]:
    """Attends; see `AttentionMode` for what the mode decides.

    Args:
      x_BTD: normed block input.
      context: positions and valid keys.
      cache: this layer's cache; new tokens are appended and attended to.
      recorded: keys to take, or to compare with; for a mode that selects.

    Returns:
      The attention output and `AttentionAux`.

    Raises:
      ValueError: if the mode needs an indexer and the model has no q latent, or
        a trace is asked for in zigzag order.
    """
    cfg, mode = self.cfg, self.mode
    if mode.trace and context.sequence_shards > 1:
      raise ValueError(
        f'sequence_shards: got {context.sequence_shards} with a trace, '
        'expected 1: diagnostics read tokens in natural order'
      )
    needs_indexer = (
      mode.selector == 'indexer' or mode.indexer_kl != 'none' or mode.trace
    )
    if needs_indexer:
      cfg.require_indexer()
    mla = MultiHeadLatentAttention(cfg, name='mla')
    with jax.named_scope('mla_project'):
      proj = mla.project(x_BTD, context.positions_BT)
    index = None
    if cfg.q_lora_rank is not None:
      # Built in every mode, so that dense and sparse share one parameter tree;
      # XLA drops what a mode does not use.
      with jax.named_scope('lightning_indexer'):
        index = LightningIndexer(cfg, name='indexer')(
          x_BTD, proj.q_in_BTQ, context.positions_BT
        )
    keys = Keys(proj.latent_BTX, None if index is None else index.k_index_BTI)
    if cache is not None:
      assert index is not None, 'a cache holds indexer keys'
      cache = attention_region.on_rows(
        latent_cache.append,
        cache,
        proj.latent_BTX,
        index.k_index_BTI,
        context.cache_length_B,
        context.pages_BN,
      )
      # Else XLA fuses the write into every reader, each with its own copy.
      cache = jax.lax.optimization_barrier(cache)
      keys = Keys.of_cache(cache, context.pages_BN)
    is_random = mode.selector == 'random'
    queries = Queries(
      q_in_BTQ=proj.q_in_BTQ,
      q_index_BTJI=None if index is None else index.q_index_BTJI,
      w_index_BTJ=None if index is None else index.w_index_BTJ,
      number_BT=_numbers(context) if is_random else None,
      recorded=recorded,
      context=dataclasses.replace(context, cache_length_B=None, pages_BN=None),
    )
    weights = mla.weights()
    attended = attention_region.attend(
      functools.partial(AttentionCore, cfg=cfg, mode=mode),
      weights,
      queries,
      keys,
      self.make_rng('selection') if is_random else None,
      weight_axes=mla_fn.weight_axes(cfg),
      num_heads=cfg.num_attention_heads,
      sequence_shards=context.sequence_shards,
      whole_keys=cache is not None,
      # Else the block's policy holds for the region too.
      policy=remat.policy('save_attention') if cfg.remat == 'none' else None,
    )
    trace = None
    if mode.trace:
      assert index is not None
      trace = AttentionTrace(
        q_BTHX=mla_fn.queries(
          cfg, weights, proj.q_in_BTQ, context.positions_BT
        ),
        k_BSHX=mla_fn.expand(weights, keys.latents(x_BTD.dtype))[0],
        q_index_BTJI=index.q_index_BTJI,
        k_index_BSI=keys.index_keys(x_BTD.dtype),
        w_index_BTJ=index.w_index_BTJ,
        indices_BTK=attended.indices_BTK,
      )
    return attended.u_BTD, AttentionAux(
      indexer_kl=attended.indexer_kl,
      num_pairs=attended.num_pairs,
      trace=trace,
      cache=cache,
      selected_BTK=attended.indices_BTK if mode.record else None,
      mismatch=attended.mismatch,
    )


def _numbers(context: AttentionContext) -> Int[Array, 'B T']:
  """The number of every query in its batch, in natural order."""
  B, T = context.positions_BT.shape
  number_BT = jnp.arange(B * T, dtype=jnp.int32).reshape(B, T)
  return zigzag.to_zigzag(number_BT, context.sequence_shards)
