import jax.numpy as jnp
import numpy as np

from dsv32_jax.losses import mtp
from tests.support import tiny_configs


def test_shifted_targets_are_the_token_after_the_next():
  """By hand: documents 5 6 7 8 and 1 2 3, then a token of padding."""
  targets_BT, weight_BT = mtp.shifted_targets(
    jnp.asarray([[6, 7, 8, 0, 2, 3, 0, 0]]),
    jnp.asarray([[1.0, 0.5, 2.0, 0.0, 1.0, 1.0, 0.0, 0.0]]),
    jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 0]]),
  )
  np.testing.assert_array_equal(weight_BT, [[0.5, 2, 0, 0, 1, 0, 0, 0]])
  np.testing.assert_array_equal(
    np.asarray(targets_BT)[weight_BT > 0], [7, 8, 3]
  )


def test_shifted_targets_never_cross_documents_rows_or_padding():
  """Every main target weighs 1 here, at the ends of documents too."""
  rows = tiny_configs.rows([[11, 7], [20], [1, 1, 2], []])
  targets_BT, weight_BT = mtp.shifted_targets(
    jnp.asarray(rows['tokens']),
    jnp.ones(rows['tokens'].shape, jnp.float32),
    jnp.asarray(rows['segment_ids']),
  )
  segments = rows['segment_ids']
  for b, t in np.ndindex(*segments.shape):
    inside = t + 1 < segments.shape[1] and (
      segments[b, t] == segments[b, t + 1] > 0
    )
    assert weight_BT[b, t] == inside
    if inside:
      assert targets_BT[b, t] == rows['tokens'][b, t + 1]
