"""The indexer's forward kernel on Hopper.

Letters: B batch, T query tokens, S key tokens, J indexer heads, I index head
dim, R rows (heads of queries) of a block.

A block of queries (R = 512 rows, q [R, I]) stays in shared memory while tiles
of 64 keys stream past it. Each computing warpgroup owns 128 of the rows: one
product is [64 keys, 128 rows], whose rows are summed with their weights in
registers. While one warpgroup sums, the products of the others run. One more
warpgroup loads the keys, and writes -inf where no query of a block sees a tile.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import mosaic
from pallas_kernels.lightning_indexer import (
  mosaic_compute,
  mosaic_interpreted,
)
from pallas_kernels.lightning_indexer import mosaic_plan as plan
from pallas_kernels.lightning_indexer import mosaic_ptx as ptx

# Registers a thread of the computing warpgroups and of the loading one, for
# each number of computing warpgroups. Together they may be no more than the
# block starts with (168, 128 or 96 a thread), or the increase waits for ever.
# A single computing warpgroup keeps what it starts with: two blocks then fit
# on a multiprocessor.
REGISTERS = {2: (232, 40), 3: (152, 40), 4: (112, 32)}


def scores(
  q_BRI: jax.Array,
  k_BSI: jax.Array,
  w_BR: jax.Array,
  k_scale_BS: jax.Array | None,
  key_start_BT: jax.Array,
  key_end_BT: jax.Array,
  pages_BN: jax.Array | None = None,
  *,
  shape: plan.Shape,
  target: mosaic.Target,
) -> jax.Array:
  """Scores [B, T, S].

  Args:
    q_BRI: queries with their heads as rows; T a multiple of the block.
    k_BSI: keys, S a multiple of 64; or pages of them.
    w_BR: float32 weights of the rows.
    k_scale_BS: float32 scale of each key for fp8, as many; else None.
    key_start_BT: T and ranges as in `shape`, within 0 .. S.
    key_end_BT: likewise.
    pages_BN: numbers of the pages, if the keys are pages.
    shape: of the unpadded problem.
    target: where it runs.
  """
  from jax.experimental.pallas import mosaic_gpu as plgpu

  processors = mosaic.num_multiprocessors(target)
  processors *= shape.blocks_per_multiprocessor
  blocks = plan.make_plan(
    key_start_BT,
    key_end_BT,
    num_keys=shape.num_keys,
    query_block=shape.query_block,
    key_tile=ptx.KEYS,
  )
  swizzle = min(128, shape.row_bytes)
  transforms = (
    plgpu.TilingTransform((8, swizzle * shape.dim // shape.row_bytes)),
    plgpu.SwizzleTransform(swizzle),
  )
  slabs = shape.groups * shape.slabs
  scratch = {
    'q_smem': plgpu.SMEM(
      (slabs, ptx.ROWS, shape.dim), shape.dtype, transforms=transforms
    ),
    'k_smem': plgpu.SMEM(
      (shape.stages, ptx.KEYS, shape.dim), shape.dtype, transforms=transforms
    ),
    'q_ready': plgpu.Barrier(
      num_arrivals=shape.slabs, num_barriers=shape.groups
    ),
    'q_free': plgpu.Barrier(num_arrivals=shape.groups),
    'k_ready': plgpu.Barrier(
      num_arrivals=2 if shape.fp8 else 1, num_barriers=shape.stages
    ),
    'k_free': plgpu.Barrier(
      num_arrivals=shape.groups, num_barriers=shape.stages
    ),
  }
  if shape.fp8:
    scratch['k_scale_smem'] = plgpu.SMEM((shape.stages, ptx.KEYS), jnp.float32)
  if target.interprets:
    scratch['out_smem'] = plgpu.SMEM(
      (shape.groups + 1, ptx.KEYS), shape.out_dtype
    )
  inputs: dict[str, Any] = {
    'q': q_BRI,
    'k': k_BSI,
    'w': w_BR,
    'start': key_start_BT,
    'end': key_end_BT,
    'blocks': blocks,
  }
  if shape.fp8:
    inputs['k_scale'] = k_scale_BS
  if shape.page:
    inputs['pages'] = pages_BN
  keys = shape.num_keys
  queries = shape.num_queries
  if target.interprets:  # whole tiles only
    keys = shape.key_tiles * ptx.KEYS
    queries = shape.blocks_a_row * shape.query_block

  def body(*refs: Any) -> None:
    names = [*inputs, 'out', *scratch]
    _body(
      dict(zip(names, refs, strict=True)),
      shape=shape,
      target=target,
      processors=processors,
      transforms=transforms,
    )

  out = mosaic.kernel(
    body,
    target=target,
    out_type=jax.ShapeDtypeStruct(
      (shape.batch, queries, keys), shape.out_dtype
    ),
    grid=(processors,),
    grid_names=('processor',),
    num_threads=shape.groups + 1,
    thread_name='warpgroup',
    scratch_types=list(scratch.values()),
  )(*inputs.values())
  return out[:, : shape.num_queries, : shape.num_keys]


def _body(
  refs: dict[str, Any],
  *,
  shape: plan.Shape,
  target: mosaic.Target,
  processors: int,
  transforms: Any,
) -> None:
  from jax.experimental.pallas import mosaic_gpu as plgpu

  group = lax.axis_index('warpgroup')
  processor = lax.axis_index('processor')
  blocks = refs['blocks']
  end_of = functools.partial(plan.tiles_end, blocks)
  run_first, run_end = plan.share_of(
    end_of(shape.blocks - 1), processor, processors
  )
  first_block = plan.block_of(run_first, end_of, shape.blocks)
  last_block = plan.block_of(run_end - 1, end_of, shape.blocks)
  num_blocks = jnp.where(run_end > run_first, last_block - first_block + 1, 0)

  def over_segments(segment: Any, init: Any) -> Any:
    """Calls segment(block, first tile, tiles, carry) for each block met."""

    def step(i: Any, carry: Any) -> Any:
      block = first_block + i
      end, count = end_of(block), blocks[block, plan.COUNT]
      begin = jnp.maximum(run_first, end - count)
      first = blocks[block, plan.FIRST] + begin - (end - count)
      return segment(block, first, jnp.minimum(run_end, end) - begin, carry)

    return lax.fori_loop(0, num_blocks, step, init)

  sets_registers = not target.interprets and shape.groups in REGISTERS
  device = mosaic_interpreted if target.interprets else mosaic_compute

  @pl.when(group < shape.groups)
  def _() -> None:
    if sets_registers:
      plgpu.set_max_registers(REGISTERS[shape.groups][0], action='increase')
    math = device.Compute(refs, shape=shape, group=group, transforms=transforms)

    def segment(block: Any, first: Any, tiles: Any, done: Any) -> Any:
      @pl.when(tiles > 0)
      def _() -> None:
        plgpu.barrier_wait(refs['q_ready'].at[group])
        math.segment(block, first, tiles, done)
        plgpu.barrier_arrive(refs['q_free'])

      return done + jnp.maximum(tiles, 0)

    over_segments(segment, jnp.int32(0))

  @pl.when(group == shape.groups)
  def _() -> None:
    if sets_registers:
      plgpu.set_max_registers(REGISTERS[shape.groups][1], action='decrease')
    _load(
      refs,
      shape=shape,
      processor=processor,
      processors=processors,
      over_segments=over_segments,
      steps=run_end - run_first,
      fill=device.fill,
    )


def _load(
  refs: dict[str, Any],
  *,
  shape: plan.Shape,
  processor: Any,
  processors: int,
  over_segments: Any,
  steps: Any,
  fill: Any,
) -> None:
  """The loading warpgroup: q of each block, keys, and -inf in between."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  q_smem, k_smem = refs['q_smem'], refs['k_smem']
  q_ready, q_free = refs['q_ready'], refs['q_free']
  k_ready, k_free = refs['k_ready'], refs['k_free']
  blocks = refs['blocks']
  fills_end = functools.partial(
    plan.fills_end, blocks, key_tiles=shape.key_tiles
  )
  fill_first, fill_end = plan.share_of(
    fills_end(shape.blocks - 1), processor, processors
  )
  # Fills per tile loaded, so that both end together.
  rate = (fill_end - fill_first + steps - 1) // jnp.maximum(steps, 1)

  def fill_some(begin: Any, end: Any, block: Any) -> Any:
    """Fills entries begin .. end - 1; `block` is at or before the first's."""

    def step(i: Any, block: Any) -> Any:
      block = lax.while_loop(
        lambda block: fills_end(block) <= i, lambda block: block + 1, block
      )
      first = blocks[block, plan.FIRST]
      count = blocks[block, plan.COUNT]
      tile = i - (fills_end(block) - (shape.key_tiles - count))
      tile += jnp.where(tile >= first, count, 0)
      fill(refs, shape=shape, block=block, tile=tile)
      return block

    return lax.fori_loop(begin, end, step, block)

  def segment(block: Any, first: Any, tiles: Any, carry: Any) -> Any:
    done, blocks_done, *fills = carry
    batch = block // shape.blocks_a_row
    row = lax.rem(block, shape.blocks_a_row) * shape.rows

    @pl.when(tiles > 0)
    def _() -> None:
      @pl.when(blocks_done > 0)
      def _() -> None:
        plgpu.barrier_wait(q_free)

      for group in range(shape.groups):
        for i in range(shape.slabs):
          slab = group * shape.slabs + i
          plgpu.copy_gmem_to_smem(
            refs['q'].at[batch, pl.ds(row + slab * ptx.ROWS, ptx.ROWS)],
            q_smem.at[slab],
            q_ready.at[group],
          )

    def load(i: Any, fills: Any) -> Any:
      slot = lax.rem(done + i, shape.stages)

      @pl.when(done + i >= shape.stages)
      def _() -> None:
        plgpu.barrier_wait(k_free.at[slot])

      row, key = plan.place_of(refs, shape, batch, first + i)
      plgpu.copy_gmem_to_smem(
        refs['k'].at[row, pl.ds(key, ptx.KEYS)],
        k_smem.at[slot],
        k_ready.at[slot],
      )
      if shape.fp8:
        plgpu.copy_gmem_to_smem(
          refs['k_scale'].at[row, pl.ds(key, ptx.KEYS)],
          refs['k_scale_smem'].at[slot],
          k_ready.at[slot],
        )
      if not shape.fills:
        return fills
      filled, fill_block = fills
      end = jnp.minimum(filled + rate, fill_end)
      return end, fill_some(filled, end, fill_block)

    fills = lax.fori_loop(0, tiles, load, tuple(fills))
    tiles = jnp.maximum(tiles, 0)
    used = jnp.where(tiles > 0, 1, 0)
    return done + tiles, blocks_done + used, *fills

  zero = jnp.int32(0)
  fill_block = plan.block_of(fill_first, fills_end, shape.blocks)
  done, blocks_done, filled, fill_block = over_segments(
    segment, (zero, zero, fill_first, fill_block)
  )
  if shape.fills:
    fill_some(filled, fill_end, fill_block)

  # Every phase of a barrier is waited for, or the next kernel would race.
  def drain(i: Any, _: Any) -> Any:
    plgpu.barrier_wait(k_free.at[lax.rem(i, shape.stages)])
    return ()

  lax.fori_loop(jnp.maximum(done - shape.stages, 0), done, drain, ())

  @pl.when(blocks_done > 0)
  def _() -> None:
    plgpu.barrier_wait(q_free)
