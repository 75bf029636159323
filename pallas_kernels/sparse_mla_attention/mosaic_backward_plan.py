"""Sizes, memory and barriers of the backward kernel, for all of its files.

Letters: N rows (batch and queries), H heads (padded to 64 or to 128s), C latent
width, W = C + rope width padded to 64s, K selected keys (a multiple of 64), S
keys of all batches.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.sparse_mla_attention import mosaic_gather, mosaic_products

HEADS = 64
KEYS = mosaic_gather.ROWS
CHUNK = mosaic_gather.CHUNK
P, D_S = 0, 1  # What is passed on from the heads' passes to the columns'.


def padded_heads(num_heads: int) -> int:
  """A number of heads that the kernel takes, at least `num_heads`."""
  granule = HEADS if num_heads <= HEADS else 2 * HEADS
  return -(-num_heads // granule) * granule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """One call's sizes.

  A task is one row and its `groups` times 64 heads. A tile is 64 keys.

  Attributes:
    num_rows: N.
    num_heads: H.
    latent_dim: C.
    tile_width: W.
    num_blocks: tiles of a row.
    rows_per_batch: rows that share a batch's keys.
    keys_per_batch: S of one batch.
    scale: factor of the scores.
    target: what the kernel is built for.
  """

  num_rows: int
  num_heads: int
  latent_dim: int
  tile_width: int
  num_blocks: int
  rows_per_batch: int
  keys_per_batch: int
  scale: float
  target: mosaic.Target

  @property
  def half(self) -> int:
    """Half of the latent columns."""
    return self.latent_dim // 2

  @property
  def groups(self) -> int:
    """64s of heads whose key gradients are summed before they are added."""
    return 2 if self.num_heads > HEADS else 1

  @property
  def tasks_per_row(self) -> int:
    return self.num_heads // (HEADS * self.groups)

  @property
  def num_tasks(self) -> int:
    return self.num_rows * self.tasks_per_row

  @functools.cached_property
  def num_programs(self) -> int:
    """Blocks of threads."""
    if self.target.interprets:
      return 1  # Its additions to global memory aren't atomic.
    return min(mosaic.num_multiprocessors(self.target), self.num_tasks)

  @property
  def columns(self) -> tuple[tuple[int, int], ...]:
    """First and number: the latent's left and right half, and the rest."""
    rest = (self.latent_dim, self.tile_width - self.latent_dim)
    return (0, self.half), (self.half, self.half), rest

  @property
  def weights_shape(self) -> tuple[int, int, int]:
    """Of the memory through which p and d_s are passed on; unused for one."""
    if self.groups == 1:
      return 1, HEADS, KEYS
    tiles = self.num_programs * 2 * self.groups * self.num_blocks
    return tiles, HEADS, KEYS

  def num_local_tasks(self, program: Any) -> Any:
    """Tasks of a block of threads."""
    return (self.num_tasks - program + self.num_programs - 1) // (
      self.num_programs
    )

  def locate(self, i: Any) -> tuple[Any, Any]:
    """Row, and the first 64 heads, of this block's task number `i`."""
    task = lax.axis_index('program') + i * self.num_programs
    row = task // self.tasks_per_row
    return row, lax.rem(task, self.tasks_per_row) * self.groups

  def first_key(self, row: Any) -> Any:
    """Where the keys of a row's batch start."""
    return row // self.rows_per_batch * self.keys_per_batch

  def weights_tile(self, which: int, group: Any, block: Any) -> Any:
    """Number of the tile that holds `P` or `D_S`, of this block of threads."""
    number = lax.axis_index('program') * 2 + which
    return (number * self.groups + group) * self.num_blocks + block


