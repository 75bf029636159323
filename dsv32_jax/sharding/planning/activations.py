"""Bytes that a micro-batch needs on one device beside the training state.

What a layer keeps for its backward pass is counted exactly, from the shapes of
`jax.vjp`'s residuals. What lives inside one layer is an estimate: the arrays
that the code of the layer holds at its fullest moment, added up by hand. XLA
may keep fewer, by fusing, or more, by fragmentation.

Letters: D hidden_size, H heads, X latent row width, C kv_lora_rank, N and R the
two parts of a head's query, U value width, J and I indexer heads and width, Q
q_lora_rank, K selected tokens, F expert width, V vocabulary.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsv32_jax.config.model import AttentionMode, ModelConfig
from dsv32_jax.functional.expert_exchange import Exchange
from dsv32_jax.modules.attention_core import AttentionContext
from dsv32_jax.modules.block import Block, rematted
from dsv32_jax.sharding import axes, expert_parallel
from dsv32_jax.sharding.planning.request import Request
from dsv32_jax.sharding.planning.weights import Weight
from dsv32_jax.training import optimizer, stages

# Scores of the indexer that exist at a time (pallas_kernels/topk_selector).
_SCORES = 2**28


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activations:
  """Bytes on one device.

  Attributes:
    saved_a_layer: kept for the backward pass by each layer.
    saved: by all layers.
    work: of each phase of the backward pass, that of its fullest moment.
  """

  saved_a_layer: int
  saved: int
  work: dict[str, int]

  @property
  def fullest(self) -> str:
    """The phase that needs most."""
    return max(self.work, key=lambda name: self.work[name])

  @property
  def total(self) -> int:
    """All saved, and the fullest phase."""
    return self.saved + self.work[self.fullest]


def estimate(request: Request, weights: tuple[Weight, ...]) -> Activations:
  """Activations of one micro-batch.

  Args:
    request: the layout.
    weights: of `weights.build`, for what is gathered of them.
  """
  cfg = request.model
  stage = stages.build(request.stage, cfg)
  saved = saved_a_layer(request, stage)
  layers = cfg.num_hidden_layers
  has_mtp = cfg.num_nextn_predict_layers > 0 and stage.lm_loss
  work = {'attention': _attention(request, stage)}
  if cfg.first_k_dense_replace:
    work['dense feed-forward'] = _dense_ffn(request)
  if cfg.num_moe_layers:
    work['experts'] = _experts(request)
  if stage.lm_loss:
    work['logits'] = _logits(request, heads=1 + has_mtp)
  for name in work:
    work[name] += _gathered(request, weights, name)
  return Activations(
    saved_a_layer=saved, saved=saved * (layers + has_mtp), work=work
  )


def saved_a_layer(request: Request, stage: stages.Stage) -> int:
  """Bytes that one layer keeps on one device for its backward pass."""
  cfg = request.model
  if cfg.remat != 'none':
    # Hidden widths matter where everything is kept only.
    heads = cfg.num_attention_heads // request.parallel.shards(axes.HEADS)
    cfg = dataclasses.replace(cfg, num_attention_heads=heads)
  else:
    cfg = local(request)
  per_token, key_gradient = _saved_a_token(
    cfg, stage.attention, stage.trainable
  )
  saved = per_token * request.tokens
  if key_gradient:
    # The loss gives every chunk of queries its own gradient of all the keys.
    chunks = 1
    if stage.attention.is_sparse and 0 < cfg.query_chunk < request.row_tokens:
      chunks = math.ceil(request.row_tokens / cfg.query_chunk)
    length = request.stage.data.seq_len
    keys = chunks * length - request.row_tokens
    saved += request.rows * keys * key_gradient
  return saved


def local(request: Request) -> ModelConfig:
  """The model with the heads and hidden widths that one device has."""
  cfg, parallel = request.model, request.parallel
  return dataclasses.replace(
    cfg,
    num_attention_heads=cfg.num_attention_heads // parallel.shards(axes.HEADS),
    intermediate_size=cfg.intermediate_size // parallel.shards(axes.MLP),
    moe_intermediate_size=(
      cfg.moe_intermediate_size // parallel.shards(axes.EXPERT_MLP)
    ),
  )


@functools.lru_cache(maxsize=64)
def _saved_a_token(
  cfg: ModelConfig, mode: AttentionMode, trainable: tuple[str, ...]
) -> tuple[int, int]:
  """Bytes a token, and those of them that are the indexer's key gradient.

  Everything but that gradient is linear in the tokens, so two lengths give the
  slope. A dense block keeps what an MoE block keeps, but for remat 'none',
  where more is kept than is named.
  """
  cfg = dataclasses.replace(cfg, query_chunk=0)
  use_moe = cfg.remat == 'none' and cfg.num_moe_layers > 0
  length = 2 * cfg.index_topk
  short, long = (
    _residual_bytes(cfg, mode, use_moe, n, trainable)
    for n in (length, 2 * length)
  )
  keeps_gradients = mode.indexer_kl != 'none' and cfg.remat != 'full'
  size = jnp.dtype(cfg.precision.compute).itemsize
  return (long - short) // length, keeps_gradients * size * cfg.index_head_dim


def _residual_bytes(
  cfg: ModelConfig,
  mode: AttentionMode,
  use_moe: bool,
  length: int,
  trainable: tuple[str, ...],
) -> int:
  """Bytes of what one block keeps of so many tokens, and of its parameters."""
  block = rematted(Block, cfg.remat, scanned=True)(cfg, mode, use_moe)
  dtype = jnp.dtype(cfg.precision.compute)
  h_BTD = jax.ShapeDtypeStruct((1, length, cfg.hidden_size), dtype)
  ids_BT = jax.ShapeDtypeStruct((1, length), jnp.int32)
  weight_BT = jax.ShapeDtypeStruct((1, length), jnp.float32)
  context = AttentionContext(ids_BT, ids_BT, ids_BT, weight_BT)
  variables = nn.meta.unbox(
    jax.eval_shape(
      block.init, jax.eval_shape(lambda: jax.random.key(0)), h_BTD, context
    )
  )
  frozen_model = 'main' not in trainable

  def backward(variables: Any, h_BTD: Any, context: Any) -> Any:
    flat, tree = jax.tree_util.tree_flatten_with_path(variables['params'])
    moves = [optimizer.group_of(path) in trainable for path, _ in flat]

    def forward(moving: list, h_BTD: Any) -> Any:
      values = iter(moving)
      leaves = [
        next(values) if m else leaf
        for m, (_, leaf) in zip(moves, flat, strict=True)
      ]
      params = jax.tree_util.tree_unflatten(tree, leaves)
      out, aux = block.apply({**variables, 'params': params}, h_BTD, context)
      balance = None if aux.moe is None else aux.moe.balance_loss
      kl = aux.attention.indexer_kl
      return kl if frozen_model else (out, kl, balance)

    moving = [leaf for m, (_, leaf) in zip(moves, flat, strict=True) if m]
    if frozen_model:
      return jax.vjp(lambda moving: forward(moving, h_BTD), moving)[1]
    return jax.vjp(forward, moving, h_BTD)[1]

  kept = jax.eval_shape(backward, variables, h_BTD, context)
  return sum(
    leaf.size * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(kept)
    # Positions and ranges are one for all layers.
    if leaf.shape != (1, length)
  )


def _item(request: Request) -> int:
  return jnp.dtype(request.model.precision.compute).itemsize


def _attention(request: Request, stage: stages.Stage) -> int:
  """Backward of one layer's attention: a chunk, the keys, the rest."""
  cfg, size = local(request), _item(request)
  H, X, C = cfg.num_attention_heads, cfg.latent_dim, cfg.kv_lora_rank
  J, I, D = cfg.index_n_heads, cfg.index_head_dim, cfg.hidden_size
  head, U = cfg.qk_head_dim, cfg.v_head_dim
  Q = cfg.q_lora_rank or D
  length, rows = request.stage.data.seq_len, request.rows
  chunk = request.row_tokens
  # The keys' gradients are summed in float32.
  keys = rows * length * (X + I) * (2 * size + 4 + 4)
  if stage.attention.is_sparse:
    if cfg.query_chunk:
      chunk = min(chunk, cfg.query_chunk)
    # Absorbed queries, outputs and values, each with its gradient.
    a_query = H * size * 2 * (X + C + head + U)
    # Target, student and their difference over the selected keys.
    a_query += 4 * 3 * min(cfg.index_topk, length)
    scores = min(rows * chunk * length * 4, _SCORES)
  else:
    groups = request.parallel.shards(axes.SEQUENCE)
    a_query = H * size * 2 * (head + U)
    keys += rows * length * H * (head + U) * 2 * size // min(groups, H)
    scores = 2 * _SCORES if stage.attention.indexer_kl != 'none' else 0
  # Of all queries: input, output, latents, indexer queries, with gradients.
  whole = 2 * size * (2 * D + Q + J * I) + 8 * J + 4 * cfg.index_topk
  return rows * chunk * a_query + keys + scores + request.tokens * whole


