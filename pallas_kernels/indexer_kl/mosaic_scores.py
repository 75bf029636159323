"""Index scores of selected rows, or of ranges of rows, on Hopper.

Letters: T queries (of all sequences), S keys, J indexer heads, I indexer
width, K columns of the result.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.indexer_kl import mosaic_rows, mosaic_streams
from pallas_kernels.indexer_kl.mosaic_rows import TILE


def scores(
  q_TJI: jax.Array,
  k_SI: jax.Array,
  w_TJ: jax.Array,
  source: tuple[jax.Array, ...],
  *,
  num_columns: int,
  blocks: mosaic_streams.Blocks,
  on: mosaic.Target,
) -> jax.Array:
  """sum_j w[t, j] ReLU(q[t, j] . k[s]): float32 [T, K].

  Args:
    q_TJI: bfloat16, T even, J a multiple of 8, I a multiple of 64.
    k_SI: bfloat16.
    w_TJ: float32.
    source: (indices_TK,) or (start_T, end_T); columns as `mosaic_target` has
      them.
    num_columns: K, a multiple of 64.
    blocks: pipeline.
    on: where it runs.
  """
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu

  num_queries, num_heads, width = q_TJI.shape
  gathers = len(source) == 1
  streams = mosaic_streams.Streams(
    on=on,
    blocks=blocks,
    num_queries=num_queries,
    width=width,
    tiles=num_columns // TILE if gathers else None,
  )
  stages = blocks.stages

  def body(q_ref, k_ref, w_ref, *refs):
    source, (scores_ref, *scratch) = refs[: len(refs) - 7], refs[-7:]
    q_smem, w_smem, k_smem, ready, free, q_ready = scratch
    thread = lax.axis_index('wg')

    @pl.when(thread < 2)
    def _():
      if not on.interprets:
        plgpu.set_max_registers(216, action='increase')

      def load_query(t, buffer):
        plgpu.copy_gmem_to_smem(
          q_ref.at[t], q_smem.at[buffer], q_ready.at[buffer]
        )
        plgpu.copy_gmem_to_smem(
          w_ref.at[t], w_smem.at[buffer], q_ready.at[buffer]
        )

      def work(t, buffer, first, count, before):
        plgpu.barrier_wait(q_ready.at[buffer])
        w = plgpu.load(w_smem.at[buffer], layout=plgpu.Layout.WGMMA.reduce(0))

        def tile(n, _):
          slot = thread * stages + lax.rem(before + n, stages)
          plgpu.barrier_wait(ready.at[slot])
          dots = product(k_smem.at[slot], q_smem.at[buffer].transpose((1, 0)))
          plgpu.barrier_arrive(free.at[slot])
          dots = jnp.maximum(dots, 0) * lax.broadcast_in_dim(w, dots.shape, [1])
          column = (first + n) * TILE
          scores_ref[t, pl.ds(column, TILE)] = jnp.sum(dots, axis=1)
          return ()

        lax.fori_loop(0, count, tile, ())

      mosaic_streams.each_query(streams, thread, source, load_query, work)

    @pl.when(thread == 2)
    def _():
      if not on.interprets:
        plgpu.set_max_registers(56, action='decrease')
      streams.load_tiles(k_ref, source, k_smem, ready, free)

  buffers = 2 * blocks.query_buffers
  return streams.kernel(
    body,
    out_type=jax.ShapeDtypeStruct((num_queries, num_columns), jnp.float32),
    scratch_types=[
      plgpu.SMEM(
        (buffers, num_heads, width),
        jnp.bfloat16,
        transforms=mosaic_rows.transforms(),
      ),
      plgpu.SMEM((buffers, num_heads), jnp.float32),
      *streams.scratch(extras=0),
      plgpu.Barrier(num_arrivals=2, num_barriers=buffers),
    ],
  )(q_TJI, k_SI, w_TJ, *(x.reshape(-1) for x in source))


def product(a: Any, b: Any) -> jax.Array:
  """a @ b in float32, awaited."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu

  def multiply(acc):
    plgpu.wgmma(acc, a, b)
    return acc[...]

  shape = (a.shape[0], b.shape[1])
  return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
