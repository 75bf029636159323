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
from dsv32_jax.modules import remat, selectors
from dsv32_jax.modules.indexer import LightningIndexer
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Queries:
  """What is made or given a query token; every leaf is [B, T, ...].

  Attributes:
    q_in_BTQ: what MLA's queries are made of.
    q_index_BTJI: indexer queries, or None without an indexer.
    w_index_BTJ: indexer head weights, likewise.
    context: of these queries.
  """

  q_in_BTQ: Any
  q_index_BTJI: Any
  w_index_BTJ: Any
  context: AttentionContext


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Keys:
  """What is attended to, for all queries.

  Attributes:
    latent_BSX: latent rows.
    k_index_BSI: indexer keys, or None without an indexer.
  """

  latent_BSX: Any
  k_index_BSI: Any


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
    if cfg.q_lora_rank is not None:
      # Built in every mode, so that dense and sparse share one parameter tree;
      # XLA drops what a mode does not use.
      with jax.named_scope('lightning_indexer'):
        index = LightningIndexer(cfg, name='indexer')(
          x_BTD, proj.q_in_BTQ, context.positions_BT
        )
    keys = _Keys(proj.latent_BTX, None if index is None else index.k_index_BTI)
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
      keys = _Keys(
        cache.latent_BSX.astype(x_BTD.dtype),
        cache.k_index_BSI.astype(x_BTD.dtype),
      )
    queries = _Queries(
      q_in_BTQ=proj.q_in_BTQ,
      q_index_BTJI=None if index is None else index.q_index_BTJI,
      w_index_BTJ=None if index is None else index.w_index_BTJ,
      context=dataclasses.replace(context, cache_length_B=None),
    )
    key = self.make_rng('selection') if mode.selector == 'random' else None
    in_chunks = mode.is_sparse and not mode.trace
    if in_chunks and 0 < cfg.query_chunk < x_BTD.shape[1]:
      u_BTD, indexer_kl, num_pairs = self._attend_in_chunks(
        mla, queries, keys, key
      )
      indices_BTK = None
    else:
      u_BTD, indexer_kl, num_pairs, indices_BTK = self._attend(
        mla, queries, keys, key
      )
    trace = None
    if mode.trace:
      assert index is not None
      trace = AttentionTrace(
        q_BTHX=mla.queries(proj),
        k_BSHX=mla.expand(keys.latent_BSX)[0],
        q_index_BTJI=index.q_index_BTJI,
        k_index_BSI=keys.k_index_BSI,
        w_index_BTJ=index.w_index_BTJ,
        indices_BTK=indices_BTK,
      )
    return u_BTD, AttentionAux(
      indexer_kl=indexer_kl, num_pairs=num_pairs, trace=trace, cache=cache
    )

  def _attend_in_chunks(
    self,
    mla: MultiHeadLatentAttention,
    queries: _Queries,
    keys: _Keys,
    key: Array | None,
  ) -> tuple[Float[Array, 'B T D'], Array, Array]:
    """`_attend` of `cfg.query_chunk` queries at a time, made again backward.

    Per-head queries and outputs of V3.2 are 0.28 MB a token, 36 GB for 128K
    tokens: here they are a chunk's only.
    """
    size = self.cfg.query_chunk
    B, T = queries.q_in_BTQ.shape[:2]
    dtype = keys.latent_BSX.dtype
    # The chunks' gradients of the keys are summed in the type of what the scan
    # closes over.
    keys = jax.tree.map(lambda x: x.astype(jnp.float32), keys)

    def split(x_BT: Array) -> Array:
      # Queries of the padding have an empty range of keys and weight 0.
      missing = -T % size
      x_BT = jnp.pad(x_BT, [(0, 0), (0, missing)] + [(0, 0)] * (x_BT.ndim - 2))
      return jnp.moveaxis(x_BT.reshape(B, -1, size, *x_BT.shape[2:]), 1, 0)

    def chunk(_, inputs: tuple[Array, _Queries]):
      number, queries = inputs
      u_BtD, *sums, _ = self._attend(
        mla,
        queries,
        jax.tree.map(lambda x: x.astype(dtype), keys),
        None if key is None else jax.random.fold_in(key, number),
      )
      return None, (u_BtD, *sums)

    name = self.cfg.remat if self.cfg.remat != 'none' else 'save_attention'
    chunk = jax.checkpoint(chunk, policy=remat.policy(name), prevent_cse=False)
    _, (u_NBtD, kl_N, pairs_N) = jax.lax.scan(
      chunk, None, (jnp.arange(-(-T // size)), jax.tree.map(split, queries))
    )
    u_BTD = jnp.moveaxis(u_NBtD, 0, 1).reshape(B, -1, u_NBtD.shape[-1])
    return u_BTD[:, :T], jnp.sum(kl_N), jnp.sum(pairs_N)

  def _attend(
    self,
    mla: MultiHeadLatentAttention,
    queries: _Queries,
    keys: _Keys,
    key: Array | None,
  ) -> tuple[Float[Array, 'B T D'], Array, Array, Array | None]:
    """Output, this layer's indexer loss, pairs attended to, selected set."""
    context, indices_BTK = queries.context, None
    proj = MLAProjections(
      queries.q_in_BTQ, context.positions_BT, keys.latent_BSX
    )
    if self.mode.is_sparse:
      with jax.named_scope('token_selection'):
        indices_BTK = self._select(mla, proj, queries, keys, key)
        indices_BTK = checkpoint_name(indices_BTK, 'selected_indices')
    with jax.named_scope('attention'):
      u_BTD, indexer_kl = self._attend_to(mla, proj, queries, keys, indices_BTK)
    if indices_BTK is None:
      pairs_BT = context.key_end_BT - context.key_start_BT
    else:
      pairs_BT = jnp.sum(indices_BTK >= 0, axis=-1)
    num_pairs = jnp.sum(pairs_BT.astype(jnp.float32))
    return u_BTD, indexer_kl, num_pairs, indices_BTK

  def _select(
    self,
    mla: MultiHeadLatentAttention,
    proj: MLAProjections,
    queries: _Queries,
    keys: _Keys,
    key: Array | None,
  ) -> Int[Array, 'B T K']:
    """S_t of Eq. 2, or the set a control would take; constants for autodiff."""
    num_keys = keys.latent_BSX.shape[1]
    k = min(self.cfg.index_topk, num_keys)
    # The ranges are the same in every layer. In a scan over layers, JAX would
    # take what follows from them alone, the masks of all blocks of queries,
    # out of the scan and keep it: [T, S] memory. Tied to the layer's own
    # latents, they are as variable as those.
    _, *ranges = jax.lax.optimization_barrier(
      (
        jax.lax.stop_gradient(keys.latent_BSX),
        queries.context.key_start_BT,
        queries.context.key_end_BT,
      )
    )
    match self.mode.selector:
      case 'indexer':
        q, k_index_BSI, w = jax.lax.stop_gradient(
          (queries.q_index_BTJI, keys.k_index_BSI, queries.w_index_BTJ)
        )
        return pallas_kernels.indexed_topk(
          q, k_index_BSI, w, k=k, key_start_BT=ranges[0], key_end_BT=ranges[1]
        ).indices_BTK
      case 'oracle':
        q, k_BSHX = jax.lax.stop_gradient(
          (mla.queries(proj), mla.expand(keys.latent_BSX)[0])
        )
        return selectors.oracle(q, k_BSHX, *ranges, k=k, scale=mla.scale)
      case 'window':
        return selectors.window(*ranges, k=k)
      case 'random':
        assert key is not None
        return selectors.random(key, *ranges, k=k, num_keys=num_keys)
    raise ValueError(f'selector: got {self.mode.selector!r}')

  def _attend_to(
    self,
    mla: MultiHeadLatentAttention,
    proj: MLAProjections,
    queries: _Queries,
    keys: _Keys,
    indices_BTK: Array | None,
  ) -> tuple[Array, Array]:
    """Attention output and this layer's indexer loss."""
    mode, context = self.mode, queries.context
    ranges = {
      'key_start_BT': context.key_start_BT,
      'key_end_BT': context.key_end_BT,
    }
    absorbed = mode.is_sparse if mode.absorbed is None else mode.absorbed
    v_BSHU: Any = None
    if absorbed:
      q, k = mla.absorbed_queries(proj), keys.latent_BSX[:, :, None, :]
    else:
      q = mla.queries(proj)
      k, v_BSHU = mla.expand(keys.latent_BSX)
    if indices_BTK is not None and absorbed:
      result = pallas_kernels.sparse_mla_attention(
        q,
        keys.latent_BSX,
        indices_BTK,
        latent_dim=self.cfg.kv_lora_rank,
        scale=mla.scale,
      )
      out, lse_BTH = result.out_BTHC, result.lse_BTH
    elif indices_BTK is not None:
      out, lse_BTH = _selected_attention(
        q, k, v_BSHU, indices_BTK, scale=mla.scale
      )
    elif absorbed:
      out, lse_BTH = _shared_key_attention(
        q, keys.latent_BSX, latent_dim=self.cfg.kv_lora_rank, scale=mla.scale,
        **ranges,
      )  # fmt: skip
    else:
      out, lse_BTH = attention_fn.dense_attention(
        q, k, v_BSHU, scale=mla.scale, **ranges
      )
    u_BTD = mla.absorbed_output(out) if absorbed else mla.output(out)
    indexer_kl = jnp.zeros((), jnp.float32)
    if mode.indexer_kl != 'none':
      # The target is a constant: only the indexer learns from it.
      target = jax.lax.stop_gradient((q, k, lse_BTH))
      indexer_kl = pallas_kernels.indexer_kl(
        queries.q_index_BTJI,
        keys.k_index_BSI,
        queries.w_index_BTJ,
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
