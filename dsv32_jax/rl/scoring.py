"""The forward pass of reinforcement learning: scores of sampled tokens.

It replays what sampling recorded, so that it is the function that was sampled
from.

Letters: B rows, T tokens, L layers, K choices of a layer, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv32_jax.config.model import SPARSE, AttentionMode, ModelConfig
from dsv32_jax.config.rl import GRPOConfig
from dsv32_jax.functional.recorded import Recorded
from dsv32_jax.modules.replay import Replay
from dsv32_jax.modules.transformer import DeepSeekV32, ModelOutput, logits_of
from dsv32_jax.rl import health, replay
from dsv32_jax.rl.batches import TrainingBatch
from dsv32_jax.sharding import axes, sequences, zigzag
from dsv32_jax.sharding import parallel as parallel_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
  """What some parameters say about a batch.

  Attributes:
    logprob_BT: of each target as the policy's is taken for the ratio.
    ref_logprob_BT: as the KL's anchor is taken, see `GRPOConfig.kl_over`.
    entropy_BT: of the distributions of `logprob_BT`.
    metrics: `sampler/...`, how far `logprob_BT` is from the recorded
      log-probabilities, and `mismatch/...`.
  """

  logprob_BT: Any
  ref_logprob_BT: Any
  entropy_BT: Any
  metrics: Any


def make_score_fn(
  model: DeepSeekV32,
  config: GRPOConfig,
  *,
  logits_chunk: int = 0,
  compare: bool = True,
) -> Callable[[dict, TrainingBatch], Scores]:
  """Log-probabilities of a batch, with the step's replays and none of its loss.

  For the KL's anchor, and for what the trainer makes of the sampler's tokens
  with the sampler's own weights.

  Args:
    model: the architecture.
    config: the switches; what is replayed in the step is replayed here.
    logits_chunk: tokens of a row whose logits are held at a time.
    compare: count where experts and keys would be chosen otherwise.

  Returns:
    A pure function (variables, batch) -> Scores, to be jitted.
  """
  model.cfg.require_indexer()

  def score(variables: dict, batch: TrainingBatch) -> Scores:
    scores, output = forward(
      model,
      variables,
      batch,
      jnp.float32(1),
      config=config,
      attention=SPARSE,
      logits_chunk=logits_chunk,
      compare=compare,
    )
    log_ratio_BT = jnp.where(
      batch.response_BT >= 0,
      scores.logprob_BT - batch.sampling_logprob_BT,
      0.0,
    )
    sums = health.mismatch_sums(
      output.routing_mismatch_L, output.selection_mismatch_L
    )
    parts = health.drift_parts(log_ratio_BT, batch)
    return Scores(
      logprob_BT=scores.logprob_BT,
      ref_logprob_BT=kl_logprob(scores, config),
      entropy_BT=scores.entropy_BT,
      metrics=health.drift_metrics(parts, 'sampler')
      | health.mismatch_metrics(sums),
    )

  return score


def forward(
  model: DeepSeekV32,
  variables: dict,
  batch: TrainingBatch,
  valid_tokens: Float[Array, ''],
  *,
  config: GRPOConfig,
  attention: AttentionMode,
  logits_chunk: int,
  compare: bool,
) -> tuple[replay.TokenScores, ModelOutput]:
  """Scores of every target, and the model's reports.

  Args:
    model: the architecture.
    variables: its variables.
    batch: with the records that `config` replays.
    valid_tokens: of the whole minibatch, over which the indexers' losses are
      means.
    config: the switches.
    attention: mode of the pass.
    logits_chunk: tokens of a row whose logits are held at a time; 0 holds all.
    compare: count where experts and keys would be chosen otherwise.

  Returns:
    The scores in natural order, and the model's output without logits.

  Raises:
    ValueError: a record that is needed and missing, or of another model.
  """
  inputs = sequences.model_inputs(
    batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT
  )
  valid_BT = (inputs.segment_ids_BT > 0).astype(jnp.float32)
  output: Any = model.apply(
    variables,
    inputs.tokens_BT,
    attention=attention,
    compute_logits=False,
    indexer_row_weight_BT=valid_BT / jnp.maximum(valid_tokens, 1.0),
    replay=_replay(model.cfg, batch, config, compare),
    **inputs.arguments(),
  )
  cfg = model.cfg
  head = 'embedding' if cfg.tie_word_embeddings else 'lm_head'
  targets_BT, kept_BTK, temperature_BT = _arranged(
    (
      batch.targets_BT,
      batch.kept_BTK if config.keep_sampling_mask else None,
      batch.temperature_BT,
    )
  )
  scores = replay.chunked_token_scores(
    lambda params, hidden_BTD: logits_of(cfg, params, hidden_BTD),
    {head: variables['params'][head]},
    output.hidden_BTD,
    targets_BT,
    kept_BTK,
    temperature_BT,
    chunk=logits_chunk,
  )
  return jax.tree.map(sequences.natural, scores), output


def kl_logprob(scores: replay.TokenScores, config: GRPOConfig) -> Array:
  """Log-probabilities as the KL term takes them."""
  if config.kl_over == 'vocabulary':
    return scores.vocabulary_logprob_BT
  return scores.logprob_BT


def _replay(
  cfg: ModelConfig, batch: TrainingBatch, config: GRPOConfig, compare: bool
) -> Replay | None:
  """The batch's records by layer, in the order of the tokens."""

  def recorded(name: str, force: bool) -> Recorded | None:
    x_BTLK = getattr(batch, name)
    if x_BTLK is None:
      if force:
        raise ValueError(
          f'{name}: got None, expected a record: the config replays it'
        )
      return None
    if not (force or compare):
      return None
    return Recorded(
      jnp.moveaxis(_arranged(x_BTLK), 2, 0),
      force=force,
      compare=compare,
      is_complete=True,
    )

  experts = None
  if cfg.num_moe_layers:
    experts = recorded('experts_BTLA', config.keep_routing)
  selected = recorded('selected_BTLK', config.keep_selection)
  if experts is None and selected is None:
    return None
  return Replay(experts=experts, selected=selected)


def _arranged(tree: Any) -> Any:
  """`sequences.arranged`, also for arrays of more than two dims."""

  def arrange(x_BT: Array) -> Array:
    count = sequences.shards(x_BT.shape[1])
    last = axes.SEQUENCE if count > 1 else None
    rest = (None,) * (x_BT.ndim - 2)
    return parallel_lib.constrain(
      zigzag.to_zigzag(x_BT, count), axes.BATCH, last, *rest
    )

  return jax.tree.map(arrange, tree)
