"""The indexer's forward kernel where inline code can't run: plain Pallas.

The loads, the barriers and the plan are the device's; what a warpgroup
computes between them is written with whole arrays.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lightning_indexer import mosaic_plan as plan
from pallas_kernels.lightning_indexer import mosaic_ptx as ptx


class Compute:
  """A computing warpgroup in plain Pallas: the same loads and barriers."""

  def __init__(
    self,
    refs: dict[str, Any],
    *,
    shape: plan.Shape,
    group: Any,
    transforms: Any,
  ) -> None:
    del transforms
    self._refs = refs
    self._shape = shape
    self._group = group

  def segment(self, block: Any, first: Any, tiles: Any, done: Any) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    shape, refs, group = self._shape, self._refs, self._group
    batch = block // shape.blocks_a_row
    row = lax.rem(block, shape.blocks_a_row) * shape.rows
    queries = ptx.ROWS // shape.heads
    out_smem = refs['out_smem'].at[group]

    def score(slot: Any, slab: Any, q: int, tile: Any) -> None:
      slab = group * shape.slabs + slab
      rows = pl.ds(q * shape.heads, shape.heads)

      def product(acc: Any) -> Any:
        plgpu.wgmma(
          acc,
          refs['k_smem'].at[slot],
          refs['q_smem'].at[slab, rows].transpose((1, 0)),
        )
        return acc[...]

      dots = pl.run_scoped(
        product, plgpu.ACC((ptx.KEYS, shape.heads), jnp.float32)
      )
      w = refs['w'][
        batch, pl.ds(row + slab * ptx.ROWS + q * shape.heads, shape.heads)
      ]
      total = jnp.sum(jax.nn.relu(dots) * w[None], axis=1)
      keys = tile * ptx.KEYS + jnp.arange(ptx.KEYS)
      if shape.fp8:
        total *= refs['k_scale_smem'][slot]
      query = row // shape.heads + slab * queries + q
      # Rows beyond the last query are there in the output, but not in ranges.
      bounded = jnp.minimum(query, shape.num_queries - 1)
      start, end = refs['start'][batch, bounded], refs['end'][batch, bounded]
      total = jnp.where((keys >= start) & (keys < end), total, -jnp.inf)
      out_smem[...] = jnp.where(total == 0, 0.0, total).astype(shape.out_dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(
        out_smem,
        refs['out'].at[batch, query, pl.ds(tile * ptx.KEYS, ptx.KEYS)],
      )
      plgpu.wait_smem_to_gmem(0)

    def step(i: Any, _: Any) -> Any:
      slot = lax.rem(done + i, shape.stages)
      plgpu.barrier_wait(refs['k_ready'].at[slot])
      for slab in range(shape.slabs):
        for q in range(queries):
          score(slot, slab, q, first + i)
      plgpu.barrier_arrive(refs['k_free'].at[slot])
      return ()

    lax.fori_loop(0, tiles, step, ())


def fill(
  refs: dict[str, Any], *, shape: plan.Shape, block: Any, tile: Any
) -> None:
  """Writes -inf to one tile of one block, in plain Pallas."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  out_smem = refs['out_smem'].at[shape.groups]
  out_smem[...] = jnp.full((ptx.KEYS,), -jnp.inf, shape.out_dtype)
  plgpu.commit_smem()
  batch = block // shape.blocks_a_row
  query = lax.rem(block, shape.blocks_a_row) * shape.query_block
  for i in range(shape.query_block):
    plgpu.copy_smem_to_gmem(
      out_smem,
      refs['out'].at[batch, query + i, pl.ds(tile * ptx.KEYS, ptx.KEYS)],
    )
  plgpu.wait_smem_to_gmem(0)
