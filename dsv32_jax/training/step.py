"""One optimizer step of any stage, as a pure function.

Letters: B batch, T tokens, L layers, E experts.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dsv32_jax.functional import masking, routing
from dsv32_jax.losses import language_model
from dsv32_jax.modules.moe import ROUTER_BIAS
from dsv32_jax.modules.transformer import DeepSeekV32, ModelOutput
from dsv32_jax.sharding import axes, specs
from dsv32_jax.sharding import parallel as parallel_lib
from dsv32_jax.training import optimizer
from dsv32_jax.training.batch import (
  Batch,
  Inputs,
  Totals,
  arrange,
  num_rows,
  totals,
)
from dsv32_jax.training.stages import Stage
from dsv32_jax.training.state import TrainState

Metrics = dict[str, Array]


def forward(
  model: DeepSeekV32,
  variables: dict,
  inputs: Inputs,
  total: Totals,
  stage: Stage,
  key: Array,
) -> ModelOutput:
  """The forward pass of a stage on one (micro-)batch."""
  valid_BT = (inputs.model.segment_ids_BT > 0).astype(jnp.float32)
  return model.apply(
    variables,
    inputs.model.tokens_BT,
    attention=stage.attention,
    compute_logits=stage.lm_loss,
    compute_mtp=(stage.mtp_loss_weight > 0 or stage.indexer_kl_coefficient > 0),
    indexer_row_weight_BT=valid_BT / jnp.maximum(total.valid_tokens, 1.0),
    rngs={'selection': key},
    **inputs.model.arguments(),
  )  # pyrefly: ignore


def losses(
  output: ModelOutput, inputs: Inputs, total: Totals, stage: Stage
) -> tuple[Float[Array, ''], Metrics]:
  """The stage's loss and its parts.

  Every part is a share of the whole batch's value, so parts of micro-batches
  add up.

  Args:
    output: of `forward`.
    inputs: the same (micro-)batch.
    total: of the whole batch.
    stage: which losses count.

  Returns:
    The scalar to differentiate, and the parts to report.
  """
  loss = jnp.zeros((), jnp.float32)
  parts: Metrics = {}
  if stage.lm_loss:
    ce_BT = language_model.cross_entropy(output.logits_BTV, inputs.targets_BT)
    parts['loss/lm'] = language_model.weighted_mean(
      ce_BT, inputs.loss_weight_BT, total.lm_weight
    )
    # Sequence-wise: averaged over the rows that are not all padding, so a
    # micro-batch holds the share of its own.
    own = num_rows(inputs.model.segment_ids_BT)
    share = own / jnp.maximum(total.rows, 1.0)
    parts['loss/balance'] = jnp.sum(output.balance_loss_L) * share
    loss += parts['loss/lm'] + parts['loss/balance']
    if output.mtp_logits_BTV is not None and stage.mtp_loss_weight > 0:
      parts['loss/mtp'] = language_model.weighted_mean(
        language_model.cross_entropy(
          output.mtp_logits_BTV, inputs.mtp_targets_BT
        ),
        inputs.mtp_weight_BT,
        total.mtp_weight,
      )
      loss += stage.mtp_loss_weight * parts['loss/mtp']
  if stage.indexer_kl_coefficient > 0:
    # Summed over layers: each layer's indexer sees only its own term.
    parts['loss/indexer_kl'] = jnp.sum(output.indexer_kl_L)
    loss += stage.indexer_kl_coefficient * parts['loss/indexer_kl']
    parts['indexer_kl_L'] = output.indexer_kl_L
  parts['loss/total'] = loss
  parts['num_pairs_L'] = output.num_pairs_L
  parts['expert_load_LE'] = output.expert_load_LE.astype(jnp.float32)
  return loss, parts


def make_train_step(
  model: DeepSeekV32,
  stage: Stage,
  tx: optax.GradientTransformation,
  shardings: Any = None,
) -> Callable[[TrainState, Batch, Array], tuple[TrainState, Metrics]]:
  """Builds the step of a stage.

  Args:
    model: the architecture during the stage.
    stage: losses, trainable groups, accumulation.
    tx: from `optimizer.build`.
    shardings: of the parameters; their gradients are laid out alike, so that
      they are summed into parts and never whole.

  Returns:
    A pure function (state, batch, key) -> (state, metrics), to be jitted with
    the state donated. Metrics are scalars and per-layer vectors:
    `loss/*`, `grad_norm/*`, `indexer_kl_L`, `num_pairs_L`, `expert_load_LE`,
    and of the batch `causal_pairs` and `num_tokens`. All are of the whole
    batch, however many devices share it.
  """
  trainable_shardings = None
  if shardings is not None:
    trainable_shardings, _ = optimizer.split(shardings, stage)

  def gradient(state: TrainState, inputs: Inputs, total: Totals, key: Array):
    trainable, frozen = optimizer.split(state.params, stage)

    def loss_fn(trainable):
      variables = {
        'params': optimizer.join(trainable, frozen),
        ROUTER_BIAS: state.router_bias,
      }
      output = forward(model, variables, inputs, total, stage, key)
      return losses(output, inputs, total, stage)

    grads, parts = jax.grad(loss_fn, has_aux=True)(trainable)
    return specs.constrain(grads, trainable_shardings), parts

  def accumulated(state: TrainState, inputs: Inputs, total: Totals, key: Array):
    if stage.micro_batches == 1:
      return gradient(state, inputs, total, key)
    split = jax.tree.map(
      functools.partial(_micro_batches, stage.micro_batches), inputs
    )

    def add(carry, inputs):
      micro, index = inputs
      new = gradient(state, micro, total, jax.random.fold_in(key, index))
      return jax.tree.map(jnp.add, carry, new), None

    shapes = jax.eval_shape(
      gradient, state, jax.tree.map(lambda x: x[0], split), total, key
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (grads, parts), _ = jax.lax.scan(
      add, zeros, (split, jnp.arange(stage.micro_batches))
    )
    return grads, parts

  def step(state: TrainState, batch: Batch, key: Array):
    total = totals(batch)
    grads, metrics = accumulated(
      state,
      arrange(batch),
      total,
      jax.random.fold_in(key, state.step),
    )
    trainable, frozen = optimizer.split(state.params, stage)
    updates, opt_state = tx.update(grads, state.opt_state, trainable)
    trainable: Any = optax.apply_updates(trainable, updates)
    metrics.update(group_norms(grads))
    start_BT, end_BT = masking.key_ranges(batch.segment_ids_BT)
    metrics['causal_pairs'] = jnp.sum((end_BT - start_BT).astype(jnp.float32))
    metrics['num_tokens'] = jnp.float32(batch.tokens_BT.size)
    new_state = TrainState(
      step=state.step + 1,
      params=optimizer.join(trainable, frozen),
      router_bias=updated_bias(state.router_bias, metrics, stage),
      opt_state=opt_state,
    )
    return new_state, metrics

  return step


def _micro_batches(count: int, x: Array) -> Array:
  """[B, T] -> [count, B / count, T], every count-th row together.

  Rows lie on the devices in blocks, so strided parts need no transfer and keep
  every device busy.
  """
  parts = x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
  return parallel_lib.constrain(parts, None, axes.BATCH, axes.SEQUENCE)


def group_norms(grads: Any) -> Metrics:
  """Global gradient norm of each group, before clipping."""
  groups: dict[str, list[Array]] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    groups.setdefault(optimizer.group_of(path), []).append(leaf)
  return {
    f'grad_norm/{name}': optax.tree.norm(leaves)
    for name, leaves in groups.items()
  }


def updated_bias(router_bias: Any, metrics: Metrics, stage: Stage) -> Any:
  """One auxiliary-loss-free step of every MoE layer's selection bias.

  The load has one row a MoE layer in the order main stack, MTP; the biases are
  one [layers, E] leaf for the scanned stack or one [E] leaf a layer.
  """
  if stage.router_bias_update_rate == 0 or not jax.tree.leaves(router_bias):
    return router_bias
  load_LE = metrics['expert_load_LE']
  leaves, tree = jax.tree_util.tree_flatten_with_path(router_bias)
  order = sorted(range(len(leaves)), key=lambda i: _layer_key(leaves[i][0]))
  updated: list[Any] = [None] * len(leaves)
  row = 0
  for index in order:
    bias = leaves[index][1]
    count = bias.shape[0] if bias.ndim == 2 else 1
    rows = load_LE[row : row + count]
    if rows.shape[0] < count:
      # The MTP block did not run in this stage: its bias stays.
      updated[index] = bias
      continue
    update = jax.vmap(
      lambda b, c: routing.update_bias(
        b, c, gamma=stage.router_bias_update_rate
      )
    )
    updated[index] = update(bias.reshape(count, -1), rows).reshape(bias.shape)
    row += count
  return jax.tree_util.tree_unflatten(tree, updated)


def _layer_key(path: tuple) -> tuple:
  """Sorts main layers by number before the MTP block."""
  names = [str(getattr(key, 'key', key)) for key in path]
  numbers = [
    int(name.removeprefix('layer_'))
    for name in names
    if name.startswith('layer_')
  ]
  return ('mtp' in names, *numbers)
