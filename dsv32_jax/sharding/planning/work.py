"""Work of a training step on one device, by the kernel that does it.

Pairs of queries and keys are those of `evaluation.flops`; a product of [m, k]
and [k, n] is 2 m k n. Backward passes, and what remat makes again, count as
they are run; `model_flops` counts the model's own alone. Causal work is equal
on all devices: sequences are cut in zigzag order.

Letters: D hidden_size, Q q_lora_rank, C kv_lora_rank, X latent row width, H
heads here, N and R the parts of a head's query, U value width, J and I indexer
heads and width, V vocabulary, A experts a token, F expert width here.
"""

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp

from dsv32_jax.evaluation import flops
from dsv32_jax.sharding import axes
from dsv32_jax.sharding.planning import activations, hardware
from dsv32_jax.sharding.planning.request import Request
from dsv32_jax.training import stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """One part of a step on one device.

  Attributes:
    part: for the reader.
    rate: what bounds it: a name of `hardware.RATES`, or of
      `hardware.BYTE_RATES` for parts bound by memory.
    amount: FLOPs or bytes a step.
  """

  part: str
  rate: str
  amount: float | int

  @property
  def seconds(self) -> float:
    """At the measured rate."""
    rates = {**hardware.RATES, **hardware.BYTE_RATES}
    return self.amount / rates[self.rate]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passes:
  """How often the parts of a layer run in a micro-batch.

  Attributes:
    block: forward passes of a block, but for what follows.
    heads: forward passes of its attention: a chunk of queries is made again
      inside of a block that is made again.
    losses: forward passes of the indexer's loss.
    backward: backward passes.
  """

  block: int
  heads: int
  losses: int
  backward: int


def passes(request: Request, stage: stages.Stage) -> Passes:
  """What a remat policy makes again; selections are kept by all of them."""
  cfg = request.model
  trains = int('main' in stage.trainable)
  again = cfg.remat != 'none'
  if cfg.remat != 'full':
    return Passes(block=1 + again * trains, heads=1, losses=1, backward=trains)
  if not trains:
    # The loss is made again from the attention's normalisers; nothing else is.
    return Passes(block=1, heads=2, losses=2, backward=0)
  if stage.attention.is_sparse:
    inner = 0 < cfg.query_chunk < request.row_tokens
  else:
    inner = request.parallel.shards(axes.SEQUENCE) > 1
  return Passes(block=2, heads=2 + inner, losses=2, backward=1)


def step(request: Request, state_bytes: int) -> list[Work]:
  """All work of a step on one device.

  Args:
    request: the layout.
    state_bytes: of what the update reads and writes: parameters that train,
      their gradients and moments.
  """
  stage = stages.build(request.stage, request.model)
  cfg = request.model
  mtp = int(cfg.num_nextn_predict_layers > 0)
  layers = cfg.num_hidden_layers + mtp
  parts = [
    dataclasses.replace(part, amount=part.amount * layers)
    for part in _attention(request, stage)
  ]
  parts += _feed_forward(request, stage)
  parts += _head(request, stage)
  micro = request.stage.micro_batches
  parts = [
    dataclasses.replace(part, amount=part.amount * micro) for part in parts
  ]
  # Read and written once; the gradients' norm reads them once more.
  parts.append(Work(part='optimizer', rate='memory', amount=2.25 * state_bytes))
  return [part for part in parts if part.amount]


def model_flops(request: Request) -> float:
  """The model's own FLOPs of a step on one device: nothing counts twice."""
  plain = dataclasses.replace(
    request, model=dataclasses.replace(request.model, remat='none')
  )
  return sum(
    part.amount
    for part in step(plain, 0)
    if part.rate in hardware.RATES
    # The experts' region always computes its products again.
  ) - _experts_again(plain)


def _experts_again(request: Request) -> float:
  stage = stages.build(request.stage, request.model)
  trains = 'main' in stage.trainable
  return trains * _expert_products(request) * request.stage.micro_batches


