"""Which blocks of keys a tile of queries needs, and which of them whole.

Letters: B batch, T queries, S keys, N tiles of queries.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
  """Blocks of a tile: first <= whole_first <= whole_end <= end.

  Blocks from `first` to `end` hold a key that some query of the tile sees; in
  those from `whole_first` to `whole_end` every query sees every key, so that
  nothing has to be masked.

  Attributes:
    first: [B, N].
    whole_first: [B, N].
    whole_end: [B, N].
    end: [B, N]; equal to `first` where the tile sees no key.
  """

  first: Any
  whole_first: Any
  whole_end: Any
  end: Any


def key_blocks(
  start_BT: Int[Array, 'B T'],
  end_BT: Int[Array, 'B T'],
  *,
  num_keys: int,
  rows: int,
  columns: int,
) -> Blocks:
  """Blocks of `columns` keys for tiles of `rows` queries.

  Args:
    start_BT: first key of each query.
    end_BT: one past its last; a query without keys has end <= start.
    num_keys: S.
    rows: queries of a tile; divides T.
    columns: keys of a block.
  """
  batch = start_BT.shape[0]
  empty_BT = start_BT >= end_BT
  start_BNR = jnp.where(empty_BT, num_keys, start_BT).reshape(batch, -1, rows)
  end_BNR = jnp.where(empty_BT, 0, end_BT).reshape(batch, -1, rows)
  end_BNR = jnp.minimum(end_BNR, num_keys)
  first = jnp.min(start_BNR, axis=-1) // columns
  end = jnp.maximum(-(-jnp.max(end_BNR, axis=-1) // columns), first)
  whole_first = -(-jnp.max(start_BNR, axis=-1) // columns)
  whole_end = jnp.min(end_BNR, axis=-1) // columns
  whole_first = jnp.clip(whole_first, first, end)
  whole_end = jnp.clip(whole_end, whole_first, end)
  return Blocks(first, whole_first, whole_end, end)


def query_blocks(
  start_BT: Int[Array, 'B T'],
  end_BT: Int[Array, 'B T'],
  *,
  num_keys: int,
  rows: int,
  columns: int,
) -> Blocks:
  """The other way round: blocks of `columns` queries for tiles of `rows` keys.

  Exact for tiles whose queries are neighbours; any others in between are
  visited too, and masked.

  Args:
    start_BT: first key of each query.
    end_BT: one past its last.
    num_keys: S, a multiple of `rows`.
    rows: keys of a tile.
    columns: queries of a block; divides T.
  """
  batch, num_queries = start_BT.shape
  num_blocks = num_queries // columns
  empty_BT = start_BT >= end_BT
  start_BCQ = jnp.where(empty_BT, num_keys, start_BT).reshape(
    batch, num_blocks, columns
  )
  end_BCQ = jnp.where(empty_BT, 0, end_BT).reshape(batch, num_blocks, columns)
  low_N = jnp.arange(num_keys // rows, dtype=jnp.int32) * rows
  low_BNC = low_N[None, :, None]
  some_BNC = (jnp.min(start_BCQ, -1)[:, None] < low_BNC + rows) & (
    jnp.max(end_BCQ, -1)[:, None] > low_BNC
  )
  whole_BNC = (jnp.max(start_BCQ, -1)[:, None] <= low_BNC) & (
    jnp.min(end_BCQ, -1)[:, None] >= low_BNC + rows
  )
  block_C = jnp.arange(num_blocks, dtype=jnp.int32)

  def extent(is_in_BNC):
    first = jnp.min(jnp.where(is_in_BNC, block_C, num_blocks), axis=-1)
    end = jnp.max(jnp.where(is_in_BNC, block_C + 1, 0), axis=-1)
    return first, jnp.maximum(end, first)

  first, end = extent(some_BNC)
  whole_first, whole_end = extent(whole_BNC)
  # One run of whole blocks, or none: a gap in it would not be masked.
  solid = jnp.sum(whole_BNC, axis=-1) == whole_end - whole_first
  whole_first = jnp.where(solid, jnp.clip(whole_first, first, end), end)
  whole_end = jnp.where(solid, jnp.clip(whole_end, whole_first, end), end)
  return Blocks(first, whole_first, whole_end, end)
