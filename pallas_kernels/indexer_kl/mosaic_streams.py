"""Two streams of queries a block, each with its own ring of tiles of keys.

The indexer's kernels work on pairs of queries: warpgroup w of a block has query
2 * pair + w to itself, so its sums need no exchange, and its arithmetic runs
while the other's products do. A third warpgroup loads tiles for both.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.indexer_kl import mosaic_rows
from pallas_kernels.indexer_kl.mosaic_rows import CHUNK, TILE


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
  """Sizes of a pipeline.

  Attributes:
    stages: tiles in each of a block's two rings.
    lag: gathers that may be under way when the next starts; less than twice
      the stages.
    query_buffers: 1, or 2 to load the next query during this one.
  """

  stages: int
  lag: int
  query_buffers: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Streams:
  """What the warpgroups of a kernel agree on.

  Attributes:
    on: where the kernel runs.
    blocks: sizes.
    num_queries: even.
    width: of a row of index keys, a multiple of 64.
    tiles: of each query, None if ranges say so.
  """

  on: mosaic.Target
  blocks: Blocks
  num_queries: int
  width: int
  tiles: int | None

  @property
  def num_blocks(self) -> int:
    return min(mosaic.num_multiprocessors(self.on), self.num_queries // 2)

  @property
  def on_device_gathers(self) -> bool:
    return self.tiles is not None and not self.on.interprets

  def num_local(self) -> jax.Array:
    """Queries of each stream of this block."""
    pairs, blocks = self.num_queries // 2, self.num_blocks
    return (pairs - lax.axis_index('sm') + blocks - 1) // blocks

  def query(self, i: jax.Array, stream: jax.Array | int) -> jax.Array:
    """Number of a stream's i-th query."""
    return 2 * (lax.axis_index('sm') + i * self.num_blocks) + stream

  def tiles_of(self, t: jax.Array, source: tuple[Any, ...]) -> Any:
    """First tile of a query, and how many: with ranges, tiles of keys."""
    if self.tiles is not None:
      return jnp.int32(0), jnp.int32(self.tiles)
    start, end = source[0][t], source[1][t]
    first = start // TILE
    count = jnp.where(end > start, (end + TILE - 1) // TILE - first, 0)
    return first, count

  def scratch(self, *, extras: int) -> list[Any]:
    """k_smem, ready, free; a tile comes with `extras` other copies."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    rows = TILE if self.tiles is not None and self.on.interprets else 1
    slots = 2 * self.blocks.stages
    return [
      plgpu.SMEM(
        (slots, TILE, self.width),
        jnp.bfloat16,
        transforms=mosaic_rows.transforms(),
      ),
      plgpu.Barrier(num_arrivals=rows + extras, num_barriers=slots),
      plgpu.Barrier(num_barriers=slots),
    ]

  def load_tiles(
    self,
    k_ref: Any,
    source: tuple[Any, ...],
    k_smem: Any,
    ready: Any,
    free: Any,
    load_extras: Callable[..., None] = lambda *_: None,
  ) -> None:
    """The loading warpgroup.

    Args:
      k_ref: [S, width] bfloat16.
      source: (flat indices,) or (starts, ends).
      k_smem: ring.
      ready: barriers of tiles that have come.
      free: barriers of tiles that were used.
      load_extras: of (query, first column, slot, barrier); copies the rest.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    stages, lag = self.blocks.stages, self.blocks.lag
    tile_bytes = TILE * self.width * 2
    num_local = self.num_local()
    gathers = self.on_device_gathers
    tiles = self.tiles or 0  # of a query that gathers

    def next_rows(i, n, stream):
      """Rows of the tile after tile n of a stream's i-th query."""
      last = n == tiles - 1
      i = jnp.where(last, jnp.minimum(i + 1, num_local - 1), i)
      n = jnp.where(last, 0, n + 1)
      offset = (self.query(i, stream) * tiles + n) * TILE
      return mosaic_rows.load_rows(source[0], offset)

    def announce(g, stream):
      """Tile g, counted from this block's first, has come."""

      @pl.when(g >= 0)
      def _():
        plgpu.barrier_arrive(ready.at[stream * stages + lax.rem(g, stages)])

    def load(t, first, n, g, stream, rows):
      slot = stream * stages + lax.rem(g, stages)

      @pl.when(g >= stages)
      def _():
        plgpu.barrier_wait(free.at[slot])

      load_extras(t, (first + n) * TILE, slot, ready.at[slot])
      if self.tiles is None:
        plgpu.copy_gmem_to_smem(
          k_ref.at[pl.ds((first + n) * TILE, TILE)],
          k_smem.at[slot],
          ready.at[slot],
        )
      elif self.on.interprets:
        mosaic_rows.copy_rows(
          k_ref,
          source[0],
          (t * tiles + n) * TILE,
          k_smem.at[slot],
          ready.at[slot],
          column=0,
          width=self.width,
        )
      else:
        mosaic_rows.gather_chunks(
          k_ref,
          rows,
          k_smem,
          slot * tile_bytes,
          width=self.width,
          columns=tuple(range(0, self.width, CHUNK)),
          tile_bytes=TILE * self.width * 2 // 8,
        )
        mosaic_rows.wait_gathers(lag)
        announce(g + (stream - lag) // 2, (stream - lag) % 2)

    def pair(i, carry):
      spans = [
        self.tiles_of(self.query(i, stream), source) for stream in range(2)
      ]

      def step(n, carry):
        before, rows = carry
        rows = list(rows)
        for stream in range(2):
          first, count = spans[stream]
          t = self.query(i, stream)
          if gathers:
            following = next_rows(i, n, stream)
            load(t, first, n, before[stream] + n, stream, rows[stream])
            rows[stream] = following
          else:

            @pl.when(n < count)
            def _(first=first, t=t, stream=stream):
              load(t, first, n, before[stream] + n, stream, None)

        return before, tuple(rows)

      before, rows = carry
      steps = jnp.maximum(spans[0][1], spans[1][1])
      _, rows = lax.fori_loop(0, steps, step, (before, rows))
      return tuple(before[w] + spans[w][1] for w in range(2)), rows

    rows = ()
    if gathers:
      rows = tuple(
        mosaic_rows.load_rows(
          source[0],
          self.query(jnp.int32(0), stream) * tiles * TILE,
        )
        for stream in range(2)
      )
    totals, _ = lax.fori_loop(
      0, num_local, pair, ((jnp.int32(0), jnp.int32(0)), rows)
    )
    if gathers:
      mosaic_rows.wait_gathers(0)
      for step in range(-lag, 0):
        announce(totals[0] + step // 2, step % 2)
    # What is never awaited looks like a race.
    for stream in range(2):
      for stage in range(stages):

        @pl.when(totals[stream] > stage)
        def _(stream=stream, stage=stage):
          plgpu.barrier_wait(free.at[stream * stages + stage])

  def kernel(
    self, body: Callable[..., None], *, out_type: Any, scratch_types: Any
  ) -> Callable[..., Any]:
    """`mosaic.kernel` of three warpgroups a block."""
    return mosaic.kernel(
      body,
      target=self.on,
      out_type=out_type,
      scratch_types=scratch_types,
      grid=(self.num_blocks,),
      grid_names=('sm',),
      num_threads=3,
      thread_name='wg',
    )


def each_query(
  streams: Streams,
  stream: jax.Array,
  source: tuple[Any, ...],
  load_query: Callable[[jax.Array, jax.Array], None],
  work: Callable[..., None],
) -> None:
  """The loop of a computing warpgroup over its stream's queries.

  Args:
    streams: of the kernel.
    stream: 0 or 1.
    source: as `Streams.load_tiles` takes it.
    load_query: of (query, buffer); starts the copies of a query.
    work: of (query, buffer, first tile, number of tiles, tiles so far).
  """
  from jax.experimental import pallas as pl

  buffers = streams.blocks.query_buffers
  num_local = streams.num_local()

  def load(i):
    @pl.when(i < num_local)
    def _():
      buffer = stream * buffers + lax.rem(i, buffers)
      load_query(streams.query(i, stream), buffer)

  load(jnp.int32(0))

  def step(i, before):
    if buffers == 2:
      load(i + 1)
    t = streams.query(i, stream)
    first, count = streams.tiles_of(t, source)
    buffer = stream * buffers + lax.rem(i, buffers)
    work(t, buffer, first, count, before)
    if buffers == 1:
      load(i + 1)
    return before + count

  lax.fori_loop(0, num_local, step, jnp.int32(0))
