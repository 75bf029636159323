"""Grouped products as a loop over the blocks of each expert.

The outer loop runs over experts, so a matrix is read once, the inner one over
as many blocks as the group has. Blocks are read in place from the sorted rows
(no padded copy); the last block of a group overlaps the next group and masks
what is not its own.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


def product(
  x_MD: Float[Array, 'M K'],
  w_EDF: Float[Array, 'E D F'],
  group_sizes_E: Int[Array, ' E'],
  *,
  block_rows: int,
  transpose_w: bool,
) -> Float[Array, 'M O']:
  """y[m] = x[m] @ w[e(m)], or x[m] @ w[e(m)].T if `transpose_w`.

  Args:
    x_MD: sorted rows, as wide as the contracted side of `w_EDF`.
    w_EDF: one matrix an expert.
    group_sizes_E: rows of each expert.
    block_rows: rows of a step, at most M.
    transpose_w: contract F instead of D.

  Returns:
    [M, F], or [M, D] if transposed, in x's type; 0 past the last group.
  """
  num_rows = x_MD.shape[0]
  width_out = w_EDF.shape[1 if transpose_w else 2]
  contract = (((1,), (1 if transpose_w else 0,)), ((), ()))

  def one_expert(y, expert):
    w_DF, start, end = expert

    def one_block(i, y):
      at, mask = _block(start, end, i, num_rows, block_rows)
      x_block = lax.dynamic_slice_in_dim(x_MD, at, block_rows)
      y_block = lax.dot_general(
        x_block, w_DF, contract, preferred_element_type=jnp.float32
      ).astype(y.dtype)
      before = lax.dynamic_slice_in_dim(y, at, block_rows)
      y_block = jnp.where(mask, y_block, before)
      return lax.dynamic_update_slice_in_dim(y, y_block, at, 0)

    num_blocks = (end - start + block_rows - 1) // block_rows
    return lax.fori_loop(0, num_blocks, one_block, y), None

  end_E = jnp.cumsum(group_sizes_E)
  y = jnp.zeros((num_rows, width_out), x_MD.dtype)
  y, _ = lax.scan(one_expert, y, (w_EDF, end_E - group_sizes_E, end_E))
  return y


def weight_gradient(
  x_MD: Float[Array, 'M D'],
  dy_MF: Float[Array, 'M F'],
  group_sizes_E: Int[Array, ' E'],
  *,
  block_rows: int,
) -> Float[Array, 'E D F']:
  """dw[e] = sum over the rows of group e of x[m]^T dy[m], float32.

  Args:
    x_MD: sorted rows.
    dy_MF: cotangent of their products.
    group_sizes_E: rows of each expert.
    block_rows: rows of a step, at most M.
  """
  num_rows, dim = x_MD.shape
  width = dy_MF.shape[1]

  def one_expert(carry, expert):
    start, end = expert

    def one_block(i, dw_DF):
      at, mask = _block(start, end, i, num_rows, block_rows)
      x_block = lax.dynamic_slice_in_dim(x_MD, at, block_rows)
      dy_block = lax.dynamic_slice_in_dim(dy_MF, at, block_rows)
      # Both sides: 0 * NaN of a row outside the group would still be NaN.
      return dw_DF + lax.dot_general(
        jnp.where(mask, x_block, 0),
        jnp.where(mask, dy_block, 0),
        (((0,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
      )

    num_blocks = (end - start + block_rows - 1) // block_rows
    zeros = jnp.zeros((dim, width), jnp.float32)
    return carry, lax.fori_loop(0, num_blocks, one_block, zeros)

  end_E = jnp.cumsum(group_sizes_E)
  _, dw_EDF = lax.scan(one_expert, None, (end_E - group_sizes_E, end_E))
  return dw_EDF


def _block(
  start: Array, end: Array, i: Array, num_rows: int, block_rows: int
) -> tuple[Int[Array, ''], Bool[Array, 'b 1']]:
  """Where block i of a group is read, and which of its rows are new.

  The end of the array clamps the position: the block then begins with rows
  that earlier blocks have done.
  """
  first = start + i * block_rows
  at = jnp.minimum(first, num_rows - block_rows)
  row = at + jnp.arange(block_rows, dtype=at.dtype)
  return at, ((row >= first) & (row < end))[:, None]
