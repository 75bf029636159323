"""Held-out LM loss, by position, for any attention mode.

Letters: B batch, T tokens.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dsv32_jax.config.model import AttentionMode
from dsv32_jax.losses import language_model
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.sharding import parallel, sequences, specs
from dsv32_jax.sharding.parallel import Parallel

_KEYS = ('tokens', 'targets', 'segment_ids', 'positions')


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositionLoss:
  """Held-out loss.

  Attributes:
    loss: mean nats a token.
    tokens: tokens counted.
    by_position: mean loss at each position of the row, NaN where none counted.
    pairs_per_token: attended keys a token and layer, the realised sparsity.
  """

  loss: float
  tokens: int
  by_position: list[float]
  pairs_per_token: float


def held_out_loss(
  model: DeepSeekV32,
  variables: dict,
  batches: Iterable[Mapping],
  attention: AttentionMode,
  *,
  seed: int = 0,
) -> PositionLoss:
  """Mean next-token loss over batches.

  Args:
    model: the model.
    variables: its variables.
    batches: dicts of [B, T] arrays, as the data pipeline yields, all of one
      shape.
    attention: which tokens are attended to.
    seed: of the random selector.

  Returns:
    The loss with its profile over positions.

  Raises:
    ValueError: if there is no batch.
  """
  losses, weights, pairs = [], [], []
  for index, rows in enumerate(batches):
    ce_BT, per_token = _token_losses(
      variables,
      specs.padded_rows({name: rows[name] for name in _KEYS}),
      jax.random.fold_in(jax.random.key(seed), index),
      model=model,
      attention=attention,
      layout=parallel.active(),
    )
    losses.append(np.asarray(ce_BT, np.float64)[: len(rows['tokens'])])
    weights.append(np.asarray(rows['loss_weight']) > 0)
    pairs.append(float(per_token))
  if not losses:
    raise ValueError('batches: got none, expected at least one')
  loss_NT, counted_NT = np.concatenate(losses), np.concatenate(weights)
  count_T = counted_NT.sum(axis=0)
  sum_T = np.where(counted_NT, loss_NT, 0.0).sum(axis=0)
  with np.errstate(invalid='ignore'):
    by_position = sum_T / count_T
  return PositionLoss(
    loss=float(sum_T.sum() / count_T.sum()),
    tokens=int(count_T.sum()),
    by_position=by_position.tolist(),
    pairs_per_token=float(np.mean(pairs)),
  )


# At module level and static in the model: one compilation serves every caller
# (under the same layout).
@functools.partial(jax.jit, static_argnames=('model', 'attention', 'layout'))
def _token_losses(
  variables: dict,
  rows: Mapping[str, Array],
  key: Array,
  *,
  model: DeepSeekV32,
  attention: AttentionMode,
  layout: Parallel | None,
) -> tuple[Array, Array]:
  """Each token's loss [B, T], and attended pairs a token and layer."""
  del layout
  inputs = sequences.model_inputs(
    rows['tokens'], rows['segment_ids'], rows['positions']
  )
  output = model.apply(
    variables,
    inputs.tokens_BT,
    attention=attention,
    rngs={'selection': key},
    **inputs.arguments(),
  )  # pyrefly: ignore
  ce_BT = language_model.cross_entropy(
    output.logits_BTV, sequences.arranged(rows['targets'])
  )
  valid = jnp.sum(rows['segment_ids'] > 0)
  return (
    parallel.constrain(sequences.natural(ce_BT), None, None),
    jnp.mean(output.num_pairs_L) / valid,
  )
