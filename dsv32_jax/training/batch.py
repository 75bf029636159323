"""What a training step reads, and the totals its losses are divided by.

Letters: B batch, T tokens.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv32_jax.losses import mtp
from dsv32_jax.sharding import sequences
from dsv32_jax.sharding.sequences import ModelInputs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """Packed rows; see `dsv32_jax.data`.

  Attributes:
    tokens_BT: inputs.
    targets_BT: next tokens.
    loss_weight_BT: weight of each target in the LM loss, 0 to leave it out.
    segment_ids_BT: document of each token, 0 is padding.
    positions_BT: position in the document.
  """

  tokens_BT: Any
  targets_BT: Any
  loss_weight_BT: Any
  segment_ids_BT: Any
  positions_BT: Any

  @classmethod
  def from_numpy(cls, rows: Mapping) -> 'Batch':
    """From the dict of [B, T] arrays that the data pipeline yields."""
    return cls(**{f'{name}_BT': jnp.asarray(rows[name]) for name in BATCH_KEYS})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
  """A batch as the step works on it, in the order that devices share.

  Attributes:
    model: what the model takes.
    targets_BT: next tokens.
    loss_weight_BT: their weights.
    mtp_targets_BT: tokens after the next.
    mtp_weight_BT: their weights.
  """

  model: ModelInputs
  targets_BT: Any
  loss_weight_BT: Any
  mtp_targets_BT: Any
  mtp_weight_BT: Any


def arrange(batch: Batch) -> Inputs:
  """Makes what depends on neighbouring tokens, then orders the sequences."""
  return Inputs(
    sequences.model_inputs(
      batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT
    ),
    *sequences.arranged(
      (
        batch.targets_BT,
        batch.loss_weight_BT,
        *mtp.shifted_targets(
          batch.targets_BT, batch.loss_weight_BT, batch.segment_ids_BT
        ),
      )
    ),
  )


BATCH_KEYS = ('tokens', 'targets', 'loss_weight', 'segment_ids', 'positions')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Totals:
  """Denominators over the whole batch, before it is cut into micro-batches.

  Normalising by these, and not by a micro-batch's own counts, makes every loss
  and gradient independent of how the batch is cut (spec 5.4).
  """

  lm_weight: Any
  mtp_weight: Any
  valid_tokens: Any
  rows: Any


def totals(batch: Batch) -> Totals:
  """Counts what the losses of `batch` are divided by."""
  _, mtp_weight_BT = mtp.shifted_targets(
    batch.targets_BT, batch.loss_weight_BT, batch.segment_ids_BT
  )
  return Totals(
    lm_weight=jnp.sum(batch.loss_weight_BT),
    mtp_weight=jnp.sum(mtp_weight_BT),
    valid_tokens=jnp.sum((batch.segment_ids_BT > 0).astype(jnp.float32)),
    rows=num_rows(batch.segment_ids_BT),
  )


def num_rows(segment_ids_BT: Int[Array, 'B T']) -> Float[Array, '']:
  """Rows that hold at least one token."""
  return jnp.sum(jnp.any(segment_ids_BT > 0, axis=1).astype(jnp.float32))
