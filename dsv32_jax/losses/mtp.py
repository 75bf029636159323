"""Multi-token prediction loss, depth 1 (V3 report Eq. 24-25; spec 3.8).

Letters: B batch, T tokens, V vocabulary.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def shifted_targets(
  targets_BT: Int[Array, 'B T'],
  loss_weight_BT: Float[Array, 'B T'],
  segment_ids_BT: Int[Array, 'B T'],
) -> tuple[Int[Array, 'B T'], Float[Array, 'B T']]:
  """Targets t_{i+2} at position i, and their weights.

  Position i predicts what position i + 1 of the main model predicts, so both
  shift by one; the weight is 0 where i + 1 is another document or the row's
  end.

  Args:
    targets_BT: main model targets t_{i+1}.
    loss_weight_BT: their weights.
    segment_ids_BT: documents, 0 for padding.

  Returns:
    MTP targets and weights.
  """

  def shift(x_BT: Array) -> Array:
    return jnp.pad(x_BT[:, 1:], ((0, 0), (0, 1)))

  same = (segment_ids_BT == shift(segment_ids_BT)) & (segment_ids_BT > 0)
  return shift(targets_BT), shift(loss_weight_BT) * same
