"""Discrete choices that were recorded: taken again, or compared with.

Sampling records which experts and which keys every token went to. Training
takes the same ones, so that both run the same function of the weights, and
counts where it would have chosen otherwise by now.

Letters: before the last dim any dims of a batch; K choices a position.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

_FEW = 16
"""Choices a position up to which all pairs are compared."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recorded:
  """The choices of one layer, or of several with a leading dim of layers.

  Attributes:
    index: int [..., K], distinct; filled up with -1. A position of -1 alone has
      no record and chooses for itself.
    force: take them; False only compares. Static.
    compare: count where the layer's own choice differs. Static.
    is_complete: every position that is not padding has a record, so that own
      choices are needed for comparison only. Static.
  """

  index: Any
  force: bool = dataclasses.field(default=True, metadata={'static': True})
  compare: bool = dataclasses.field(default=True, metadata={'static': True})
  is_complete: bool = dataclasses.field(
    default=False, metadata={'static': True}
  )

  @property
  def needs_own(self) -> bool:
    """Whether the layer's own choice has a use."""
    return self.compare or not (self.force and self.is_complete)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mismatch:
  """How far own choices are from the recorded ones; float32 counts.

  Attributes:
    positions: with a record, padding left out.
    differing: of these, positions whose own set is another one.
    choices: recorded at those positions.
    missing: of these, choices that the own set does not have.
  """

  positions: Any
  differing: Any
  choices: Any
  missing: Any


def replayed(
  own: Int[Array, '*batch K'] | None,
  recorded: Recorded,
  valid: Bool[Array, '*batch'],
) -> tuple[Int[Array, '*batch K'], Mismatch | None]:
  """The choices to take, and how they differ from the own ones.

  Args:
    own: what the layer would choose; None where `needs_own` is False.
    recorded: of one layer.
    valid: False for padding, which is not counted, and has no choice of its own
      where `own` is None.

  Returns:
    int32 [..., K], and the counts if they are asked for.
  """
  index = recorded.index.astype(jnp.int32)
  has_record = jnp.any(index >= 0, axis=-1) & valid
  if own is None:
    return jnp.where(has_record[..., None], index, -1), None
  taken = own
  if recorded.force:
    taken = jnp.where(has_record[..., None], index, own)
  if not recorded.compare:
    return taken, None
  return taken, mismatch(own, index, has_record)


def mismatch(
  own: Int[Array, '*batch K'],
  index: Int[Array, '*batch K'],
  counted: Bool[Array, '*batch'],
) -> Mismatch:
  """Counts where two choices differ as sets; -1 is no member."""
  num_own = jnp.sum(own >= 0, axis=-1)
  num_recorded = jnp.sum(index >= 0, axis=-1)
  common = _num_common(own, index)
  differs = (common < num_recorded) | (num_own != num_recorded)

  def count(x: Array) -> Array:
    return jnp.sum(jnp.where(counted, x, 0).astype(jnp.float32))

  return Mismatch(
    positions=count(counted),
    differing=count(differs),
    choices=count(num_recorded),
    missing=count(num_recorded - common),
  )


def _num_common(a: Array, b: Array) -> Array:
  """Members that two sets share, both without repetitions."""
  if a.shape[-1] <= _FEW:
    is_equal = (a[..., :, None] == b[..., None, :]) & (a[..., :, None] >= 0)
    return jnp.sum(is_equal, axis=(-2, -1))
  both = jnp.sort(jnp.concatenate([a, b], axis=-1), axis=-1)
  is_twice = (both[..., 1:] == both[..., :-1]) & (both[..., 1:] >= 0)
  return jnp.sum(is_twice, axis=-1)
