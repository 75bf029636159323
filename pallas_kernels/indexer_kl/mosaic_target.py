"""The head-summed target over one key head, on Hopper.

A block works on one query at a time. The query's heads stay in shared memory;
tiles of 64 keys pass by in chunks of 64 columns, each with a barrier of its
own. The product has the keys as its rows, so that the sum over heads is a sum
over registers and four lanes. Two warpgroups take turns: the exponentials of
one tile run under the products of the other. A third loads.

Letters: T queries (of all sequences), S keys, H heads, X width (a multiple of
64), K columns of the result.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.indexer_kl import mosaic_rows
from pallas_kernels.indexer_kl.mosaic_rows import CHUNK, TILE


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
  """Sizes of the target's pipeline.

  Attributes:
    stages: tiles of keys in shared memory: 1, or an even number.
    lag: chunks whose gathers may be under way when the next starts.
  """

  stages: int
  lag: int


def target(
  q_THX: jax.Array,
  k_SX: jax.Array,
  lse_TH: jax.Array,
  indices_TK: jax.Array | None,
  start_T: jax.Array | None,
  end_T: jax.Array | None,
  *,
  scale: float,
  blocks: Blocks,
  on: mosaic.Target,
  mean_over: int | None = None,
  num_columns: int | None = None,
) -> jax.Array:
  """1/H sum_h exp(scale * q[t, h] . k[s] - lse[t, h]): float32 [T, K].

  With indices, column k belongs to row indices[t, k] (to some row where that is
  negative). With ranges, column s to row s, and only the tiles of 64 columns
  that the range touches are written.

  Args:
    q_THX: bfloat16, H a multiple of 8 up to 128.
    k_SX: bfloat16.
    lse_TH: float32, natural logarithm, with no -inf.
    indices_TK: int32, K a multiple of 64.
    start_T: int32 first rows, if there are no indices.
    end_T: int32, one past the last rows.
    scale: factor of the scores.
    blocks: pipeline.
    on: where it runs.
    mean_over: H, without padding.
    num_columns: K, with ranges: a multiple of 64.
  """
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu

  num_queries, num_heads, width = q_THX.shape
  chunks = width // CHUNK
  stages = blocks.stages
  # A chunk counts as used when the next one's product has begun.
  lag = max(min(blocks.lag, stages * chunks - 2), 0)
  # A query's first chunks wait until the same chunks of the query before were
  # used: with few chunks those must be announced first.
  flush = lag > chunks - 2
  gathers = indices_TK is not None
  if gathers:
    num_columns = indices_TK.shape[1]
    tiles = num_columns // TILE
  blocks_at_once = mosaic.num_multiprocessors(on)
  num_blocks = min(blocks_at_once, num_queries)
  # A warpgroup waits for its own tiles only, hence has barriers of its own.
  ready_stages = max(stages, 2)
  factor = scale * math.log2(math.e)
  lse2_TH = lse_TH * math.log2(math.e) + math.log2(mean_over or num_heads)
  # Asynchronous copies come in multiples of 128 bytes.
  lse2_TH = jnp.pad(lse2_TH, ((0, 0), (0, -num_heads % 32)))
  padded_heads = lse2_TH.shape[1]

  def body(*refs):
    if gathers:
      q_ref, k_ref, lse_ref, indices_ref, p_ref, *scratch = refs
    else:
      q_ref, k_ref, lse_ref, start_ref, end_ref, p_ref, *scratch = refs
    q_smem, k_smem, lse_smem, ready, free, q_ready, q_free, lse_ready = scratch
    thread = lax.axis_index('wg')
    block = lax.axis_index('sm')
    num_local = (num_queries - block + num_blocks - 1) // num_blocks

    def tiles_of(t):
      """First tile of a query, and how many."""
      if gathers:
        return jnp.int32(0), jnp.int32(tiles)
      start, end = start_ref[t], end_ref[t]
      first = start // TILE
      count = jnp.where(end > start, (end + TILE - 1) // TILE - first, 0)
      return first, count

    @pl.when(thread < 2)
    def _():
      if not on.interprets:
        plgpu.set_max_registers(216, action='increase')

      def query(i, before):
        t = block + i * num_blocks
        first_tile, count = tiles_of(t)
        own = lax.rem(thread + before, 2)
        num_own = jnp.maximum((count - own + 1) // 2, 0)

        def tile(n, _):
          g = before + own + 2 * n
          k_slot = lax.rem(g, stages) * chunks
          barrier = lax.rem(g, ready_stages) * chunks

          def product(acc):
            def release(c):
              plgpu.barrier_arrive(free.at[k_slot + c])

              @pl.when(n == num_own - 1)
              def _():
                plgpu.barrier_arrive(q_free.at[c])

            for c in range(chunks):

              @pl.when(n == 0)
              def _(c=c):
                plgpu.barrier_wait(q_ready.at[c])
                if c == 0:
                  # Before q_free lets the next query's come.
                  plgpu.barrier_wait(lse_ready)

              plgpu.barrier_wait(ready.at[barrier + c])
              plgpu.wgmma(
                acc, k_smem.at[k_slot + c], q_smem.at[c].transpose((1, 0))
              )
              if c:
                plgpu.wgmma_wait(1)
                release(c - 1)
            plgpu.wgmma_wait(0)
            release(chunks - 1)
            return acc[...]

          scores = pl.run_scoped(
            product, plgpu.ACC((TILE, num_heads), jnp.float32)
          )
          lse = plgpu.load(
            lse_smem.at[lax.rem(i, 2), pl.ds(0, num_heads)],
            layout=plgpu.Layout.WGMMA.reduce(0),
          )
          lse = lax.broadcast_in_dim(lse, (TILE, num_heads), [1])
          mass = jnp.exp2(scores * factor - lse)
          column = (first_tile + own + 2 * n) * TILE
          p_ref[t, pl.ds(column, TILE)] = jnp.sum(mass, axis=1)
          return ()

        lax.fori_loop(0, num_own, tile, ())

        @pl.when(num_own == 0)
        def _():
          plgpu.barrier_wait(lse_ready)
          for c in range(chunks):
            plgpu.barrier_wait(q_ready.at[c])
            plgpu.barrier_arrive(q_free.at[c])

        return before + count

      lax.fori_loop(0, num_local, query, jnp.int32(0))

    @pl.when(thread == 2)
    def _():
      if not on.interprets:
        plgpu.set_max_registers(56, action='decrease')

      def load_query_chunk(i, t, c):
        @pl.when(i > 0)
        def _():
          plgpu.barrier_wait(q_free.at[c])

        plgpu.copy_gmem_to_smem(
          q_ref.at[t, :, pl.ds(c * CHUNK, CHUNK)], q_smem.at[c], q_ready.at[c]
        )
        if c == 0:
          plgpu.copy_gmem_to_smem(
            lse_ref.at[t], lse_smem.at[lax.rem(i, 2)], lse_ready
          )

      def announce_earlier(g, n, c):
        """Chunk c of tile g has come, counted back where c is negative.

        Unless there is none: n tiles come before tile g.
        """
        tile, c = c // chunks, c % chunks
        barrier = ready.at[lax.rem(g + tile, ready_stages) * chunks + c]
        if isinstance(n, int):
          if n + tile >= 0:
            plgpu.barrier_arrive(barrier)
        elif tile >= 0:
          plgpu.barrier_arrive(barrier)
        else:
          pl.when(n + tile >= 0)(lambda: plgpu.barrier_arrive(barrier))

      def announce_all(g):
        mosaic_rows.wait_gathers(0)
        for c in range(-lag, 0):
          announce_earlier(g, tiles, c)

      def query(i, carry):
        t = block + i * num_blocks
        first_tile, count = tiles_of(t)

        def tile(n, carry):
          g, rows = carry
          slot = lax.rem(g, stages) * chunks
          next_rows = rows
          if gathers and not on.interprets:
            # The next tile's rows: their loads have a whole tile's time.
            next_rows = mosaic_rows.load_rows(
              indices_ref, _next_tile(t, n, tiles, num_blocks, num_queries)
            )
            if flush:
              pl.when((n == 0) & (g > 0))(lambda: announce_all(g))
          for c in range(chunks):
            pl.when(n == 0)(functools.partial(load_query_chunk, i, t, c))

            @pl.when(g >= stages)
            def _(c=c):
              plgpu.barrier_wait(free.at[slot + c])

            barrier = ready.at[lax.rem(g, ready_stages) * chunks + c]
            if not gathers:
              plgpu.copy_gmem_to_smem(
                k_ref.at[
                  pl.ds((first_tile + n) * TILE, TILE),
                  pl.ds(c * CHUNK, CHUNK),
                ],
                k_smem.at[slot + c],
                barrier,
              )
            elif on.interprets:
              mosaic_rows.copy_rows(
                k_ref,
                indices_ref,
                (t * tiles + n) * TILE,
                k_smem.at[slot + c],
                barrier,
                column=c * CHUNK,
                width=CHUNK,
              )
            else:
              mosaic_rows.gather_chunks(
                k_ref,
                rows,
                k_smem,
                (slot + c) * (TILE * CHUNK * 2),
                width=width,
                columns=(c * CHUNK,),
                tile_bytes=1024,
              )
              mosaic_rows.wait_gathers(lag)
              announce_earlier(g, n if flush else g, c - lag)

          return g + 1, next_rows

        carry = lax.fori_loop(0, count, tile, carry)

        # A query without keys still takes its turn.
        @pl.when(count == 0)
        def _():
          for c in range(chunks):
            load_query_chunk(i, t, c)

        return carry

      rows = ()
      if gathers and not on.interprets:
        rows = mosaic_rows.load_rows(indices_ref, block * tiles * TILE)
      total, _ = lax.fori_loop(0, num_local, query, (jnp.int32(0), rows))
      if gathers and not on.interprets:
        announce_all(total)
      # What is never awaited looks like a race.
      for stage in range(stages):

        @pl.when(total > stage)
        def _(stage=stage):
          for c in range(chunks):
            plgpu.barrier_wait(free.at[stage * chunks + c])

      for c in range(chunks):
        plgpu.barrier_wait(q_free.at[c])

  operands = (indices_TK.reshape(-1),) if gathers else (start_T, end_T)
  arrivals = TILE if gathers and on.interprets else 1

  def operand(*shape):
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=mosaic_rows.transforms())

  return mosaic.kernel(
    body,
    target=on,
    out_type=jax.ShapeDtypeStruct((num_queries, num_columns), jnp.float32),
    grid=(num_blocks,),
    grid_names=('sm',),
    num_threads=3,
    thread_name='wg',
    scratch_types=[
      operand(chunks, num_heads, CHUNK),
      operand(stages * chunks, TILE, CHUNK),
      plgpu.SMEM((2, padded_heads), jnp.float32),
      plgpu.Barrier(num_arrivals=arrivals, num_barriers=ready_stages * chunks),
      plgpu.Barrier(num_barriers=stages * chunks),
      plgpu.Barrier(num_barriers=chunks),
      plgpu.Barrier(num_arrivals=2, num_barriers=chunks),
      plgpu.Barrier(),
    ],
  )(q_THX, k_SX, lse2_TH, *operands)


def _next_tile(t, n, tiles, stride, num_queries):
  """Offset of the indices of the tile after tile n of query t."""
  last = n == tiles - 1
  query = jnp.where(last, jnp.minimum(t + stride, num_queries - 1), t)
  return (query * tiles + jnp.where(last, 0, n + 1)) * TILE
