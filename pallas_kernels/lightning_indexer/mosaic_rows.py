"""dq and dw of the indexer on Hopper: rows stay, keys stream.

Letters: B batch, T query tokens, S key tokens, J indexer heads, I index head
dim, R rows (heads of queries).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import mosaic
from pallas_kernels.lightning_indexer import mosaic_plan as plan
from pallas_kernels.lightning_indexer import mosaic_tiles as common


def gradients(
  q_BRI: jax.Array,
  k_BSI: jax.Array,
  w_BR: jax.Array,
  g_BTS: jax.Array,
  start_BT: jax.Array,
  end_BT: jax.Array,
  blocks: jax.Array,
  *,
  heads: int,
  target: mosaic.Target,
) -> tuple[jax.Array, jax.Array]:
  """dq and dw: a block of 128 rows a processor, keys stream."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  batch, rows, dim = q_BRI.shape
  num_queries = g_BTS.shape[1]
  row_blocks = rows // common.TILE
  queries = common.TILE // heads  # of a block
  mine = common.HALF // heads  # of a warpgroup
  transforms = common.transforms(dim, jnp.bfloat16)

  def body(
    q: Any,
    k: Any,
    w: Any,
    g: Any,
    start: Any,
    end: Any,
    blocks: Any,
    dq_out: Any,
    dw_out: Any,
    q_smem: Any,
    k_smem: Any,
    g_smem: Any,
    dw_smem: Any,
    q_ready: Any,
    ready: Any,
    free: Any,
  ) -> None:
    group = lax.axis_index('warpgroup')
    # Late queries see most keys under causality: longest first.
    block = batch * row_blocks - 1 - lax.axis_index('block')
    b, row = block // row_blocks, lax.rem(block, row_blocks) * common.TILE
    query = row // heads
    first = blocks[block, plan.FIRST]
    count = blocks[block, plan.COUNT]

    @pl.when(group < common.GROUPS)
    def _() -> None:
      common.more_registers(target)
      own_rows = pl.ds(row + group * common.HALF, common.HALF)
      ranges = [
        common.query_range(start, end, b, query + group * mine + i, num_queries)
        for i in range(mine)
      ]
      plgpu.barrier_wait(q_ready)

      def step(i: Any, carry: Any) -> Any:
        dq, dw = carry
        slot = lax.rem(i, common.STAGES)
        plgpu.barrier_wait(ready.at[slot])
        d = common.product(
          q_smem.at[group],
          k_smem.at[slot].transpose((1, 0)),
          (common.HALF, common.TILE),
        )
        keys = (first + i) * common.TILE + plgpu.broadcasted_iota(
          jnp.int32, (common.TILE,), 0, layout=plgpu.Layout.WGMMA.reduce(0)
        )
        g2 = common.spread(
          lambda j: g_smem.at[slot, group * mine + j],
          ranges,
          keys,
          heads=heads,
          axis=0,
        )
        p = jnp.where(d > 0, g2, 0.0)
        dw += jnp.sum(p * d, axis=1)
        dq = common.accumulate(
          dq, p.astype(jnp.bfloat16), k_smem.at[slot], target
        )
        plgpu.barrier_arrive(free.at[slot])
        return dq, dw

      zero_dw = plgpu.layout_cast(
        jnp.zeros((common.HALF,), jnp.float32), plgpu.Layout.WGMMA.reduce(1)
      )
      dq, dw = lax.fori_loop(
        0, count, step, (common.zeros((common.HALF, dim)), zero_dw)
      )
      weights = plgpu.load(
        w.at[b, own_rows],
        layout=plgpu.Layout.WGMMA.reduce(1),
        optimized=False,
      )
      dq *= lax.broadcast_in_dim(weights, dq.shape, [0])
      q_smem[group] = dq.astype(jnp.bfloat16)
      dw_smem[group] = dw
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(q_smem.at[group], dq_out.at[b, own_rows])
      plgpu.copy_smem_to_gmem(dw_smem.at[group], dw_out.at[b, own_rows])
      plgpu.wait_smem_to_gmem(0)

    @pl.when(group == common.GROUPS)
    def _() -> None:
      common.fewer_registers(target)
      for i in range(common.GROUPS):
        plgpu.copy_gmem_to_smem(
          q.at[b, pl.ds(row + i * common.HALF, common.HALF)],
          q_smem.at[i],
          q_ready,
        )

      def load(i: Any, slot: Any) -> None:
        keys = pl.ds((first + i) * common.TILE, common.TILE)
        plgpu.copy_gmem_to_smem(k.at[b, keys], k_smem.at[slot], ready.at[slot])
        for j in range(queries):
          plgpu.copy_gmem_to_smem(
            g.at[b, jnp.minimum(query + j, num_queries - 1), keys],
            g_smem.at[slot, j],
            ready.at[slot],
          )

      common.load_tiles(count, free, load)

  return common.kernel(
    body,
    target=target,
    blocks=batch * row_blocks,
    out_type=(
      jax.ShapeDtypeStruct(q_BRI.shape, jnp.bfloat16),
      jax.ShapeDtypeStruct(w_BR.shape, jnp.float32),
    ),
    scratch_types=[
      plgpu.SMEM(
        (common.GROUPS, common.HALF, dim), jnp.bfloat16, transforms=transforms
      ),
      plgpu.SMEM(
        (common.STAGES, common.TILE, dim), jnp.bfloat16, transforms=transforms
      ),
      plgpu.SMEM((common.STAGES, queries, common.TILE), jnp.float32),
      plgpu.SMEM((common.GROUPS, common.HALF), jnp.float32),
      plgpu.Barrier(num_arrivals=common.GROUPS),
      plgpu.Barrier(num_arrivals=1 + queries, num_barriers=common.STAGES),
      plgpu.Barrier(num_arrivals=common.GROUPS, num_barriers=common.STAGES),
    ],
  )(q_BRI, k_BSI, w_BR, g_BTS, start_BT, end_BT, blocks)