def _attention(request: Request, stage: stages.Stage) -> Iterator[Work]:
  """One layer's attention, indexer and indexer loss, a micro-batch."""
  cfg = activations.local(request)
  D, Q = cfg.hidden_size, cfg.q_lora_rank or cfg.hidden_size
  H, X, C = cfg.num_attention_heads, cfg.latent_dim, cfg.kv_lora_rank
  J, I, U = cfg.index_n_heads, cfg.index_head_dim, cfg.v_head_dim
  tokens, times = request.tokens, passes(request, stage)
  length = request.stage.data.seq_len
  cost = flops.attention_cost(cfg, length)
  is_sparse = stage.attention.is_sparse
  pairs = cost.sparse_pairs if is_sparse else cost.dense_pairs
  pairs *= tokens / length
  down = D * (Q + X) + Q * J * I + D * (I + J)
  yield Work(
    part='down-projections and indexer projections',
    rate='matmul',
    amount=2 * tokens * down * (times.block + 2 * times.backward),
  )
  # Every part of a sequence expands all of its keys where keys have heads.
  keys = 1 if is_sparse else request.parallel.shards(axes.SEQUENCE)
  heads = H * (Q * cfg.qk_head_dim + U * D)
  heads += H * C * (cfg.qk_nope_head_dim + U) * keys
  yield Work(
    part='projections of heads',
    rate='matmul',
    amount=2 * tokens * heads * (times.heads + 2 * times.backward),
  )
  if is_sparse:
    yield Work(
      part='attention',
      rate='sparse_forward',
      amount=2 * pairs * H * (X + C) * times.heads,
    )
    yield Work(
      part='attention, backward',
      rate='sparse_backward',
      amount=2 * pairs * H * (3 * X + 2 * C) * times.backward,
    )
    scored = cost.indexer_pairs / length * tokens
    yield Work(
      part='index scores', rate='indexer', amount=2 * scored * J * (I + 1)
    )
    yield Work(part='token selection', rate='topk', amount=4 * scored)
  else:
    width = cfg.qk_head_dim
    yield Work(
      part='attention',
      rate='dense_forward',
      amount=2 * pairs * H * (width + U) * times.heads,
    )
    yield Work(
      part='attention, backward',
      rate='dense_backward',
      # Scores and values' products made again by both of its kernels.
      amount=2 * pairs * H * (4 * width + 3 * U) * times.backward,
    )
  if stage.attention.indexer_kl != 'none':
    latent = is_sparse or request.parallel.shards(axes.SEQUENCE) > 1
    target = H * (X if latent else cfg.qk_head_dim)
    rate = 'kl_selected' if is_sparse else 'kl_latent' if latent else 'kl_heads'
    # Once with gradients; before that, if made again, for the value alone.
    products = target + 3 * J * I + (times.losses - 1) * (target + J * I)
    yield Work(part='indexer loss', rate=rate, amount=2 * pairs * products)


def _expert_products(request: Request) -> float:
  """Products of all routed experts, forward, a micro-batch."""
  cfg = activations.local(request)
  mtp = int(cfg.num_nextn_predict_layers > 0)
  layers = cfg.num_moe_layers + mtp
  one = 3 * cfg.hidden_size * cfg.moe_intermediate_size
  return 2.0 * layers * request.tokens * cfg.num_experts_per_tok * one


def _feed_forward(request: Request, stage: stages.Stage) -> Iterator[Work]:
  """Experts, shared experts, routers and dense layers, a micro-batch."""
  cfg, parallel = activations.local(request), request.parallel
  D, A, E = cfg.hidden_size, cfg.num_experts_per_tok, cfg.n_routed_experts
  size = jnp.dtype(cfg.precision.compute).itemsize
  times, tokens = passes(request, stage), request.tokens
  mtp = int(cfg.num_nextn_predict_layers > 0)
  moe, dense = cfg.num_moe_layers + mtp, cfg.first_k_dense_replace
  yield Work(
    part='routed experts',
    rate='grouped_matmul',
    # Their backward pass computes them again, under every policy.
    amount=_expert_products(request) * (1 + 3 * times.backward),
  )
  rows, _ = activations.exchange_rows(request)
  pairs = tokens * A
  yield Work(
    part='rows of experts in memory (estimate)',
    rate='memory',
    amount=moe
    * D
    * size
    * ((4 * rows + 3 * pairs) + (9 * rows + 8 * pairs) * times.backward),
  )
  shared = request.model.moe_intermediate_size // parallel.shards(axes.MLP)
  plain = moe * D * (3 * cfg.n_shared_experts * shared + E)
  plain += dense * 3 * D * cfg.intermediate_size
  yield Work(
    part='dense and shared feed-forward, routers',
    rate='matmul',
    amount=2 * tokens * plain * (times.block + 2 * times.backward),
  )
  yield Work(
    part='norms and residual stream in memory (estimate)',
    rate='memory',
    amount=(moe + dense)
    * tokens
    * D
    * size
    * 12
    * (times.block + 2 * times.backward),
  )


def _head(request: Request, stage: stages.Stage) -> Iterator[Work]:
  """Logits of both heads, their gradients, and the MTP's projection."""
  cfg, parallel = request.model, request.parallel
  if not stage.lm_loss:
    return
  mtp = int(cfg.num_nextn_predict_layers > 0)
  vocabulary = cfg.vocab_size // parallel.shards(axes.VOCAB)
  products = (1 + mtp) * cfg.hidden_size * vocabulary
  products += mtp * 2 * cfg.hidden_size**2
  yield Work(
    part='logits',
    rate='matmul',
    amount=2.0 * request.tokens * products * 3,
  )
  # Written, read by the loss, its gradient written and read twice.
  width = jnp.dtype(cfg.precision.logits).itemsize
  yield Work(
    part='logits in memory (estimate)',
    rate='memory',
    amount=request.tokens * vocabulary * width * (1 + mtp) * 6,
  )
