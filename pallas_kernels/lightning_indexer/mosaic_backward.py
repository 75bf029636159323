"""The indexer's backward kernels on Hopper.

Letters: B batch, T query tokens, S key tokens, J indexer heads, I index head
dim, R rows (heads of queries).

With d = q . k, P = g 1[d > 0] and g the gradient of the scores:

  dq[t, j] = w[t, j] sum_s P k[s]      dw[t, j] = sum_s P d
  dk[s] = sum_{t, j} w[t, j] P q[t, j]

Two kernels, so that every sum has one owner and a fixed order: one keeps rows
and walks over keys (dq, dw), the other keeps keys and walks over rows (dk).
Both compute d again; both are shaped as attention's two products, with P in
registers as the left operand of the second.
"""

import jax

from pallas_kernels import mosaic
from pallas_kernels.lightning_indexer import mosaic_keys, mosaic_rows
from pallas_kernels.lightning_indexer import mosaic_plan as plan
from pallas_kernels.lightning_indexer import mosaic_tiles as common

TILE = common.TILE
"""R and S must be multiples of it."""


def gradients(
  q_BRI: jax.Array,
  k_BSI: jax.Array,
  w_BR: jax.Array,
  g_BTS: jax.Array,
  key_start_BT: jax.Array,
  key_end_BT: jax.Array,
  *,
  heads: int,
  target: mosaic.Target,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(dq [B, R, I] bfloat16, dk [B, S, I] float32, dw [B, R] float32).

  Args:
    q_BRI: bfloat16, R a multiple of 128.
    k_BSI: bfloat16, S a multiple of 128.
    w_BR: float32.
    g_BTS: float32, S as k's; ignored outside the ranges. T may be less than
      R / J: rows beyond have no gradient.
    key_start_BT: within 0 .. S.
    key_end_BT: likewise.
    heads: J.
    target: where it runs.
  """
  num_keys = k_BSI.shape[1]
  blocks = plan.make_plan(
    key_start_BT,
    key_end_BT,
    num_keys=num_keys,
    query_block=common.TILE // heads,
    key_tile=common.TILE,
  )
  arguments = (q_BRI, k_BSI, w_BR, g_BTS, key_start_BT, key_end_BT)
  dq_BRI, dw_BR = mosaic_rows.gradients(
    *arguments, blocks, heads=heads, target=target
  )
  dk_BSI = mosaic_keys.gradients(*arguments, blocks, heads=heads, target=target)
  return dq_BRI, dk_BSI, dw_BR
