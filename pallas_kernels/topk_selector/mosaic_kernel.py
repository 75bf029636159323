"""The Mosaic GPU kernel of the token selection: one read of the row.

Letters: R rows, one for each query of the batch, S keys, K selected keys.

A block of threads walks over a row in tiles, which TMA copies bring to shared
memory ahead of need, also those of the next row. Scores that can still be
among the k best go to a list in shared memory. When it is full, the k best of
it are kept, and from then on a score must exceed the k-th of them; an equal
one has a higher index and loses the tie. So no row is read twice, whatever its
scores are: equal ones add nothing to a full list, and ascending ones only fill
it again and again. At the end the k best of the list set their bits in a mask
of the row, which gives their indices in ascending order. Atomics place the
entries of the list in any order, but the set, and so the result, is the same.

What threads do is in `selecting` and `threshold`; here is the order of steps.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.topk_selector import config, mosaic_steps, workspace


def kernel(
  num_rows: int,
  num_keys: int,
  dtype: Any,
  k: int,
  target: mosaic.Target,
  sizes: config.MosaicConfig,
  mask_words: int,
  as_mask: bool,
) -> Any:
  """(scores [R, S], first key [R], one past the last [R]) -> [R, K].

  Args:
    num_rows: R.
    num_keys: S; at least a tile, and rows are multiples of 16 bytes.
    dtype: of the scores.
    k: K, at most what the list has room for beside a tile.
    target: what to build for.
    sizes: of the kernel.
    mask_words: words of a row's mask, as many for each thread.
    as_mask: whether to write the masks, [R, mask_words], and no indices.
  """
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu

  tile, stages = sizes.tile, sizes.stages
  blocks = min(
    num_rows,
    sizes.blocks_per_multiprocessor * mosaic.num_multiprocessors(target),
  )
  make = mosaic_steps.plain if target.interprets else mosaic_steps.threads
  steps = make(sizes, k=k, mask_words=mask_words, dtype=dtype, as_mask=as_mask)

  def body(
    scores_ref,  # [R, S]
    start_ref,  # [R]
    end_ref,  # [R]
    out_ref,  # [R, K] or [R, mask_words]
    tiles_ref,  # [stages, tile]
    list_scores_ref,  # [capacity]
    list_indices_ref,  # [capacity]
    histogram_ref,
    mask_ref,
    state_ref,
    ready,
  ):
    block = lax.axis_index('block')
    warpgroup = lax.axis_index('warpgroup') if sizes.warpgroups > 1 else 0
    shared = (
      list_scores_ref,
      list_indices_ref,
      histogram_ref,
      mask_ref,
      state_ref,
    )

    def span(row):
      """First tile of the row and the number of its tiles."""
      first = start_ref[row] // tile
      return first, (end_ref[row] + tile - 1) // tile - first

    def fetch(row, at, slot):
      # The last tile of a row overlaps the one before it.
      begin = jnp.minimum(at * tile, num_keys - tile)

      @pl.when(warpgroup == 0)
      def _():
        plgpu.copy_gmem_to_smem(
          scores_ref.at[row, pl.ds(begin, tile)],
          tiles_ref.at[slot],
          ready.at[slot],
          oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
        )

    def fetch_first(row, fetched):
      """Fetches the tiles of a row that there are slots for."""
      first, count = span(row)

      def one(i, _):
        fetch(row, first + i, lax.rem(fetched + i, stages))

      lax.fori_loop(0, jnp.minimum(count, stages), one, None)

    steps.start(*shared)
    fetch_first(block, jnp.int32(0))

    def one_row(i, tiles_done):
      row = block + i * blocks
      first, num_tiles = span(row)
      start, end = start_ref[row], end_ref[row]

      def one_tile(j, count):
        turn = tiles_done + j
        slot = lax.rem(turn, stages)
        at = (first + j) * tile
        begin = jnp.minimum(at, num_keys - tile)
        plgpu.barrier_wait(ready.at[slot])

        def append(count):
          return steps.append(
            *shared,
            tiles_ref.at[slot],
            count,
            lax.rem(turn, 3),
            begin,
            jnp.maximum(start, at),
            end,
          )

        def prune_first(overfull):
          del overfull
          steps.prune(*shared, count, lax.rem(turn, 3))
          return append(jnp.int32(k))

        overfull = append(count)
        count = lax.cond(
          overfull > sizes.capacity, prune_first, lambda x: x, overfull
        )

        @pl.when(j + stages < num_tiles)
        def _():
          steps.release()
          fetch(row, first + j + stages, slot)

        return count

      count = lax.fori_loop(0, num_tiles, one_tile, jnp.int32(0))
      tiles_done += num_tiles

      @pl.when(row + blocks < num_rows)
      def _():
        steps.release()
        fetch_first(row + blocks, tiles_done)

      @pl.when(count > k)
      def _():
        steps.select(*shared, count)

      steps.write(*shared, out_ref.at[row], count)
      return tiles_done

    rows = (num_rows - block + blocks - 1) // blocks
    lax.fori_loop(0, rows, one_row, jnp.int32(0))

  several = (
    {'num_threads': sizes.warpgroups, 'thread_name': 'warpgroup'}
    if sizes.warpgroups > 1
    else {}
  )
  return mosaic.kernel(
    body,
    target=target,
    out_type=jax.ShapeDtypeStruct(
      (num_rows, mask_words if as_mask else k), jnp.int32
    ),
    grid=(blocks,),
    grid_names=('block',),
    **several,
    scratch_types=[
      plgpu.SMEM((stages, tile), dtype),
      plgpu.SMEM((sizes.capacity,), jnp.int32),
      plgpu.SMEM((sizes.capacity,), jnp.int32),
      plgpu.SMEM((max(workspace.BINS, k),), jnp.int32),
      plgpu.SMEM((mask_words,), jnp.int32),
      plgpu.SMEM((workspace.STATE_WORDS,), jnp.int32),
      plgpu.Barrier(num_barriers=stages),
    ],
  )
