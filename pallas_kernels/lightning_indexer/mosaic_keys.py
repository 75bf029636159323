"""dk of the indexer on Hopper: keys stay, rows stream.

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
) -> jax.Array:
  """dk: a block of 128 keys a processor, rows stream."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  batch, _, dim = q_BRI.shape
  num_keys = k_BSI.shape[1]
  num_queries = g_BTS.shape[1]
  key_blocks = num_keys // common.TILE
  queries = common.TILE // heads
  # Few blocks of keys leave processors idle: then each walks over a part of
  # the queries, and the parts are added in order.
  processors = mosaic.num_multiprocessors(target)
  parts = max(1, min(8, 2 * processors // (batch * key_blocks)))
  tiles = _visiting_tiles(blocks, batch=batch, key_blocks=key_blocks)
  transforms = common.transforms(dim, jnp.bfloat16)

  def body(
    q: Any,
    k: Any,
    w: Any,
    g: Any,
    start: Any,
    end: Any,
    tiles: Any,
    dk_out: Any,
    k_smem: Any,
    q_smem: Any,
    w_smem: Any,
    g_smem: Any,
    dk_smem: Any,
    k_ready: Any,
    ready: Any,
    free: Any,
  ) -> None:
    group = lax.axis_index('warpgroup')
    index = lax.axis_index('block')
    part, block = lax.rem(index, parts), index // parts
    b, key = block // key_blocks, lax.rem(block, key_blocks) * common.TILE
    share = (tiles[block, 1] + parts - 1) // parts
    first = tiles[block, 0] + part * share
    count = jnp.minimum(share, tiles[block, 1] - part * share)
    count = jnp.maximum(count, 0)

    @pl.when(group < common.GROUPS)
    def _() -> None:
      common.more_registers(target)
      own_keys = pl.ds(key + group * common.HALF, common.HALF)
      keys = (
        key
        + group * common.HALF
        + plgpu.broadcasted_iota(
          jnp.int32, (common.HALF,), 0, layout=plgpu.Layout.WGMMA.reduce(1)
        )
      )
      plgpu.barrier_wait(k_ready)

      def step(i: Any, dk: Any) -> Any:
        slot = lax.rem(i, common.STAGES)
        query = (first + i) * queries
        ranges = [
          common.query_range(start, end, b, query + j, num_queries)
          for j in range(queries)
        ]
        plgpu.barrier_wait(ready.at[slot])
        d = common.product(
          k_smem.at[group],
          q_smem.at[slot].transpose((1, 0)),
          (common.HALF, common.TILE),
        )
        g2 = common.spread(
          lambda j: g_smem.at[slot, j, pl.ds(group * common.HALF, common.HALF)],
          ranges,
          keys,
          heads=heads,
          axis=1,
        )
        weights = plgpu.load(
          w_smem.at[slot], layout=plgpu.Layout.WGMMA.reduce(0)
        )
        weights = lax.broadcast_in_dim(weights, d.shape, [1])
        p = jnp.where(d > 0, g2 * weights, 0.0)
        dk = common.accumulate(
          dk, p.astype(jnp.bfloat16), q_smem.at[slot], target
        )
        plgpu.barrier_arrive(free.at[slot])
        return dk

      dk = lax.fori_loop(0, count, step, common.zeros((common.HALF, dim)))
      dk_smem[group] = dk
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(dk_smem.at[group], dk_out.at[part, b, own_keys])
      plgpu.wait_smem_to_gmem(0)

    @pl.when(group == common.GROUPS)
    def _() -> None:
      common.fewer_registers(target)
      for i in range(common.GROUPS):
        plgpu.copy_gmem_to_smem(
          k.at[b, pl.ds(key + i * common.HALF, common.HALF)],
          k_smem.at[i],
          k_ready,
        )

      def load(i: Any, slot: Any) -> None:
        rows = pl.ds((first + i) * common.TILE, common.TILE)
        barrier = ready.at[slot]
        plgpu.copy_gmem_to_smem(q.at[b, rows], q_smem.at[slot], barrier)
        plgpu.copy_gmem_to_smem(w.at[b, rows], w_smem.at[slot], barrier)
        query = (first + i) * queries
        for j in range(queries):
          plgpu.copy_gmem_to_smem(
            g.at[
              b,
              jnp.minimum(query + j, num_queries - 1),
              pl.ds(key, common.TILE),
            ],
            g_smem.at[slot, j],
            barrier,
          )

      common.load_tiles(count, free, load)

  dk_parts = common.kernel(
    body,
    target=target,
    blocks=batch * key_blocks * parts,
    out_type=jax.ShapeDtypeStruct((parts, *k_BSI.shape), jnp.float32),
    scratch_types=[
      plgpu.SMEM(
        (common.GROUPS, common.HALF, dim), jnp.bfloat16, transforms=transforms
      ),
      plgpu.SMEM(
        (common.STAGES, common.TILE, dim), jnp.bfloat16, transforms=transforms
      ),
      plgpu.SMEM((common.STAGES, common.TILE), jnp.float32),
      plgpu.SMEM((common.STAGES, queries, common.TILE), jnp.float32),
      plgpu.SMEM(
        (common.GROUPS, common.HALF, dim),
        jnp.float32,
        transforms=common.transforms(dim, jnp.float32),
      ),
      plgpu.Barrier(num_arrivals=common.GROUPS),
      plgpu.Barrier(num_arrivals=2 + queries, num_barriers=common.STAGES),
      plgpu.Barrier(num_arrivals=common.GROUPS, num_barriers=common.STAGES),
    ],
  )(q_BRI, k_BSI, w_BR, g_BTS, start_BT, end_BT, tiles)
  return dk_parts[0] if parts == 1 else jnp.sum(dk_parts, axis=0)


def _visiting_tiles(
  blocks: jax.Array, *, batch: int, key_blocks: int
) -> jax.Array:
  """[B * key_blocks, 2]: first tile of queries that sees a block, and count."""
  blocks = blocks.reshape(batch, -1, blocks.shape[-1])
  first = blocks[..., plan.FIRST, None]
  key_block = jnp.arange(key_blocks)[None, None]
  sees = (first <= key_block) & (
    key_block < first + blocks[..., plan.COUNT, None]
  )
  tile = jnp.arange(sees.shape[1])[None, :, None]
  lowest = jnp.min(jnp.where(sees, tile, sees.shape[1]), axis=1)
  end = jnp.max(jnp.where(sees, tile + 1, 0), axis=1)
  lowest = jnp.minimum(lowest, end)
  return jnp.stack([lowest, end - lowest], -1).reshape(-1, 2).astype(jnp.int32)
