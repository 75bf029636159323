"""DeepSeek Sparse Attention: MLA, the lightning indexer and the selector.

Source: arXiv:2512.02556 section 2.1 (Eq. 1-4); spec sections 3.3-3.5 and 5.

Letters: B batch, T query tokens, S key tokens, D hidden_size, H heads,
X = C + R latent row width, J indexer heads, I index_head_dim,
K selected tokens.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

import pallas_kernels
from dsv32_jax.config.model import AttentionMode, ModelConfig
from dsv32_jax.functional import attention as attention_fn
from dsv32_jax.functional import latent_cache
from dsv32_jax.modules import selectors
from dsv32_jax.modules.indexer import IndexerProjections, LightningIndexer
from dsv32_jax.modules.mla import MLAProjections, MultiHeadLatentAttention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionContext:
  """What every layer's attention needs to know about the tokens.

  Attributes:
    positions_BT: position of each token in its document (RoPE).
    key_start_BT: first valid key of each query.
    key_end_BT: one past the last valid key; equal to the start for padding.
    row_weight_BT: weight of each query's KL in L^I; sums to 1 over the batch.
    cache_length_B: tokens already cached, with a cache; else None.
  """

  positions_BT: Any
  key_start_BT: Any
  key_end_BT: Any
  row_weight_BT: Any
  cache_length_B: Any = None


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
  """

  indexer_kl: Any
  num_pairs: Any
  trace: Any = None
  cache: Any = None


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
  ) -> tuple[Float[Array, 'B T D'], AttentionAux]:
    """Attends; see `AttentionMode` for what the mode decides.

    Args:
      x_BTD: normed block input.
      context: positions and valid keys.
      cache: this layer's cache; new tokens are appended and attended to.

    Returns:
      The attention output and `AttentionAux`.

    Raises:
      ValueError: if the mode needs an indexer and the model has no q latent.
    """
    cfg, mode = self.cfg, self.mode
    needs_indexer = (
      mode.selector == 'indexer' or mode.indexer_kl != 'none' or mode.trace
    )
    if needs_indexer:
      cfg.require_indexer()
    mla = MultiHeadLatentAttention(cfg, name='mla')
    with jax.named_scope('mla_project'):
      proj = mla.project(x_BTD, context.positions_BT)
    index = None
    if proj.c_q_BTQ is not None:
      # Built in every mode, so that dense and sparse share one parameter tree;
      # XLA drops what a mode does not use.
      with jax.named_scope('lightning_indexer'):
        index = LightningIndexer(cfg, name='indexer')(
          x_BTD, proj.c_q_BTQ, context.positions_BT
        )
    latent_BSX = proj.latent_BTX
    k_index_BSI = None if index is None else index.k_index_BTI
    if cache is not None:
      assert index is not None, 'a cache holds indexer keys'
      cache = latent_cache.append(
        cache,
        proj.latent_BTX,
        index.k_index_BTI,
        start_B=context.cache_length_B,
      )
      # Else XLA fuses the write into every reader, each with its own copy.
      cache = jax.lax.optimization_barrier(cache)
      latent_BSX = cache.latent_BSX.astype(x_BTD.dtype)
      k_index_BSI = cache.k_index_BSI.astype(x_BTD.dtype)
    indices_BTK = None
    if mode.is_sparse:
      with jax.named_scope('token_selection'):
        indices_BTK = self._select(mla, proj, index, latent_BSX, k_index_BSI,
                                   context)  # fmt: skip
        indices_BTK = checkpoint_name(indices_BTK, 'selected_indices')
    with jax.named_scope('attention'):
      u_BTD, indexer_kl = self._attend(
        mla, proj, index, latent_BSX, k_index_BSI, indices_BTK, context
      )
    if indices_BTK is None:
      pairs_BT = context.key_end_BT - context.key_start_BT
    else:
      pairs_BT = jnp.sum(indices_BTK >= 0, axis=-1)
    trace = None
    if mode.trace:
      assert index is not None
      trace = AttentionTrace(
        q_BTHX=mla.queries(proj),
        k_BSHX=mla.expand(latent_BSX)[0],
        q_index_BTJI=index.q_index_BTJI,
        k_index_BSI=k_index_BSI,
        w_index_BTJ=index.w_index_BTJ,
        indices_BTK=indices_BTK,
      )
    return u_BTD, AttentionAux(
      indexer_kl=indexer_kl,
      num_pairs=jnp.sum(pairs_BT.astype(jnp.float32)),
      trace=trace,
      cache=cache,
    )

  def _select(
    self,
    mla: MultiHeadLatentAttention,
    proj: MLAProjections,
    index: IndexerProjections | None,
    latent_BSX: Array,
    k_index_BSI: Any,
    context: AttentionContext,
  ) -> Int[Array, 'B T K']:
    """S_t of Eq. 2, or the set a control would take; constants for autodiff."""
    k = min(self.cfg.index_topk, latent_BSX.shape[1])
    # The ranges are the same in every layer. In a scan over layers, JAX would
    # take what follows from them alone, the masks of all blocks of queries,
    # out of the scan and keep it: [T, S] memory. Tied to the layer's own
    # latents, they are as variable as those.
    _, *ranges = jax.lax.optimization_barrier(
      (
        jax.lax.stop_gradient(latent_BSX),
        context.key_start_BT,
        context.key_end_BT,
      )
    )
    match self.mode.selector:
      case 'indexer':
        assert index is not None
        q, keys, w = jax.lax.stop_gradient(
          (index.q_index_BTJI, k_index_BSI, index.w_index_BTJ)
        )
        return pallas_kernels.indexed_topk(
          q, keys, w, k=k, key_start_BT=ranges[0], key_end_BT=ranges[1]
        ).indices_BTK
      case 'oracle':
        q, keys = jax.lax.stop_gradient(
          (mla.queries(proj), mla.expand(latent_BSX)[0])
        )
        return selectors.oracle(q, keys, *ranges, k=k, scale=mla.scale)
      case 'window':
        return selectors.window(*ranges, k=k)
      case 'random':
        return selectors.random(
          self.make_rng('selection'), *ranges, k=k,
          num_keys=latent_BSX.shape[1],
        )  # fmt: skip
    raise ValueError(f'selector: got {self.mode.selector!r}')

  def _attend(
    self,
    mla: MultiHeadLatentAttention,
    proj: MLAProjections,
    index: IndexerProjections | None,
    latent_BSX: Array,
    k_index_BSI: Any,
    indices_BTK: Array | None,
    context: AttentionContext,
  ) -> tuple[Array, Array]:
    """Attention output and this layer's indexer loss."""
    mode = self.mode
    ranges = {
      'key_start_BT': context.key_start_BT,
      'key_end_BT': context.key_end_BT,
    }
    absorbed = mode.is_sparse if mode.absorbed is None else mode.absorbed
    v_BSHU: Any = None
    if absorbed:
      q, keys = mla.absorbed_queries(proj), latent_BSX[:, :, None, :]
    else:
      q = mla.queries(proj)
      keys, v_BSHU = mla.expand(latent_BSX)
    if indices_BTK is not None and absorbed:
      result = pallas_kernels.sparse_mla_attention(
        q,
        latent_BSX,
        indices_BTK,
        latent_dim=self.cfg.kv_lora_rank,
        scale=mla.scale,
      )
      out, lse_BTH = result.out_BTHC, result.lse_BTH
    elif indices_BTK is not None:
      out, lse_BTH = _selected_attention(
        q, keys, v_BSHU, indices_BTK, scale=mla.scale
      )
    elif absorbed:
      out, lse_BTH = _shared_key_attention(
        q, latent_BSX, latent_dim=self.cfg.kv_lora_rank, scale=mla.scale,
        **ranges,
      )  # fmt: skip
    else:
      out, lse_BTH = attention_fn.dense_attention(
        q, keys, v_BSHU, scale=mla.scale, **ranges
      )
    u_BTD = mla.absorbed_output(out) if absorbed else mla.output(out)
    indexer_kl = jnp.zeros((), jnp.float32)
    if mode.indexer_kl != 'none':
      assert index is not None
      # The target is a constant: only the indexer learns from it.
      target = jax.lax.stop_gradient((q, keys, lse_BTH))
      indexer_kl = pallas_kernels.indexer_kl(
        index.q_index_BTJI,
        k_index_BSI,
        index.w_index_BTJ,
        *target,
        context.row_weight_BT,
        scale=mla.scale,
        indices_BTK=indices_BTK,
        # A selected set says by itself which keys count.
        **(ranges if indices_BTK is None else {}),
      ).loss
    return u_BTD, indexer_kl