def _dense_ffn(request: Request) -> int:
  """Gate, up and product with their gradients; input and output likewise."""
  cfg = local(request)
  a_token = 6 * cfg.intermediate_size + 4 * cfg.hidden_size
  return request.tokens * a_token * _item(request)


def exchange_rows(request: Request) -> tuple[int, int]:
  """Rows that a device receives a round, and pairs of a chunk of experts."""
  cfg, parallel = request.model, request.parallel
  exchange = expert_parallel.sized(Exchange(), cfg, parallel)
  devices = parallel.shards(axes.EXPERTS)
  choices = cfg.num_experts_per_tok
  slots = exchange.slots(request.tokens, choices, devices)
  rows = slots * devices
  return rows, min(exchange.pairs(request.tokens, choices), rows * choices)


def _experts(request: Request) -> int:
  """Backward of the routed experts: what arrived, one chunk, the sums."""
  cfg, size = local(request), _item(request)
  D, F = cfg.hidden_size, cfg.moe_intermediate_size
  rows, pairs = exchange_rows(request)
  # Rows and cotangents as sent and as received, their gradient in float32.
  a_row = D * (4 * size + 4 + size)
  # A chunk's input, output and gradients; gate, up and product with theirs.
  a_pair = size * (4 * D + 6 * F)
  # Residual stream and norm with gradients, the sum over rounds in float32.
  a_token = D * (4 * size + 4)
  return rows * a_row + pairs * a_pair + request.tokens * a_token


