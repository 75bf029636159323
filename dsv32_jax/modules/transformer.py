"""The DeepSeek-V3.2 language model.

embed -> dense blocks -> MoE blocks -> norm -> logits, and the MTP module.

Letters: B batch, T tokens, D hidden_size, V vocabulary, L layers, E experts.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv32_jax.config.model import SPARSE, AttentionMode, ModelConfig
from dsv32_jax.functional import masking
from dsv32_jax.functional.latent_cache import LatentCache
from dsv32_jax.modules import replay as replay_lib
from dsv32_jax.modules.attention_core import AttentionContext
from dsv32_jax.modules.block import BlockAux, Stack
from dsv32_jax.modules.mtp import MultiTokenPrediction
from dsv32_jax.modules.norms import RMSNorm
from dsv32_jax.modules.replay import Replay
from dsv32_jax.modules.weights import weight
from dsv32_jax.sharding import axes, embedding_region
from dsv32_jax.sharding.parallel import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelOutput:
  """Everything one forward pass gives.

  Per-layer values run over the main layers in order, then the MTP block if it
  ran. Layers without experts have no row in the expert arrays.

  Attributes:
    logits_BTV: next-token logits, or None if not asked for.
    hidden_BTD: hidden states after the final norm.
    mtp_logits_BTV: logits for the token after the next, or None.
    indexer_kl_L: each layer's indexer loss L^I; zeros if not asked for.
    num_pairs_L: (query, key) pairs that each layer attended to.
    balance_loss_L: each MoE layer's balance loss.
    expert_load_LE: tokens each expert of each MoE layer received.
    trace_L: per-layer `AttentionTrace`, or None.
    caches: the longer caches, if caches were given.
    expert_index_LBTA: chosen experts of each MoE layer, if the mode records.
    selected_LBTK: selected keys of each layer, if the mode records.
    routing_mismatch_L: a `Mismatch` of each MoE layer's own choices and the
      replayed ones, or None.
    selection_mismatch_L: likewise of each layer's selections.
  """

  logits_BTV: Any
  hidden_BTD: Any
  mtp_logits_BTV: Any
  indexer_kl_L: Any
  num_pairs_L: Any
  balance_loss_L: Any
  expert_load_LE: Any
  trace_L: Any = None
  caches: Any = None
  expert_index_LBTA: Any = None
  selected_LBTK: Any = None
  routing_mismatch_L: Any = None
  selection_mismatch_L: Any = None


class DeepSeekV32(nn.Module):
  """DeepSeek-V3.2: MLA with DeepSeek Sparse Attention, and DeepSeekMoE.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from dsv32_jax import DeepSeekV32, presets
    >>> model = DeepSeekV32(presets.tiny())
    >>> tokens_BT = jnp.zeros((1, 8), jnp.int32)
    >>> variables = model.init(jax.random.key(0), tokens_BT)
    >>> model.apply(variables, tokens_BT).logits_BTV.shape
    (1, 8, 512)

  Attributes:
    cfg: the architecture.
  """

  cfg: ModelConfig

  @nn.compact
  def __call__(
    self,
    tokens_BT: Int[Array, 'B T'],
    *,
    segment_ids_BT: Int[Array, 'B T'] | None = None,
    positions_BT: Int[Array, 'B T'] | None = None,
    attention: AttentionMode = SPARSE,
    compute_logits: bool = True,
    compute_mtp: bool = False,
    indexer_row_weight_BT: Float[Array, 'B T'] | None = None,
    caches: tuple[LatentCache, ...] | None = None,
    cache_length_B: Int[Array, ' B'] | None = None,
    pages_BN: Int[Array, 'B N'] | None = None,
    sequence_shards: int = 1,
    key_range_BT: tuple[Int[Array, 'B T'], Int[Array, 'B T']] | None = None,
    next_tokens_BT: Int[Array, 'B T'] | None = None,
    replay: Replay | None = None,
  ) -> ModelOutput:
    """Runs the model.

    Args:
      tokens_BT: token ids.
      segment_ids_BT: document of each token, 1 and up in contiguous runs; 0 is
        padding. None: one document a row.
      positions_BT: position in its document; None counts from each document's
        start (from the cached length with a cache).
      attention: which tokens are attended to; static.
      compute_logits: False skips the output head (dense warm-up).
      compute_mtp: also run the MTP module, if the model has one.
      indexer_row_weight_BT: weight of each query's KL; None is the mean over
        the batch's valid queries.
      caches: one `LatentCache` a layer; needs scan_layers=False.
      cache_length_B: tokens in each row's cache; required with `caches`.
      pages_BN: the pages of each row, where the caches are pools of pages.
      sequence_shards: tokens, and all that is given or returned for them, are
        in zigzag order over so many shards (`sharding.zigzag`); 1 is natural
        order. Static.
      key_range_BT: first valid key of each query and one past the last, keys
        counted in natural order, for tokens in any order; in place of
        `segment_ids_BT`.
      next_tokens_BT: the token after each one, for MTP; None reads it from
        `tokens_BT`.
      replay: recorded experts and selections of the main layers, in the order
        of the tokens, to take or to compare with; the MTP module chooses for
        itself.

    Returns:
      A `ModelOutput`.

    Raises:
      ValueError: for a mode that needs an indexer on a model without a q
        latent, for caches on a scanned model, in zigzag order for what cannot
        be told from the tokens and is missing, and for records that do not fit
        the model and the tokens, or come with caches.
    """
    cfg = self.cfg
    if replay is not None:
      if caches is not None:
        raise ValueError(
          'replay: got records with caches, expected whole sequences'
        )
      replay.check(cfg, attention, *tokens_BT.shape)
    compute_mtp = compute_mtp and cfg.num_nextn_predict_layers > 0
    if caches is not None and cfg.scan_layers:
      raise ValueError(
        'caches: got caches with scan_layers=True, expected an unrolled model; '
        'dsv32_jax.inference converts model and variables'
      )
    if sequence_shards > 1:
      _check_zigzag(
        tokens_BT,
        sequence_shards,
        has_caches=caches is not None,
        needed={
          'positions_BT': positions_BT,
          'key_range_BT': key_range_BT,
          **({'next_tokens_BT': next_tokens_BT} if compute_mtp else {}),
        },
      )
    context = attention_context(
      tokens_BT,
      segment_ids_BT=segment_ids_BT,
      positions_BT=positions_BT,
      key_range_BT=key_range_BT,
      row_weight_BT=indexer_row_weight_BT,
      cache_length_B=cache_length_B if caches is not None else None,
      pages_BN=pages_BN,
      sequence_shards=sequence_shards,
    )
    embedding_VD = weight(
      self,
      cfg,
      'embedding',
      (cfg.vocab_size, cfg.hidden_size),
      (axes.VOCAB, axes.EMBED),
    )
    with jax.named_scope('embed'):
      h_BTD = _embed(embedding_VD, tokens_BT)
    reports: list[BlockAux] = []
    num_dense = cfg.first_k_dense_replace
    for name, use_moe, first, num_layers in (
      ('dense_layers', False, 0, num_dense),
      ('moe_layers', True, num_dense, cfg.num_moe_layers),
    ):
      if num_layers:
        own = None if caches is None else caches[first : first + num_layers]
        records = replay and replay.of_layers(first, num_layers, num_dense)
        h_BTD, aux = Stack(cfg, attention, use_moe, num_layers, name=name)(
          h_BTD, context, own, records
        )
        reports += _with_layer_axis(aux)
    h_BTD = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, name='final_norm')(h_BTD)
    if cfg.tie_word_embeddings:
      w_head = embedding_VD.T
    else:
      w_head = weight(
        self,
        cfg,
        'lm_head',
        (cfg.hidden_size, cfg.vocab_size),
        (axes.EMBED, axes.VOCAB),
      )

    def head(x_BTD: Array) -> Array:
      return _head(cfg, w_head, x_BTD)

    mtp_logits_BTV = None
    has_mtp = cfg.num_nextn_predict_layers > 0
    if compute_mtp or (has_mtp and self.is_initializing()):
      if next_tokens_BT is None:
        next_tokens_BT = jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)))
      with jax.named_scope('mtp'):
        mtp_BTD, aux = MultiTokenPrediction(cfg, attention, name='mtp')(
          h_BTD, _embed(embedding_VD, next_tokens_BT), context
        )
      reports += _with_layer_axis([aux])
      if compute_logits:
        mtp_logits_BTV = head(mtp_BTD)
    return ModelOutput(
      logits_BTV=head(h_BTD) if compute_logits else None,
      hidden_BTD=h_BTD,
      mtp_logits_BTV=mtp_logits_BTV,
      indexer_kl_L=_over_layers(reports, lambda r: r.attention.indexer_kl),
      num_pairs_L=_over_layers(reports, lambda r: r.attention.num_pairs),
      balance_loss_L=_over_layers(
        reports, lambda r: r.moe and r.moe.balance_loss
      ),
      expert_load_LE=_over_layers(
        reports, lambda r: r.moe and r.moe.expert_load_E, width=cfg
      ),
      trace_L=_layer_list(reports, lambda r: r.attention.trace),
      caches=_layer_list(reports, lambda r: r.attention.cache),
      expert_index_LBTA=_recorded(
        reports, lambda r: r.moe and r.moe.expert_index_BTA
      ),
      selected_LBTK=_recorded(reports, lambda r: r.attention.selected_BTK),
      routing_mismatch_L=replay_lib.stacked(
        r.moe and r.moe.mismatch for r in reports
      ),
      selection_mismatch_L=replay_lib.stacked(
        r.attention.mismatch for r in reports
      ),
    )


def logits_of(
  cfg: ModelConfig, params: Mapping[str, Any], hidden_BTD: Array
) -> Float[Array, 'B T V']:
  """The output head alone, for hidden states after a final norm.

  Decoding takes the logits of few of the tokens that it runs, and the MTP
  module's hidden states go through the same head.

  Args:
    cfg: the model.
    params: its parameters, unboxed.
    hidden_BTD: `ModelOutput.hidden_BTD`, or some of its tokens.
  """
  w_head = (
    params['embedding'].T if cfg.tie_word_embeddings else params['lm_head']
  )
  return _head(cfg, w_head.astype(cfg.precision.compute), hidden_BTD)


def embeddings_of(
  cfg: ModelConfig, params: Mapping[str, Any], tokens_BT: Array
) -> Float[Array, 'B T D']:
  """Rows of the embedding, in the type that the model computes in."""
  return _embed(params['embedding'].astype(cfg.precision.compute), tokens_BT)


def _head(cfg: ModelConfig, w_head: Array, x_BTD: Array) -> Array:
  with jax.named_scope('lm_head'):
    logits_BTV = jnp.einsum(
      'btd,dv->btv', x_BTD, w_head, preferred_element_type=jnp.float32
    )
    logits_BTV = logits_BTV.astype(cfg.precision.logits)
    return constrain(logits_BTV, axes.BATCH, axes.SEQUENCE, axes.VOCAB)


def _embed(embedding_VD: Array, tokens_BT: Array) -> Array:
  h_BTD = embedding_region.lookup(embedding_VD, tokens_BT)
  return constrain(h_BTD, axes.BATCH, axes.SEQUENCE, None)


def _check_zigzag(
  tokens_BT: Array,
  sequence_shards: int,
  *,
  has_caches: bool,
  needed: dict[str, Any],
) -> None:
  """Refuses zigzag order where something cannot be told from the tokens."""
  missing = [name for name, value in needed.items() if value is None]
  if missing:
    raise ValueError(
      f'sequence_shards: got {sequence_shards} without '
      f'{" and ".join(missing)}, which cannot be read off tokens in zigzag '
      'order'
    )
  if has_caches:
    raise ValueError(
      f'sequence_shards: got {sequence_shards} with caches, expected 1: caches '
      'are in natural order'
    )
  length = tokens_BT.shape[1]
  if length % (2 * sequence_shards):
    raise ValueError(
      f'sequence_shards: got {sequence_shards} for rows of {length} tokens, '
      f'expected a multiple of {2 * sequence_shards} tokens'
    )


def attention_context(
  tokens_BT: Array,
  *,
  segment_ids_BT: Array | None = None,
  positions_BT: Array | None = None,
  key_range_BT: tuple[Array, Array] | None = None,
  row_weight_BT: Array | None = None,
  cache_length_B: Array | None = None,
  pages_BN: Array | None = None,
  sequence_shards: int = 1,
) -> AttentionContext:
  """Fills in positions, valid keys and KL weights that were not given."""
  B, T = tokens_BT.shape
  if cache_length_B is not None:
    if positions_BT is None:
      positions_BT = cache_length_B[:, None] + jnp.arange(T)[None, :]
    start_BT = jnp.zeros_like(positions_BT)
    end_BT = positions_BT + 1
  else:
    if key_range_BT is None:
      if segment_ids_BT is None:
        segment_ids_BT = jnp.ones((B, T), jnp.int32)
      key_range_BT = masking.key_ranges(segment_ids_BT)
    start_BT, end_BT = key_range_BT
    if positions_BT is None:
      positions_BT = jnp.maximum(end_BT - 1 - start_BT, 0)
  if row_weight_BT is None:
    valid_BT = (end_BT > start_BT).astype(jnp.float32)
    row_weight_BT = valid_BT / jnp.maximum(jnp.sum(valid_BT), 1.0)
  given = (positions_BT, start_BT, end_BT, row_weight_BT)
  return AttentionContext(
    *(constrain(x_BT, axes.BATCH, axes.SEQUENCE) for x_BT in given),
    cache_length_B=cache_length_B,
    pages_BN=pages_BN,
    sequence_shards=sequence_shards,
  )


def _with_layer_axis(aux: list[BlockAux] | BlockAux) -> list[BlockAux]:
  """Reports whose every leaf has a leading layer axis.

  Unrolled layers keep a report each, of one layer: stacking them would copy
  their caches on every decode step.
  """
  if isinstance(aux, BlockAux):
    return [aux]
  return [jax.tree.map(lambda leaf: leaf[None], report) for report in aux]


def _over_layers(
  reports: list[BlockAux], read: Any, width: Any = None
) -> Array:
  """Joins one value of every stack along the layer axis, skipping None."""
  parts = [part for part in map(read, reports) if part is not None]
  if not parts:
    shape = (0,) if width is None else (0, width.n_routed_experts)
    return jnp.zeros(shape, jnp.float32 if width is None else jnp.int32)
  return jnp.concatenate(parts, axis=0)


def _recorded(reports: list[BlockAux], read: Any) -> Array | None:
  """Joins one value of every stack along the layer axis, if there is any."""
  parts = [part for part in map(read, reports) if part is not None]
  return jnp.concatenate(parts, axis=0) if parts else None


def _layer_list(reports: list[BlockAux], read: Any) -> tuple | None:
  """Un-stacks one value of every stack into a tuple over layers."""
  parts = [part for part in map(read, reports) if part is not None]
  if not parts:
    return None
  layers = []
  for part in parts:
    count = jax.tree.leaves(part)[0].shape[0]
    layers += [
      jax.tree.map(lambda leaf, i=i: leaf[i], part) for i in range(count)
    ]
  return tuple(layers)
