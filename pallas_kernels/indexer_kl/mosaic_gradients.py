"""Gradients of the index scores' inputs from those of the scores, on Hopper.

With m[s, j] = g[s] w[j] 1[q_j . k_s > 0] three sums follow from one recomputed
product: dq = m^T k, dk = m q, dw[j] = sum_s g[s] ReLU(q_j . k_s). m stays in
registers for dk and goes once through shared memory, to be read transposed, for
dq. dk is added to float32 rows in memory, in any order.

Letters: T queries (of all sequences), S keys, J indexer heads, I indexer
width, K columns of the scores.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.indexer_kl import mosaic_rows, mosaic_streams, mosaic_sums
from pallas_kernels.indexer_kl.mosaic_rows import TILE
from pallas_kernels.indexer_kl.mosaic_scores import product


def gradients(
  q_TJI: jax.Array,
  k_SI: jax.Array,
  w_TJ: jax.Array,
  g_TK: jax.Array,
  rows_TK: jax.Array | None,
  spans: tuple[jax.Array, ...],
  dk_SI: jax.Array,
  *,
  blocks: mosaic_streams.Blocks,
  on: mosaic.Target,
  scatters: bool = True,
):
  """dq bfloat16 [T, J, I], dw float32 [T, J], and `dk_SI` with dk added.

  Args:
    q_TJI: bfloat16, T even, J = 64, I a multiple of 64.
    k_SI: bfloat16.
    w_TJ: float32.
    g_TK: float32 gradient of each score, 0 where there is no key.
    rows_TK: int32 row of each column; negative for none. None if column s is
      row s.
    spans: () with `rows_TK`, else (start_T, end_T).
    dk_SI: float32. Where the kernel is interpreted, zeros [T, K, I], which get
      the summands.
    blocks: pipeline.
    on: where it runs.
    scatters: False leaves dk out, for measurements.
  """
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu

  num_queries, num_heads, width = q_TJI.shape
  gathers = rows_TK is not None
  streams = mosaic_streams.Streams(
    on=on,
    blocks=blocks,
    num_queries=num_queries,
    width=width,
    tiles=g_TK.shape[1] // TILE if gathers else None,
  )
  stages = blocks.stages

  def body(q_ref, k_ref, w_ref, g_ref, *refs):
    refs, scratch = refs[:-9], refs[-9:]
    source, (dk_ref, dq_ref, dw_ref) = tuple(refs[:-3]), refs[-3:]
    (q_smem, w_smem, g_smem, rows_smem, m_smem, *ring) = scratch
    k_smem, ready, free, q_ready = ring
    thread = lax.axis_index('wg')

    @pl.when(thread < 2)
    def _():
      if not on.interprets:
        plgpu.set_max_registers(232, action='increase')

      def load_query(t, buffer):
        # The buffer's last use was as the source of a store.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.copy_gmem_to_smem(
          q_ref.at[t], q_smem.at[buffer], q_ready.at[buffer]
        )
        plgpu.copy_gmem_to_smem(
          w_ref.at[t], w_smem.at[buffer], q_ready.at[buffer]
        )

      def work(t, buffer, first, count, before):
        plgpu.barrier_wait(q_ready.at[buffer])
        q = q_smem.at[buffer]

        def sums(dq_acc):
          def tile(n, dw):
            slot = thread * stages + lax.rem(before + n, stages)
            plgpu.barrier_wait(ready.at[slot])
            k = k_smem.at[slot]
            dots = product(k, q.transpose((1, 0)))
            g = plgpu.load(g_smem.at[slot], layout=plgpu.Layout.WGMMA.reduce(1))
            g = lax.broadcast_in_dim(g, dots.shape, [0])
            w = plgpu.load(
              w_smem.at[buffer], layout=plgpu.Layout.WGMMA.reduce(0)
            )
            w = lax.broadcast_in_dim(w, dots.shape, [1])
            dw += g * jnp.maximum(dots, 0)
            m = jnp.where(dots > 0, g * w, 0).astype(jnp.bfloat16)
            m_smem[thread] = m
            plgpu.commit_smem()

            def add(dk_acc):
              # The interpreter takes no operand from registers.
              m_operand = m_smem.at[thread] if on.interprets else m
              plgpu.wgmma(dk_acc, m_operand, q)
              plgpu.wgmma(dq_acc, m_smem.at[thread].transpose((1, 0)), k)
              return plgpu.wgmma_accumulator_load(dk_acc, wait_n=1)

            dk = pl.run_scoped(add, plgpu.ACC((TILE, width), jnp.float32))
            if on.interprets:
              dk_ref[t, pl.ds((first + n) * TILE, TILE)] = dk
            elif scatters and gathers:
              mosaic_sums.add_rows(dk_ref, dk, rows_smem, slot, width=width)
            elif scatters:
              first_row = (first + n) * TILE
              mosaic_sums.add_rows(dk_ref, dk, None, first_row, width=width)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(free.at[slot])
            return dw

          zero = plgpu.layout_cast(
            jnp.zeros((TILE, num_heads), jnp.float32), plgpu.Layout.WGMMA
          )
          dw = lax.fori_loop(0, count, tile, zero)
          return dq_acc[...], dw

        dq, dw = pl.run_scoped(sums, plgpu.ACC((num_heads, width), jnp.float32))
        q_smem[buffer] = dq.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[buffer], dq_ref.at[t])
        if on.interprets:
          dw_ref[t, 0] = jnp.sum(dw, axis=0)
        else:
          mosaic_sums.store_column_sums(dw_ref, t, dw)

      mosaic_streams.each_query(streams, thread, source, load_query, work)
      plgpu.wait_smem_to_gmem(0)

    @pl.when(thread == 2)
    def _():
      if not on.interprets:
        plgpu.set_max_registers(40, action='decrease')

      def load_extras(t, column, slot, barrier):
        plgpu.copy_gmem_to_smem(
          g_ref.at[t, pl.ds(column, TILE)], g_smem.at[slot], barrier
        )
        if gathers and not on.interprets:
          first = t * g_TK.shape[1] + column
          plgpu.copy_gmem_to_smem(
            source[0].at[pl.ds(first, TILE)],
            rows_smem.at[slot],
            barrier,
          )

      streams.load_tiles(k_ref, source, k_smem, ready, free, load_extras)

  buffers = 2 * blocks.query_buffers
  extras = 2 if gathers and not on.interprets else 1
  operand = mosaic_rows.transforms()
  source = (rows_TK.reshape(-1),) if gathers else spans
  parts = 1 if on.interprets else 4
  call = streams.kernel(
    body,
    out_type=[
      jax.ShapeDtypeStruct(q_TJI.shape, jnp.bfloat16),
      jax.ShapeDtypeStruct((num_queries, parts, num_heads), jnp.float32),
    ],
    scratch_types=[
      plgpu.SMEM((buffers, num_heads, width), jnp.bfloat16, transforms=operand),
      plgpu.SMEM((buffers, num_heads), jnp.float32),
      plgpu.SMEM((2 * stages, TILE), jnp.float32),
      plgpu.SMEM((2 * stages, TILE), jnp.int32),
      plgpu.SMEM((2, TILE, num_heads), jnp.bfloat16, transforms=operand),
      *streams.scratch(extras=extras),
      plgpu.Barrier(num_arrivals=2, num_barriers=buffers),
    ],
  )
  (dq_TJI, dw_TNJ), dk_SI = mosaic.in_place(call)(
    q_TJI, k_SI, w_TJ, g_TK, *source, dk_SI
  )
  return dq_TJI, jnp.sum(dw_TNJ, axis=1), dk_SI
