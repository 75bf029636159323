"""A planned collective, and what several files of the plan ask of a request."""

import dataclasses

import jax.numpy as jnp

from dsv32_jax.sharding.planning.request import Request
from dsv32_jax.training import stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
  """One kind of message.

  Attributes:
    subject: what travels and why.
    kind: HLO's name of the collective.
    axes: mesh axes that it runs over, outermost first.
    bytes: of the larger side on one device, of one message.
    count: messages a step.
    hides: whether the compiler can run it beside work that does not need it.
  """

  subject: str
  kind: str
  axes: tuple[str, ...]
  bytes: int
  count: int
  hides: bool = False

  @property
  def total(self) -> int:
    """Bytes a step."""
    return self.bytes * self.count


def compute_itemsize(request: Request) -> int:
  """Bytes of an element of activations, and of weights when multiplied."""
  return jnp.dtype(request.model.precision.compute).itemsize


def has_mtp(request: Request) -> int:
  """1 with an MTP module."""
  return int(request.model.num_nextn_predict_layers > 0)


def runs_mtp(stage: stages.Stage) -> bool:
  """Whether the step runs the MTP module (see `training.step.forward`)."""
  return stage.mtp_loss_weight > 0 or stage.indexer_kl_coefficient > 0