def _logits(request: Request, *, heads: int) -> int:
  """Logits of all heads, and the gradient of one with what it is cast to."""
  cfg, parallel = request.model, request.parallel
  vocabulary = cfg.vocab_size // parallel.shards(axes.VOCAB)
  size = jnp.dtype(cfg.precision.logits).itemsize
  a_token = vocabulary * (size * (heads + 1) + _item(request))
  return request.tokens * (a_token + 4 * cfg.hidden_size * _item(request))


def _gathered(request: Request, weights: tuple[Weight, ...], phase: str) -> int:
  """Weights of one layer as they are multiplied, and their gradients.

  Those of the next layer arrive meanwhile. Routed experts' gradients are
  summed in float32 over chunks; the others have the type of the product.
  """
  size = _item(request)
  total = 0
  for weight in weights:
    if weight.is_vector or _phase(weight) != phase:
      continue
    kept = weight.cut(request.sizes) // max(
      math.prod(request.sizes[name] for name in weight.gathered(request.sizes)),
      1,
    )
    elements = weight.size // weight.layers // kept
    if weight.is_expert:
      total += elements * (2 * size + (4 + size) * weight.trains)
    else:
      total += elements * (2 * size + size * weight.trains)
  return total


def _phase(weight: Weight) -> str:
  """Where a weight is used; the MTP block's are as large as another's."""
  if 'mtp' in weight.path:
    return ''
  if weight.path[0] == 'lm_head':
    return 'logits'
  if weight.path[0] == 'embedding':
    return ''
  if 'moe' in weight.path:
    return 'experts'
  if 'ffn' in weight.path:
    return 'dense feed-forward'
  # Both stacks have attention of one size.
  return 'attention' if weight.path[0] == 'moe_layers' else ''
