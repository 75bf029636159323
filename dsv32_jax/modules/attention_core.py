"""Sparse and dense latent attention as pure functions of arrays.

`sharding.attention_region` runs `AttentionCore` on whole arrays or on shares of
the rows, of the queries and of the heads. No parameter is made here, and only
sums over heads that are not all here concern other devices.

Source: arXiv:2512.02556 section 2.1 (Eq. 1-4); spec sections 3.3-3.5 and 5.

Letters: B batch, T query tokens, S key tokens, D hidden_size, H heads,
X = C + R latent row width, J indexer heads, I index_head_dim, K selected
tokens, G groups of heads.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

import pallas_kernels
from dsv32_jax.config.model import AttentionMode, ModelConfig
from dsv32_jax.functional import attention as attention_fn
from dsv32_jax.functional import latent_cache
from dsv32_jax.functional import recorded as recorded_lib
from dsv32_jax.modules import mla, remat, selectors
from dsv32_jax.modules.mla import MLAWeights
from dsv32_jax.modules.rope import softmax_scale
from dsv32_jax.sharding import axes
from dsv32_jax.sharding.attention_region import Attended

_FEW_QUERIES = 4
"""Of a request, up to which dense attention is a kernel's for decoding."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionContext:
  """What every layer's attention needs to know about the tokens.

  Attributes:
    positions_BT: position of each token in its document (RoPE).
    key_start_BT: first valid key of each query, counted in natural order.
    key_end_BT: one past the last valid key; equal to the start for padding.
    row_weight_BT: weight of each query's KL in L^I; sums to 1 over the batch.
    cache_length_B: tokens already cached, with a cache; else None.
    pages_BN: pages of each request's cache, in order; None without pages.
    sequence_shards: tokens are in zigzag order over so many shards
      (`sharding.zigzag`); 1 is natural order. Static.
  """

  positions_BT: Any
  key_start_BT: Any
  key_end_BT: Any
  row_weight_BT: Any
  cache_length_B: Any = None
  pages_BN: Any = None
  sequence_shards: int = dataclasses.field(default=1, metadata={'static': True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queries:
  """What is made or given a query token; every leaf is [B, T, ...].

  Attributes:
    q_in_BTQ: what MLA's queries are made of.
    q_index_BTJI: indexer queries, or None without an indexer.
    w_index_BTJ: indexer head weights, likewise.
    number_BT: number of the query among all of the batch, in natural order;
      needed by the random selector only, else None.
    context: of these queries.
    recorded: keys that were selected before, or None.
  """

  q_in_BTQ: Any
  q_index_BTJI: Any
  w_index_BTJ: Any
  number_BT: Any
  context: AttentionContext
  recorded: recorded_lib.Recorded | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Keys:
  """What is attended to, for all queries, in natural order.

  Of a cache it is what `functional.latent_cache` keeps, in its formats: with
  pages every array but the last is a pool of them, [A, O, ...].

  Attributes:
    latent_BSX: latent rows.
    k_index_BSI: indexer keys, or None without an indexer.
    k_scale_BS: scales of 8-bit indexer keys, else None.
    pages_BN: the pages that make up each row, or None without pages.
    cached: whether these are a cache's, which nothing is differentiated by.
  """

  latent_BSX: Any
  k_index_BSI: Any
  k_scale_BS: Any = None
  pages_BN: Any = None
  cached: bool = dataclasses.field(default=False, metadata={'static': True})

  @classmethod
  def of_cache(
    cls, cache: latent_cache.LatentCache, pages_BN: Array | None
  ) -> 'Keys':
    return cls(
      cache.latent_AOX, cache.k_index_AOI, cache.k_scale_AO, pages_BN, True
    )

  @property
  def num_keys(self) -> int:
    """S."""
    size = self.latent_BSX.shape[1]
    return size if self.pages_BN is None else size * self.pages_BN.shape[1]

  def latents(self, dtype: Any) -> Float[Array, 'B S X']:
    """Every row's latents, in order, in a type to compute with."""
    return latent_cache.latent_rows(self.latent_BSX, self.pages_BN, dtype)

  def index_keys(self, dtype: Any) -> Float[Array, 'B S I']:
    """Every row's indexer keys, likewise."""
    return latent_cache.index_keys(
      self.k_index_BSI, self.k_scale_BS, self.pages_BN, dtype
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCore:
  """The computation of one layer on whatever share of it is here.

  Attributes:
    cfg: the model.
    mode: dense or sparse, selector, indexer loss.
    head_axis: mesh axes that the heads are cut over, inside a `jax.shard_map`.
    sequence_parts: parts that the queries are cut into. Keys are S = T times
      as many then, and per-head keys are made for one group of heads out of as
      many at a time.
  """

  cfg: ModelConfig
  mode: AttentionMode
  head_axis: tuple[str, ...] | None = None
  sequence_parts: int = 1

  def __call__(
    self,
    weights: MLAWeights,
    queries: Queries,
    keys: Keys,
    key: Array | None,
  ) -> Attended:
    """Selects, attends and compares the indexer with the attention.

    Args:
      weights: of the heads that are here.
      queries: of the rows and tokens that are here.
      keys: of those rows.
      key: seeds the random selector.
    """
    cfg, mode = self.cfg, self.mode
    in_chunks = mode.is_sparse and not mode.trace
    if in_chunks and 0 < cfg.query_chunk < queries.q_in_BTQ.shape[1]:
      return self._attend_in_chunks(weights, queries, keys, key)
    return self._attend(weights, queries, keys, key)

  def _attend_in_chunks(
    self,
    weights: MLAWeights,
    queries: Queries,
    keys: Keys,
    key: Array | None,
  ) -> Attended:
    """`_attend` of `cfg.query_chunk` queries at a time, made again backward.

    Per-head queries and outputs of V3.2 are 0.28 MB a token, 36 GB for 128K
    tokens: here they are a chunk's only.
    """
    size = self.cfg.query_chunk
    B, T = queries.q_in_BTQ.shape[:2]
    types = jax.tree.map(lambda x: x.dtype, keys)
    if not keys.cached:
      # The chunks' gradients of the keys are summed in the type of what the
      # scan closes over.
      keys = jax.tree.map(lambda x: x.astype(jnp.float32), keys)

    def split(x_BT: Array) -> Array:
      # Queries of the padding have an empty range of keys and weight 0.
      missing = -T % size
      x_BT = jnp.pad(x_BT, [(0, 0), (0, missing)] + [(0, 0)] * (x_BT.ndim - 2))
      return jnp.moveaxis(x_BT.reshape(B, -1, size, *x_BT.shape[2:]), 1, 0)

    def chunk(_, queries: Queries):
      narrow = jax.tree.map(lambda x, t: x.astype(t), keys, types)
      attended = self._attend(weights, queries, narrow, key)
      if not self.mode.record:
        attended = dataclasses.replace(attended, indices_BTK=None)
      return None, attended

    _, chunks = jax.lax.scan(
      self._rematted(chunk), None, jax.tree.map(split, queries)
    )

    def join(x_NBt: Array) -> Array:
      x_BT = jnp.moveaxis(x_NBt, 0, 1)
      return x_BT.reshape(B, -1, *x_BT.shape[3:])[:, :T]

    return Attended(
      join(chunks.u_BTD),
      jnp.sum(chunks.indexer_kl),
      jnp.sum(chunks.num_pairs),
      join(chunks.indices_BTK) if self.mode.record else None,
      jax.tree.map(jnp.sum, chunks.mismatch),
    )

  def _rematted(self, step: Callable) -> Callable:
    """The step of a scan, made again backward but for what is named."""
    name = self.cfg.remat if self.cfg.remat != 'none' else 'save_attention'
    return jax.checkpoint(step, policy=remat.policy(name), prevent_cse=False)

  def _attend(
    self,
    weights: MLAWeights,
    queries: Queries,
    keys: Keys,
    key: Array | None,
  ) -> Attended:
    context, indices_BTK, mismatch = queries.context, None, None
    if self.mode.is_sparse:
      with jax.named_scope('token_selection'):
        indices_BTK, mismatch = self._selected(weights, queries, keys, key)
        indices_BTK = checkpoint_name(indices_BTK, 'selected_indices')
    with jax.named_scope('attention'):
      u_BTD, indexer_kl = self._attend_to(weights, queries, keys, indices_BTK)
    if indices_BTK is None:
      pairs_BT = context.key_end_BT - context.key_start_BT
    else:
      pairs_BT = jnp.sum(indices_BTK >= 0, axis=-1)
    num_pairs = jnp.sum(pairs_BT.astype(jnp.float32))
    return Attended(u_BTD, indexer_kl, num_pairs, indices_BTK, mismatch)

  def _selected(
    self,
    weights: MLAWeights,
    queries: Queries,
    keys: Keys,
    key: Array | None,
  ) -> tuple[Int[Array, 'B T K'], recorded_lib.Mismatch | None]:
    """The keys to attend to: the selector's, or those of a record."""
    recorded, own_BTK = queries.recorded, None
    if recorded is None:
      return self._select(weights, queries, keys, key), None
    if recorded.needs_own:
      own_BTK = self._select(weights, queries, keys, key)
    context = queries.context
    return recorded_lib.replayed(
      own_BTK, recorded, context.key_end_BT > context.key_start_BT
    )

  def _select(
    self,
    weights: MLAWeights,
    queries: Queries,
    keys: Keys,
    key: Array | None,
  ) -> Int[Array, 'B T K']:
    """S_t of Eq. 2, or the set a control would take; constants for autodiff."""
    num_keys = keys.num_keys
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
          q,
          k_index_BSI,
          w,
          k=k,
          key_start_BT=ranges[0],
          key_end_BT=ranges[1],
          k_scale_BS=keys.k_scale_BS,
          pages_BN=keys.pages_BN,
          scale_format=latent_cache.SCALE_FORMAT,
        ).indices_BTK
      case 'oracle':
        q, k_BSHX = jax.lax.stop_gradient(
          (
            self._queries(mla.queries, weights, queries),
            mla.expand(weights, keys.latents(weights.w_uk.dtype))[0],
          )
        )
        return selectors.oracle(
          q,
          k_BSHX,
          *ranges,
          k=k,
          scale=softmax_scale(self.cfg),
          head_axis=self.head_axis,
        )
      case 'window':
        return selectors.window(*ranges, k=k)
      case 'random':
        assert key is not None
        return selectors.random(
          key, *ranges, k=k, num_keys=num_keys, number_BT=queries.number_BT
        )
    raise ValueError(f'selector: got {self.mode.selector!r}')

  def _queries(
    self, make: Callable, weights: MLAWeights, queries: Queries
  ) -> Float[Array, 'B T H X']:
    return make(
      self.cfg, weights, queries.q_in_BTQ, queries.context.positions_BT
    )

  def _attend_to(
    self,
    weights: MLAWeights,
    queries: Queries,
    keys: Keys,
    indices_BTK: Array | None,
  ) -> tuple[Array, Array]:
    """Attention output and this layer's indexer loss."""
    context = queries.context
    ranges = {
      'key_start_BT': context.key_start_BT,
      'key_end_BT': context.key_end_BT,
    }
    u_BTD, target = self._attention(weights, queries, keys, indices_BTK, ranges)
    indexer_kl = jnp.zeros((), jnp.float32)
    if self.mode.indexer_kl != 'none':
      indexer_kl = pallas_kernels.indexer_kl(
        queries.q_index_BTJI,
        keys.k_index_BSI,
        queries.w_index_BTJ,
        # The target is a constant: only the indexer learns from it.
        *jax.lax.stop_gradient(target),
        context.row_weight_BT,
        scale=softmax_scale(self.cfg),
        indices_BTK=indices_BTK,
        # A selected set says by itself which keys count.
        **(ranges if indices_BTK is None else {}),
        head_axis=self.head_axis,
      ).loss
    return u_BTD, indexer_kl

  def _attention(
    self,
    weights: MLAWeights,
    queries: Queries,
    keys: Keys,
    indices_BTK: Array | None,
    ranges: dict[str, Any],
  ) -> tuple[Array, tuple[Array, Array, Array]]:
    """Output; queries, keys and normalisers that the indexer's target is of."""
    mode, scale = self.mode, softmax_scale(self.cfg)
    absorbed = mode.is_sparse if mode.absorbed is None else mode.absorbed
    if absorbed:
      q = self._queries(mla.absorbed_queries, weights, queries)
      if indices_BTK is None:
        out, lse_BTH = _all_latents(
          q, keys, latent_dim=self.cfg.kv_lora_rank, scale=scale, **ranges
        )
      else:
        out, lse_BTH = _selected_latents(
          q, keys, indices_BTK, latent_dim=self.cfg.kv_lora_rank, scale=scale
        )
      u_BTD = mla.absorbed_output(weights, out)
      return u_BTD, (q, keys.latent_BSX[:, :, None, :], lse_BTH)
    if indices_BTK is None and self.sequence_parts > 1:
      u_BTD, lse_BTH = self._dense_in_head_groups(weights, queries, keys)
      # The keys of a head are gone by now: the same scores from latents.
      q = self._queries(mla.absorbed_queries, weights, queries)
      return u_BTD, (q, keys.latent_BSX[:, :, None, :], lse_BTH)
    q = self._queries(mla.queries, weights, queries)
    k, v = mla.expand(weights, keys.latents(q.dtype))
    if indices_BTK is None:
      out, lse_BTH = attention_fn.dense_attention(
        q, k, v, scale=scale, **ranges
      )
    else:
      out, lse_BTH = _selected_attention(q, k, v, indices_BTK, scale=scale)
    return mla.output(weights, out), (q, k, lse_BTH)

  def _dense_in_head_groups(
    self, weights: MLAWeights, queries: Queries, keys: Keys
  ) -> tuple[Float[Array, 'B T D'], Float[Array, 'B T H']]:
    """Dense attention in MHA mode, keys of a group of heads at a time.

    The keys of all tokens and all heads would be as large here as on a single
    device. A group's are as large as the queries of all heads.
    """
    B, T = queries.q_in_BTQ.shape[:2]
    H = weights.w_o.shape[0]
    num_groups = max(
      n for n in range(1, min(H, self.sequence_parts) + 1) if H % n == 0
    )
    dtype = keys.latent_BSX.dtype
    # What the scan closes over has its gradients summed in its type.
    wide = (queries.q_in_BTQ, keys.latent_BSX)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), wide)

    def split(x: Array, logical: tuple[str, ...]) -> Array:
      dim = logical.index(axes.HEADS)
      x = x.reshape(*x.shape[:dim], num_groups, -1, *x.shape[dim + 1 :])
      return jnp.moveaxis(x, dim, 0)

    def group(u_BTD: Array, weights: MLAWeights):
      q_in_BTQ, latent_BSX = jax.tree.map(lambda x: x.astype(dtype), wide)
      k_BSHX, v_BSHU = mla.expand(weights, latent_BSX)
      out_BTHU, lse_BTH = attention_fn.dense_attention(
        mla.queries(self.cfg, weights, q_in_BTQ, queries.context.positions_BT),
        k_BSHX,
        v_BSHU,
        scale=softmax_scale(self.cfg),
        key_start_BT=queries.context.key_start_BT,
        key_end_BT=queries.context.key_end_BT,
      )
      share_BTD = mla.output(weights, out_BTHU)
      return u_BTD + share_BTD.astype(jnp.float32), lse_BTH

    u_BTD, lse_GBTh = jax.lax.scan(
      self._rematted(group),
      jnp.zeros((B, T, weights.w_o.shape[-1]), jnp.float32),
      jax.tree.map(split, weights, mla.weight_axes(self.cfg)),
    )
    lse_BTH = jnp.moveaxis(lse_GBTh, 0, 2).reshape(B, T, H)
    return u_BTD.astype(dtype), lse_BTH


