"""One optimizer step of reinforcement learning.

The loss is `grpo.objective` of `scoring.forward`. The main model learns from it
alone, the indexers from their KL on the selected sets with detached input, or
not at all.

Letters: B rows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from dsv32_jax.config.model import SPARSE, SPARSE_TRAINING, ModelConfig
from dsv32_jax.config.rl import GRPOConfig
from dsv32_jax.modules.moe import ROUTER_BIAS
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.rl import grpo as grpo_lib
from dsv32_jax.rl import health, replay, scoring
from dsv32_jax.rl.batches import TrainingBatch
from dsv32_jax.rl.health import Metrics
from dsv32_jax.rl.scoring import Scores as Scores
from dsv32_jax.rl.scoring import make_score_fn as make_score_fn
from dsv32_jax.sharding import axes, specs
from dsv32_jax.sharding import parallel as parallel_lib
from dsv32_jax.training import optimizer
from dsv32_jax.training.stages import Stage
from dsv32_jax.training.state import TrainState
from dsv32_jax.training.step import group_norms, updated_bias


def rl_stage(config: GRPOConfig, model: ModelConfig) -> Stage:
  """The stage of training, for `optimizer.build` and `state.create`.

  Raises:
    ValueError: a model without an indexer.
  """
  model.require_indexer()
  learns = config.indexer == 'learns'
  return Stage(
    attention=SPARSE_TRAINING if learns else SPARSE,
    trainable=('main', 'indexer') if learns else ('main',),
    lm_loss=False,
    indexer_kl_coefficient=config.indexer_kl_coefficient if learns else 0.0,
    mtp_loss_weight=0.0,
    router_bias_update_rate=config.router_bias_update_rate,
  )


def make_rl_step(
  model: DeepSeekV32,
  config: GRPOConfig,
  tx: optax.GradientTransformation,
  *,
  micro_batches: int = 1,
  logits_chunk: int = 0,
  compare: bool = True,
  shardings: Any = None,
) -> Callable[[TrainState, TrainingBatch], tuple[TrainState, Metrics]]:
  """Builds the step.

  Args:
    model: the architecture.
    config: the objective and its switches.
    tx: of the groups of `rl_stage`, as from `optimizer.build`.
    micro_batches: gradient accumulation over parts of the rows; the result is
      that of the whole minibatch.
    logits_chunk: tokens of a row whose logits are held at a time; 0 holds all.
    compare: count where experts and keys would be chosen otherwise by now.
    shardings: of the parameters; gradients are laid out alike.

  Returns:
    A pure function (state, batch) -> (state, metrics), to be jitted with the
    state donated. Metrics are scalars. It raises ValueError while it is traced
    for a batch whose records do not fit the model, or that lacks the reference
    that a strength of the KL asks for.
  """
  stage = rl_stage(config, model.cfg)
  trainable_shardings = None
  if shardings is not None:
    trainable_shardings, _ = optimizer.split(shardings, stage)

  def gradient(state: TrainState, batch: TrainingBatch, valid_tokens: Array):
    trainable, frozen = optimizer.split(state.params, stage)

    def loss_fn(trainable):
      variables = {
        'params': optimizer.join(trainable, frozen),
        ROUTER_BIAS: state.router_bias,
      }
      scores, output = scoring.forward(
        model,
        variables,
        batch,
        valid_tokens,
        config=config,
        attention=stage.attention,
        logits_chunk=logits_chunk,
        compare=compare,
      )
      found = _objective(scores, batch, config)
      parts = health.objective_parts(found, scores.entropy_BT, batch)
      indexer_kl = jnp.sum(output.indexer_kl_L)
      loss = found.loss + stage.indexer_kl_coefficient * indexer_kl
      parts.sums.update(
        health.mismatch_sums(
          output.routing_mismatch_L, output.selection_mismatch_L
        ),
        total=loss,
        indexer_kl=indexer_kl,
        expert_load_LE=output.expert_load_LE.astype(jnp.float32),
      )
      return loss, jax.lax.stop_gradient(parts)

    grads, parts = jax.grad(loss_fn, has_aux=True)(trainable)
    return specs.constrain(grads, trainable_shardings), parts

  def accumulated(state: TrainState, batch: TrainingBatch, valid: Array):
    if micro_batches == 1:
      return gradient(state, batch, valid)
    split = _micro_batches(micro_batches, batch)

    def add(carry, micro):
      grads, parts = gradient(state, micro, valid)
      return (
        jax.tree.map(jnp.add, carry[0], grads),
        carry[1].merged(parts),
      ), None

    shapes = jax.eval_shape(
      gradient, state, jax.tree.map(lambda x: x[0], split), valid
    )
    # All maxima are of numbers of at least 0.
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, split)[0]

  def step(state: TrainState, batch: TrainingBatch):
    _check_reference(batch, config)
    valid_tokens = jnp.sum((batch.segment_ids_BT > 0).astype(jnp.float32))
    grads, parts = accumulated(state, batch, valid_tokens)
    trainable, frozen = optimizer.split(state.params, stage)
    updates, opt_state = tx.update(grads, state.opt_state, trainable)
    trainable: Any = optax.apply_updates(trainable, _without_mtp(updates))
    metrics = health.objective_metrics(parts, batch.domains)
    metrics |= health.mismatch_metrics(parts.sums)
    metrics |= {
      'loss/total': parts.sums['total'],
      'loss/indexer_kl': parts.sums['indexer_kl'],
      'num_tokens': valid_tokens,
      **group_norms(grads),
    }
    router_bias = updated_bias(
      state.router_bias,
      {'expert_load_LE': parts.sums['expert_load_LE']},
      stage,
    )
    new_state = TrainState(
      step=state.step + 1,
      params=optimizer.join(trainable, frozen),
      router_bias=router_bias,
      opt_state=opt_state,
    )
    return new_state, metrics

  return step


def _objective(
  scores: replay.TokenScores, batch: TrainingBatch, config: GRPOConfig
) -> grpo_lib.Objective:
  kl_logprob_BT = scoring.kl_logprob(scores, config)
  return grpo_lib.objective(
    scores.logprob_BT,
    sampling_logprob_BT=batch.sampling_logprob_BT,
    ref_logprob_BT=batch.ref_logprob_BT,
    advantage_BT=batch.advantage_BT,
    weight_BT=batch.weight_BT,
    kl_strength_BT=batch.kl_strength_BT,
    response_BT=batch.response_BT,
    num_responses=batch.num_responses,
    config=config,
    kl_logprob_BT=(
      None if kl_logprob_BT is scores.logprob_BT else kl_logprob_BT
    ),
  )


def _check_reference(batch: TrainingBatch, config: GRPOConfig) -> None:
  strongest = max(
    config.kl_strength_of(domain) for domain in batch.domains or ('',)
  )
  if strongest > 0 and batch.ref_logprob_BT is None:
    raise ValueError(
      f'ref_logprob_BT: got None with a KL strength of {strongest}, expected '
      'the scores of the reference (make_score_fn)'
    )


def _micro_batches(count: int, batch: TrainingBatch) -> TrainingBatch:
  """[B, ...] -> [count, B / count, ...], every count-th row together.

  Rows lie on the devices in blocks, so strided parts need no transfer and keep
  every device busy.
  """
  rows = batch.tokens_BT.shape[0]
  if rows % count:
    raise ValueError(
      f'micro_batches: got {count} for {rows} rows, expected a divisor'
    )

  def split(x: Array) -> Array:
    parts = x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
    rest = (None,) * (parts.ndim - 2)
    return parallel_lib.constrain(parts, None, axes.BATCH, *rest)

  return jax.tree.map(split, batch)


def _without_mtp(updates: Any) -> Any:
  """Keeps the MTP module as it is: it has no loss here, and would decay."""
  return {
    name: jax.tree.map(jnp.zeros_like, update) if name == 'mtp' else update
    for name, update in updates.items()
  }
