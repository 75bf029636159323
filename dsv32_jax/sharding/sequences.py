"""Sequences in the order in which devices share them, and back.

On a mesh with a context axis a model is given its tokens in zigzag order
(`sharding.zigzag`), in which neighbours are no longer neighbours: what is made
from neighbours (key ranges, next tokens) is made here, before. Elsewhere
nothing changes.

Letters: B batch, T tokens.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from dsv32_jax.functional import masking
from dsv32_jax.sharding import axes, parallel
from dsv32_jax.sharding.zigzag import to_natural, to_zigzag


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelInputs:
  """What `DeepSeekV32` takes of a batch, all in one order.

  Attributes:
    tokens_BT: token ids.
    segment_ids_BT: document of each token, 0 is padding.
    positions_BT: position in its document.
    key_range_BT: first and one past the last valid key of each token, counted
      in natural order; None in natural order.
    next_tokens_BT: the token after each; None in natural order.
  """

  tokens_BT: Any
  segment_ids_BT: Any
  positions_BT: Any
  key_range_BT: Any = None
  next_tokens_BT: Any = None

  def arguments(self) -> dict[str, Any]:
    """Keyword arguments of the model beside the tokens."""
    given: dict[str, Any] = {
      'segment_ids_BT': self.segment_ids_BT,
      'positions_BT': self.positions_BT,
    }
    if self.key_range_BT is not None:
      given |= {
        'sequence_shards': shards(self.tokens_BT.shape[1]),
        'key_range_BT': self.key_range_BT,
        'next_tokens_BT': self.next_tokens_BT,
      }
    return given


def shards(length: int) -> int:
  """Devices that a sequence is cut over under the active layout.

  1 for a length that two chunks a device do not divide: such a sequence is
  whole on each of them (`specs.check_batch` refuses one in training).
  """
  layout = parallel.active()
  if layout is None:
    return 1
  count = layout.shards(axes.SEQUENCE)
  return count if length % (2 * count) == 0 else 1


def model_inputs(
  tokens_BT: Int[Array, 'B T'],
  segment_ids_BT: Int[Array, 'B T'],
  positions_BT: Int[Array, 'B T'],
) -> ModelInputs:
  """From rows in natural order."""
  inputs = ModelInputs(tokens_BT, segment_ids_BT, positions_BT)
  if shards(tokens_BT.shape[1]) > 1:
    inputs = dataclasses.replace(
      inputs,
      key_range_BT=masking.key_ranges(segment_ids_BT),
      next_tokens_BT=jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1))),
    )
  return arranged(inputs)


def arranged(tree: Any) -> Any:
  """[B, T] arrays in natural order, in the order that devices share."""

  def arrange(x_BT: Array) -> Array:
    count = shards(x_BT.shape[1])
    # A sequence that stays in natural order is not cut.
    last = axes.SEQUENCE if count > 1 else None
    return parallel.constrain(to_zigzag(x_BT, count), axes.BATCH, last)

  return jax.tree.map(arrange, tree)


def natural(x_BT: Shaped[Array, 'B T ...']) -> Shaped[Array, 'B T ...']:
  """Undoes `arranged`, for a model's outputs."""
  return to_natural(x_BT, shards(x_BT.shape[1]))
