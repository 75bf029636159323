"""Grouped products as one batched product over blocks.

Every group is padded to a multiple of the block by a gather, the matrices are
gathered one a block, and the result is gathered back. There are always
M // b + E blocks, the most that groups can need, so shapes are static and
nothing runs in sequence. Blocks beyond those needed repeat the last expert
and are dropped.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def product(
  x_MD: Float[Array, 'M K'],
  w_EDF: Float[Array, 'E D F'],
  group_sizes_E: Int[Array, ' E'],
  *,
  block_rows: int,
  transpose_w: bool,
) -> Float[Array, 'M O']:
  """y[m] = x[m] @ w[e(m)], or x[m] @ w[e(m)].T if `transpose_w`.

  Args and Returns: as `xla_loop.product`.
  """
  blocks = _layout(x_MD.shape[0], group_sizes_E, block_rows)
  y_nbf = jnp.einsum(
    'nbf,ndf->nbd' if transpose_w else 'nbd,ndf->nbf',
    _take(x_MD, blocks.row_nb),
    _take(w_EDF, blocks.expert_n),
    preferred_element_type=jnp.float32,
  ).astype(x_MD.dtype)
  y_MF = _take(y_nbf.reshape(-1, y_nbf.shape[-1]), blocks.slot_M)
  return jnp.where(blocks.is_used_M[:, None], y_MF, 0)


def weight_gradient(
  x_MD: Float[Array, 'M D'],
  dy_MF: Float[Array, 'M F'],
  group_sizes_E: Int[Array, ' E'],
  *,
  block_rows: int,
) -> Float[Array, 'E D F']:
  """dw[e] = sum over the rows of group e of x[m]^T dy[m], float32.

  Args: as `xla_loop.weight_gradient`.
  """
  num_rows = x_MD.shape[0]
  blocks = _layout(num_rows, group_sizes_E, block_rows)
  mask_nb1 = blocks.is_used_nb[:, :, None]
  # Both sides: 0 * NaN of a row outside the group would still be NaN.
  dw_nDF = jnp.einsum(
    'nbd,nbf->ndf',
    jnp.where(mask_nb1, _take(x_MD, blocks.row_nb), 0),
    jnp.where(mask_nb1, _take(dy_MF, blocks.row_nb), 0),
    preferred_element_type=jnp.float32,
  )
  # Sums of the blocks of an expert, which are neighbours: after the step with
  # shift s, block i holds blocks i..i + 2 s - 1 as far as they are of its
  # expert. Always the same order, unlike a scatter-add on a GPU.
  expert_n = blocks.expert_n
  shift = 1
  while shift < -(-num_rows // block_rows):
    same_n = expert_n[:-shift] == expert_n[shift:]
    later_nDF = jnp.where(same_n[:, None, None], dw_nDF[shift:], 0)
    dw_nDF = dw_nDF + jnp.pad(later_nDF, ((0, shift), (0, 0), (0, 0)))
    shift *= 2
  dw_EDF = _take(dw_nDF, blocks.first_block_E)
  return jnp.where((group_sizes_E > 0)[:, None, None], dw_EDF, 0)


@dataclasses.dataclass(frozen=True)
class _Blocks:
  """Layout of the padded rows: n blocks of b rows.

  Attributes:
    expert_n: expert of a block.
    first_block_E: first block of an expert.
    row_nb: sorted row that a padded row reads; may lie past M.
    is_used_nb: whether that row belongs to the block's expert.
    slot_M: padded row (flat) of a sorted row.
    is_used_M: whether a sorted row belongs to any expert.
  """

  expert_n: Array
  first_block_E: Array
  row_nb: Array
  is_used_nb: Array
  slot_M: Array
  is_used_M: Array


def _layout(num_rows: int, group_sizes_E: Array, block_rows: int) -> _Blocks:
  """Assigns blocks to experts in order, ceil(size / b) each."""
  num_experts = group_sizes_E.shape[0]
  num_blocks = num_rows // block_rows + num_experts
  end_E = jnp.cumsum(group_sizes_E)
  start_E = end_E - group_sizes_E
  blocks_E = (group_sizes_E + block_rows - 1) // block_rows
  end_block_E = jnp.cumsum(blocks_E)
  first_block_E = end_block_E - blocks_E

  block_n = jnp.arange(num_blocks, dtype=group_sizes_E.dtype)
  expert_n = _owner(block_n, end_block_E)
  offset_n = (block_n - first_block_E[expert_n]) * block_rows
  offset_nb = (
    offset_n[:, None]
    + jnp.arange(block_rows, dtype=group_sizes_E.dtype)[None, :]
  )
  row_M = jnp.arange(num_rows, dtype=group_sizes_E.dtype)
  expert_M = _owner(row_M, end_E)
  return _Blocks(
    expert_n=expert_n,
    first_block_E=first_block_E,
    row_nb=start_E[expert_n][:, None] + offset_nb,
    is_used_nb=offset_nb < group_sizes_E[expert_n][:, None],
    slot_M=first_block_E[expert_M] * block_rows + row_M - start_E[expert_M],
    is_used_M=row_M < end_E[-1],
  )


def _owner(position: Array, end_E: Array) -> Array:
  """The expert whose range holds a position; past the end, the last one."""
  is_past = position[:, None] >= end_E[None, :]
  expert = jnp.sum(is_past, axis=-1, dtype=position.dtype)
  return jnp.minimum(expert, end_E.shape[0] - 1)


def _take(array: Array, index: Array) -> Array:
  """Rows of an array; positions past the end read the last row."""
  return jnp.take(array, index, axis=0, mode='clip')
