"""Steps over queries, and the rows and masks that a selection stands for.

Shared by the `xla` files of the ops that work on a selected set. Everything
keeps the batch as a leading axis of its own, so that GSPMD can shard it.

Letters: B batch, T queries, S keys, K selected keys, W any row width, N steps.
"""

import jax
import jax.numpy as jnp
from jax import lax


def pad_axis(
  x: jax.Array, axis: int, multiple: int, value: int | float = 0
) -> jax.Array:
  """Pads `axis` at its end to a multiple of `multiple`."""
  missing = -x.shape[axis] % multiple
  if not missing:
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, missing)
  return jnp.pad(x, widths, constant_values=value)


def split_queries(
  x: jax.Array, block: int, value: int | float = 0
) -> jax.Array:
  """[B, T, ...] to [N, B, block, ...], padded with `value`: scan's input."""
  x = pad_axis(x, 1, block, value)
  x = x.reshape(x.shape[0], -1, block, *x.shape[2:])
  return jnp.moveaxis(x, 1, 0)


def join_queries(x: jax.Array, num_queries: int) -> jax.Array:
  """Inverse of `split_queries`: scan's output back to [B, T, ...]."""
  x = jnp.moveaxis(x, 0, 1)
  x = x.reshape(x.shape[0], -1, *x.shape[3:])
  return x[:, :num_queries]


def gather_rows(rows_BSW: jax.Array, indices_BTK: jax.Array) -> jax.Array:
  """The selected rows [B, T, K, ...]; -1 gives some row, to be masked."""

  def take(rows, indices):
    return rows.at[indices].get(mode='clip')

  return jax.vmap(take)(rows_BSW, indices_BTK)


def add_rows(
  total_BSW: jax.Array,
  indices_BTK: jax.Array,
  updates_BTKW: jax.Array,
  *,
  in_sorted_order: bool,
) -> jax.Array:
  """Adds each update to the row that its index names; -1 is dropped.

  Args:
    total_BSW: sums so far.
    indices_BTK: int32 rows.
    updates_BTKW: finite addends.
    in_sorted_order: sum the updates of one row by a scan over the sorted
      indices, then write each row once, so that no two writes meet. Without
      it the result depends on the order in which the platform scatters.
  """
  num_rows, width = total_BSW.shape[1:]
  batch = total_BSW.shape[0]
  indices_BN = jnp.where(indices_BTK < 0, num_rows, indices_BTK)
  indices_BN = indices_BN.reshape(batch, -1)
  updates_BNW = updates_BTKW.reshape(batch, -1, width)
  if in_sorted_order:
    order_BN = jnp.argsort(indices_BN, axis=1, stable=True)
    indices_BN = jnp.take_along_axis(indices_BN, order_BN, axis=1)
    updates_BNW = jnp.take_along_axis(updates_BNW, order_BN[..., None], axis=1)
    edge_BN = indices_BN[:, 1:] != indices_BN[:, :-1]
    first_BN = jnp.pad(edge_BN, ((0, 0), (1, 0)), constant_values=True)
    last_BN = jnp.pad(edge_BN, ((0, 0), (0, 1)), constant_values=True)

    def combine(left, right):
      sum_left, _ = left
      sum_right, starts = right
      added = jnp.where(starts, sum_right, sum_left + sum_right)
      return added, left[1] | starts

    updates_BNW, _ = lax.associative_scan(
      combine, (updates_BNW, first_BN[..., None]), axis=1
    )
    indices_BN = jnp.where(last_BN, indices_BN, num_rows)

  def add(total, indices, updates):
    return total.at[indices].add(updates, mode='drop')

  return jax.vmap(add)(total_BSW, indices_BN, updates_BNW)


def selection_mask(indices_BTK: jax.Array, num_keys: int) -> jax.Array:
  """Boolean [B, T, S], true at the selected keys."""
  # Out of range, hence dropped: a negative index would count from the end.
  indices_BTK = jnp.where(indices_BTK < 0, num_keys, indices_BTK)

  def mark(i):
    return jnp.zeros(num_keys, bool).at[i].set(True, mode='drop')

  return jax.vmap(jax.vmap(mark))(indices_BTK)


def selected_blocks(
  indices_NBTK: jax.Array, block_keys: int, num_keys: int
) -> tuple[jax.Array, jax.Array]:
  """First key block that each step needs, and one past the last: two [N]."""
  axes = (1, 2, 3)
  absent = indices_NBTK < 0
  first_N = jnp.min(jnp.where(absent, num_keys, indices_NBTK), axis=axes)
  last_N = jnp.max(indices_NBTK, axis=axes)
  return first_N // block_keys, last_N // block_keys + 1


def block_of(x: jax.Array, block: jax.Array, size: int, axis: int) -> jax.Array:
  """Block number `block` of `size` entries along `axis`."""
  return lax.dynamic_slice_in_dim(x, block * size, size, axis)


def add_block(
  total: jax.Array, update: jax.Array, block: jax.Array, size: int, axis: int
) -> jax.Array:
  """Adds `update` to block number `block` along `axis`."""
  update = block_of(total, block, size, axis) + update
  return lax.dynamic_update_slice_in_dim(total, update, block * size, axis)