def _selected_attention(
  q_BTHX: Array,
  k_BSHX: Array,
  v_BSHU: Array,
  indices_BTK: Array,
  *,
  scale: float,
) -> tuple[Array, Array]:
  """MHA mode over the selected set: a mask, a chunk of queries at a time."""

  def attend(q_BtHX, indices_BtK):
    mask_BtS = pallas_kernels.indices_to_mask(indices_BtK, k_BSHX.shape[1])
    return attention_fn.masked_attention(
      q_BtHX, k_BSHX, v_BSHU, mask_BtS, scale=scale
    )

  return selectors.map_query_chunks(attend, q_BTHX, indices_BTK)


def _shared_key_attention(
  q_BTHX: Array,
  latent_BSX: Array,
  *,
  latent_dim: int,
  scale: float,
  key_start_BT: Array,
  key_end_BT: Array,
) -> tuple[Array, Array]:
  """Dense attention in MQA mode: one key head, whose values are its latents.

  The heads of a query become queries of that one head, so that no latent row
  is copied H times; and values are whole rows, of which the latent part of the
  result is kept, so that none is copied at all.
  """
  B, T, H, X = q_BTHX.shape
  keys_BS1X = latent_BSX[:, :, None, :]
  out, lse = attention_fn.dense_attention(
    q_BTHX.reshape(B, T * H, 1, X),
    keys_BS1X,
    keys_BS1X,
    scale=scale,
    key_start_BT=jnp.repeat(key_start_BT, H, axis=1),
    key_end_BT=jnp.repeat(key_end_BT, H, axis=1),
  )
  return out.reshape(B, T, H, X)[..., :latent_dim], lse.reshape(B, T, H)
