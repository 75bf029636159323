"""Which rows a tile of the device kernels holds.

Tiles begin at the first row of their group, rounded down to a multiple of
`ALIGNMENT`: a group of n rows needs about ceil(n / height) of them, where a
grid aligned with the array would cut a tile more at every boundary. Rows past
the last group form one more group, which the kernels fill with zeros.

Letters: E experts, N tiles.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

ALIGNMENT = 8
"""Copies to and from tiled shared memory begin at multiples of this."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowTiles:
  """The tiles of all groups, in the order in which they are begun.

  Attributes:
    expert_N: group of a tile; E for rows past the last group.
    column_N: which of the group's strips of columns it lies in.
    first_N: its first row, a multiple of `ALIGNMENT`.
    low_N: the first of its rows that is the group's, counted from `first_N`.
    high_N: one past the last, at most the tile's height.
    count_1: how many tiles there are; the rest of the arrays is unused.
  """

  expert_N: Any
  column_N: Any
  first_N: Any
  low_N: Any
  high_N: Any
  count_1: Any


def row_tiles(
  group_sizes_E: Int[Array, ' E'],
  num_rows: int,
  *,
  height: int,
  num_columns: int,
  band: int,
) -> RowTiles:
  """Cuts every group into tiles.

  Tiles that run at the same time should share what they read. So a group is
  cut into bands of a few tiles in height, and a band is walked strip by strip,
  downwards in each: neighbours in time read the same part of the matrix, and a
  band's rows are read again while they are still in the L2 cache.

  Args:
    group_sizes_E: int32, rows of each expert.
    num_rows: M, of which the groups may leave some at the end.
    height: rows of a tile, a multiple of `ALIGNMENT`.
    num_columns: strips of columns.
    band: tiles in the height of a band.
  """
  num_groups = group_sizes_E.shape[0] + 1
  # The most tiles that any sizes need: each group begins up to 7 rows early
  # and ends with a ragged tile.
  most = (num_rows + num_groups * (ALIGNMENT - 1)) // height + num_groups
  sizes = group_sizes_E.astype(jnp.int32)
  sizes_G = jnp.append(sizes, num_rows - jnp.sum(sizes))
  end_G = jnp.cumsum(sizes_G)
  start_G = end_G - sizes_G
  first_G = start_G // ALIGNMENT * ALIGNMENT
  high_G = jnp.where(sizes_G > 0, (end_G - first_G + height - 1) // height, 0)
  end_tile_G = jnp.cumsum(high_G * num_columns)
  tile_N = jnp.arange(most * num_columns, dtype=jnp.int32)
  group_N = jnp.sum(
    tile_N[:, None] >= end_tile_G[None, :], axis=-1, dtype=jnp.int32
  )
  group_N = jnp.minimum(group_N, num_groups - 1)
  tiles_high_N = high_G[group_N]
  inside_N = tile_N - end_tile_G[group_N] + tiles_high_N * num_columns
  band_N = inside_N // (band * num_columns)
  inside_N -= band_N * band * num_columns
  band_high_N = jnp.clip(tiles_high_N - band_N * band, 1, band)
  row_N = band_N * band + inside_N % band_high_N
  first_N = first_G[group_N] + row_N * height
  return RowTiles(
    expert_N=group_N,
    column_N=inside_N // band_high_N,
    first_N=first_N,
    low_N=jnp.clip(start_G[group_N] - first_N, 0, height),
    high_N=jnp.clip(end_G[group_N] - first_N, 0, height),
    count_1=end_tile_G[-1:],
  )