@dataclasses.dataclass(frozen=True)
class Refs:
  """What the kernel works on; shared memory is named `..._smem` or tiles.

  Attributes:
    q: [N, H, W] in global memory.
    d_out: [N, H, C].
    kv: [S, X].
    indices: int32, flat.
    lse: [N, H].
    delta: [N, H].
    sums: [S, W], to be added to.
    d_q: [N, H, W], an output.
    weights: p and d_s, written and read again.
    q_smem: three, of the columns' parts; in the passes over columns the first
      two hold the same columns of two 64s of heads.
    d_out_smem: two, likewise.
    kv_smem: a tile of keys; in the passes over columns its memory holds the
      next three.
    p_tiles: two slots.
    d_s_tiles: two slots.
    rope_smem: rotary columns of q, of the second 64 heads.
    p_smem: p on its way to the other warpgroup.
    d_s_smem: d_s likewise.
    landed: completes when the left half, or the rest, of `kv_smem` is there.
    heads_ready: q and d_out of a pass over heads are there.
    halves_ready: q and d_out of a pass over columns are there; two.
    free: the owner of a part of `kv_smem` is done with it.
    p_ready: `p_smem` is written.
    d_s_ready: `d_s_smem` is written.
    tile_ready: a slot of tiles is there.
    tile_free: both warpgroups are done with a slot.
    second_done: `p_smem` was read for the last time, where it isn't passed on.
    turn: a warpgroup may start its products in a pass over columns; two.
    done: both warpgroups are done with a pass, and what they wrote is there.
  """

  q: Any
  d_out: Any
  kv: Any
  indices: Any
  lse: Any
  delta: Any
  sums: Any
  d_q: Any
  weights: Any
  q_smem: Any
  d_out_smem: Any
  kv_smem: Any
  p_tiles: Any
  d_s_tiles: Any
  rope_smem: Any
  p_smem: Any
  d_s_smem: Any
  landed: mosaic_gather.Landed
  heads_ready: Any
  halves_ready: Any
  free: Any
  p_ready: Any
  d_s_ready: Any
  tile_ready: Any
  tile_free: Any
  second_done: Any
  turn: Any
  done: Any

  @staticmethod
  def of(plan: Plan, refs: tuple[Any, ...]) -> 'Refs':
    """From what the kernel's body gets."""
    kv_smem, (p_tiles, d_s_tiles, rope_smem) = refs[14]
    p_smem, d_s_smem, landed, heads_ready = refs[15:19]
    values: tuple[Any, ...] = (
      *refs[:9],
      refs[9:12],
      refs[12:14],
      kv_smem,
      p_tiles,
      d_s_tiles,
      rope_smem,
      p_smem,
      d_s_smem,
      mosaic_gather.Landed(landed, plan.target),
      heads_ready,
      refs[19:21],
      *refs[21:],
    )
    return Refs(*values)


def scratch(plan: Plan) -> list[Any]:
  """Shared memory and barriers, in the order that `Refs.of` takes."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  half = mosaic_gather.tile((1, HEADS, plan.half))
  rope = mosaic_gather.tile((1, HEADS, plan.columns[2][1]))
  square = mosaic_gather.tile((HEADS, KEYS))
  squares = mosaic_gather.tile((2, plan.groups, HEADS, KEYS))
  keys = mosaic_gather.tile((1, KEYS, plan.tile_width))
  return [
    half,
    half,
    rope,
    half,
    half,
    plgpu.RefUnion(keys, [squares, squares, rope]),
    square,
    square,
    mosaic_gather.Landed.scratch(2, plan.target),
    plgpu.Barrier(num_arrivals=5),
    plgpu.Barrier(num_arrivals=2 * plan.groups),
    plgpu.Barrier(num_arrivals=3 * plan.groups),
    plgpu.Barrier(num_barriers=2),
    plgpu.Barrier(),
    plgpu.Barrier(),
    plgpu.Barrier(num_arrivals=2 * plan.groups, num_barriers=2),
    plgpu.Barrier(num_arrivals=2, num_barriers=2),
    plgpu.Barrier(),
    plgpu.Barrier(num_barriers=2),
    plgpu.Barrier(num_arrivals=2),
  ]


def load_indices(plan: Plan, refs: Refs, row: Any, block: Any, layout: Any):
  """The keys of a tile, in a layout of registers; -1 is none."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu

  start = (row * plan.num_blocks + block) * KEYS
  return plgpu.load(
    refs.indices.at[pl.ds(start, KEYS)], layout=layout, optimized=False
  )


def hidden(ref: Any, target: mosaic.Target) -> Any:
  """The first of a ref's first dimension, see `mosaic_products.opaque`."""
  return ref.at[mosaic_products.opaque(0, target)]


def accumulator(num_columns: int = KEYS) -> Any:
  """Of products with 64 rows, in registers."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  return plgpu.ACC((HEADS, num_columns), jnp.float32)
