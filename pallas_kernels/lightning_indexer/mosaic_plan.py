"""Which block of queries meets which tiles of keys, and on which processor.

Letters: B batch, T query tokens, S key tokens.

The work is the list of (block of queries, tile of keys) that some query of the
block may see, block after block. It is cut into equal runs, one a processor:
nothing is computed for keys outside every range of a block, and no processor
waits for another at the end, whatever the ranges are.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Int

from pallas_kernels.lightning_indexer import mosaic_ptx as ptx

# Columns of the table of blocks.
FIRST = 0  # first tile of keys that a query of the block sees
COUNT = 1  # how many tiles
END = 2  # tiles of this block and all before
FULL_FIRST = 3  # tiles that every query sees as a whole: first,
FULL_END = 4  # one past the last


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
  """What a kernel is built for; everything static.

  Attributes:
    batch: B.
    num_queries: T.
    num_keys: S.
    heads: J.
    dim: I.
    fp8: q and k are float8_e4m3fn, and keys have scales.
    out_dtype: of the scores.
    groups: warpgroups that compute, 1 to 4.
    slabs: products of 128 rows that each of them owns, 1 or 2.
    stages: tiles of keys in flight.
    unroll: tiles between which the products of a warpgroup overlap.
    blocks_per_multiprocessor: that run at once on one.
    fills: write -inf where no query of a block sees a tile.
    page: keys of a page, a multiple of a tile; 0 where keys lie in one piece.
  """

  batch: int
  num_queries: int
  num_keys: int
  heads: int
  dim: int
  fp8: bool
  out_dtype: Any
  groups: int
  slabs: int
  stages: int
  unroll: int
  blocks_per_multiprocessor: int = 1
  fills: bool = True
  page: int = 0

  @property
  def rows(self) -> int:
    return self.groups * self.slabs * ptx.ROWS

  @property
  def query_block(self) -> int:
    return self.rows // self.heads

  @property
  def blocks_a_row(self) -> int:
    return pl.cdiv(self.num_queries, self.query_block)

  @property
  def blocks(self) -> int:
    return self.batch * self.blocks_a_row

  @property
  def key_tiles(self) -> int:
    return pl.cdiv(self.num_keys, ptx.KEYS)

  @property
  def dtype(self) -> Any:
    return jnp.float8_e4m3fn if self.fp8 else jnp.bfloat16

  @property
  def row_bytes(self) -> int:
    return self.dim * (1 if self.fp8 else 2)


def make_plan(
  key_start_BT: Int[Array, 'B T'],
  key_end_BT: Int[Array, 'B T'],
  *,
  num_keys: int,
  query_block: int,
  key_tile: int,
) -> Array:
  """The table of blocks, int32 [B * ceil(T / query_block), 8].

  Args:
    key_start_BT: first valid key of each query, 0 .. S.
    key_end_BT: one past the last, 0 .. S.
    num_keys: S.
    query_block: queries of a block.
    key_tile: keys of a tile.
  """
  num_queries = key_start_BT.shape[1]
  missing = -num_queries % query_block
  if num_queries == 1:
    # Decoding: a query is a block. Every small kernel counts there.
    return _plan_of_queries(
      key_start_BT[:, 0], key_end_BT[:, 0], key_tile=key_tile
    )

  def split(x_BT: Array, fill: int) -> Array:
    x_BT = jnp.pad(x_BT, ((0, 0), (0, missing)), constant_values=fill)
    return x_BT.reshape(-1, query_block)

  some_BT = key_end_BT > key_start_BT
  starts_BT = jnp.where(some_BT, key_start_BT, num_keys)
  first = jnp.min(split(starts_BT, num_keys), 1)
  last = jnp.max(split(jnp.where(some_BT, key_end_BT, 0), 0), 1)
  first = first // key_tile
  count = jnp.maximum((last + key_tile - 1) // key_tile - first, 0)
  full_first = jnp.max(split(key_start_BT, 0), 1)
  full_end = jnp.min(split(key_end_BT, num_keys), 1)
  columns = [
    first,
    count,
    _running_sum(count),
    (full_first + key_tile - 1) // key_tile,
    full_end // key_tile,
  ]
  blocks = jnp.stack(columns, axis=1).astype(jnp.int32)
  return jnp.pad(blocks, ((0, 0), (0, 8 - len(columns))))


def _running_sum(count: Array) -> Array:
  if count.size > 2048:
    return jnp.cumsum(count)
  # One small kernel, where a scan is several.
  index = jnp.arange(count.size)
  before = index[None] <= index[:, None]
  return jnp.sum(jnp.where(before, count[None], 0), axis=1)


def _plan_of_queries(start_B: Array, end_B: Array, *, key_tile: int) -> Array:
  """`make_plan` of one query a row, with one reduction instead of six."""
  some_B = end_B > start_B
  first_B = start_B // key_tile
  last_B = (end_B + key_tile - 1) // key_tile
  count_B = jnp.where(some_B, last_B - first_B, 0)
  columns = [
    first_B,
    count_B,
    _running_sum(count_B),
    (start_B + key_tile - 1) // key_tile,
    end_B // key_tile,
  ]
  blocks = jnp.stack(columns, axis=1).astype(jnp.int32)
  return jnp.pad(blocks, ((0, 0), (0, 8 - len(columns))))


# The rest runs in a kernel: scalars, and the table's ref.


def share_of(total: Any, processor: Any, processors: int) -> tuple[Any, Any]:
  """(first, end) of a processor's run in a list of `total` entries."""
  share = (total + processors - 1) // processors
  first = jnp.minimum(processor * share, total)
  return first, jnp.minimum(first + share, total)


def block_of(entry: Any, end_of: Callable[[Any], Any], num_blocks: int) -> Any:
  """The first block whose `end_of` is beyond `entry`; at most the last."""

  def halve(_: Any, bounds: tuple[Any, Any]) -> tuple[Any, Any]:
    low, high = bounds
    middle = (low + high) // 2
    beyond = end_of(middle) > entry
    return (
      jnp.where(beyond, low, jnp.minimum(middle + 1, high)),
      jnp.where(beyond, middle, high),
    )

  steps = max(num_blocks - 1, 0).bit_length()
  bounds = (jnp.int32(0), jnp.int32(num_blocks - 1))
  return lax.fori_loop(0, steps, halve, bounds)[0]


def tiles_end(blocks: Any, block: Any) -> Any:
  """Computed tiles of this block and all before."""
  return blocks[block, END]


def fills_end(blocks: Any, block: Any, key_tiles: int) -> Any:
  """Tiles that no query sees, of this block and all before."""
  return (block + 1) * key_tiles - blocks[block, END]


def place_of(refs: Any, shape: Shape, batch: Any, tile: Any) -> tuple[Any, Any]:
  """(row or page, first key in it) of a tile of keys in memory."""
  if not shape.page:
    return batch, tile * ptx.KEYS
  tiles_a_page = shape.page // ptx.KEYS
  page = refs['pages'][batch, tile // tiles_a_page]
  return page, lax.rem(tile, tiles_a_page) * ptx.KEYS