def _all_latents(
  q_BTHX: Array, keys: Keys, *, latent_dim: int, **options: Any
) -> tuple[Array, Array]:
  """Dense attention in MQA mode."""
  if not keys.cached or q_BTHX.shape[1] > _FEW_QUERIES:
    return _shared_key_attention(
      q_BTHX, keys.latents(q_BTHX.dtype), latent_dim=latent_dim, **options
    )
  rows, pages_BN = keys.latent_BSX, keys.pages_BN
  if rows.dtype != q_BTHX.dtype:
    rows, pages_BN = keys.latents(q_BTHX.dtype), None
  result = pallas_kernels.dense_mla_decode(
    q_BTHX, rows, latent_dim=latent_dim, pages_BN=pages_BN, **options
  )
  return result.out_BTHC, result.lse_BTH


def _selected_latents(
  q_BTHX: Array,
  keys: Keys,
  indices_BTK: Array,
  *,
  latent_dim: int,
  scale: float,
) -> tuple[Array, Array]:
  """MQA mode over the selected set, read from wherever the rows are."""
  rows = keys.latent_BSX
  B, T, H, X = q_BTHX.shape
  q = q_BTHX
  if keys.pages_BN is not None:
    # All pages are one long row then, and all queries are its own.
    indices_BTK = pallas_kernels.physical_indices(
      indices_BTK, keys.pages_BN, page=rows.shape[1]
    ).reshape(1, B * T, -1)
    rows = rows.reshape(1, -1, rows.shape[-1])
    q = q.reshape(1, B * T, H, X)
  if rows.dtype == jnp.uint8:
    result = pallas_kernels.sparse_mla_attention_fp8_cache(
      q, rows, indices_BTK, scale=scale
    )
  else:
    result = pallas_kernels.sparse_mla_attention(
      q, rows.astype(q.dtype), indices_BTK, latent_dim=latent_dim, scale=scale
    )
  return (
    result.out_BTHC.reshape(B, T, H, latent_dim),
    result.lse_BTH.reshape(B, T, H),
  )


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
