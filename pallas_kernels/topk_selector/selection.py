"""The result of a token selection."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
  """The keys selected for each query.

  Attributes:
    indices_BTK: int32, K indices a query, each key at most once; -1 where
      fewer than K keys are valid. A set: its order carries no meaning (the xla
      implementation gives ascending indices, then the -1).
  """

  # Any: jax rebuilds pytrees with leaves that are no arrays (shardings,
  # ShapeDtypeStruct, None), and a checked annotation would refuse them.
  indices_BTK: Any

  @property
  def valid_BTK(self) -> Bool[Array, 'B T K']:
    """True where `indices_BTK` names a key."""
    return self.indices_BTK >= 0
