"""What a computing warpgroup of the indexer's forward kernel does.

Letters: B batch, T query tokens, S key tokens, J indexer heads, I index head
dim.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels.lightning_indexer import mosaic_epilogue as epilogue
from pallas_kernels.lightning_indexer import mosaic_plan as plan
from pallas_kernels.lightning_indexer import mosaic_ptx as ptx


class Compute:
  """A computing warpgroup on the device."""

  def __init__(
    self,
    refs: dict[str, Any],
    *,
    shape: plan.Shape,
    group: Any,
    transforms: Any,
  ) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    self._refs = refs
    self._shape = shape
    self._group = group
    self._splat = plgpu.Layout.WG_SPLAT
    self._tiled = plgpu.RefType(transforms)
    self._plain = plgpu.RefType()
    self._product = ptx.bundle(ptx.ROWS // 2, jnp.float32)
    self._weights = ptx.bundle(ptx.ROWS // 4, jnp.float32)
    self._scale = ptx.bundle(1, jnp.float32)

  def segment(self, block: Any, first: Any, tiles: Any, done: Any) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    shape, refs = self._shape, self._refs
    k_ready, k_free = refs['k_ready'], refs['k_free']
    batch = block // shape.blocks_a_row
    query = lax.rem(block, shape.blocks_a_row) * shape.query_block
    full_first = refs['blocks'][block, plan.FULL_FIRST]
    full_end = refs['blocks'][block, plan.FULL_END]
    padded_rows = shape.blocks_a_row * shape.rows
    slabs = [self._group * shape.slabs + i for i in range(shape.slabs)]
    weights = [
      self._load_weights(
        batch * padded_rows + query * shape.heads + slab * ptx.ROWS
      )
      for slab in slabs
    ]

    def slot(i: Any) -> Any:
      return lax.rem(done + i, shape.stages)

    def finish(i: Any, s: int, product: Any, scale: Any) -> None:
      tile = first + i
      masked = (tile < full_first) | (tile >= full_end)
      self._store(
        product,
        weights[s],
        batch,
        query + slabs[s] * (ptx.ROWS // shape.heads),
        tile * ptx.KEYS,
        masked.astype(jnp.int32),
        scale,
      )

    def several(i: Any, count: int) -> None:
      """Tiles i .. i + count - 1; nothing is in flight before or after.

      A product that is in flight from one iteration of a loop to the next
      makes ptxas wait after every instruction; so a few tiles are unrolled.
      """
      steps = [(t, s) for t in range(count) for s in range(shape.slabs)]
      scales = {}

      def issue(t: int, s: int) -> Any:
        if s == 0:
          plgpu.barrier_wait(k_ready.at[slot(i + t)])
          scales[t] = self._load_scale(slot(i + t)) if shape.fp8 else None
        return self._issue(slot(i + t), slabs[s])

      product = issue(*steps[0])
      for (t, s), following in zip(steps, [*steps[1:], None], strict=True):
        running = None if following is None else issue(*following)
        product = self._await(product, 0 if following is None else 1)
        if s == shape.slabs - 1:
          plgpu.barrier_arrive(k_free.at[slot(i + t)])
        finish(i + t, s, product, scales[t])
        product = running

    def loop(begin: Any, end: Any, count: int) -> None:
      lax.fori_loop(
        begin, end, lambda n, _: several(n * count, count) or (), ()
      )

    whole = tiles // shape.unroll
    loop(0, whole, shape.unroll)
    if shape.unroll > 1:
      loop(whole * shape.unroll, tiles, 1)

  def _load_weights(self, row: Any) -> Any:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    @plgpu.inline_mgpu(
      arg_types=(self._plain, self._splat), return_type=self._weights
    )
    def load(_: Any, w: Any, row: Any) -> Any:
      return epilogue.load_weights(w, ptx.scalar(row))

    return load(self._refs['w'], row)

  def _load_scale(self, slot: Any) -> Any:
    """The scale of this thread's key, before the slot is given back."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    @plgpu.inline_mgpu(
      arg_types=(self._plain, self._splat), return_type=self._scale
    )
    def load(_: Any, scales: Any, slot: Any) -> Any:
      return epilogue.load_scale(scales, ptx.scalar(slot))

    return load(self._refs['k_scale_smem'], slot)

  def _issue(self, slot: Any, slab: Any) -> Any:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    shape = self._shape

    @plgpu.inline_mgpu(
      arg_types=(self._tiled, self._tiled, self._splat, self._splat),
      return_type=self._product,
    )
    def issue(_: Any, keys: Any, rows: Any, slot: Any, slab: Any) -> Any:
      return ptx.issue_product(
        keys,
        rows,
        ptx.scalar(slot),
        ptx.scalar(slab),
        row_bytes=shape.row_bytes,
        dtype='e4m3' if shape.fp8 else 'bf16',
      )

    return issue(self._refs['k_smem'], self._refs['q_smem'], slot, slab)

  def _await(self, product: Any, pending: int) -> Any:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    @plgpu.inline_mgpu(
      arg_types=(self._product.layout,), return_type=self._product
    )
    def wait(_: Any, product: Any) -> Any:
      return ptx.await_product(product, pending=pending)

    return wait(product)

  def _store(
    self,
    product: Any,
    weights: Any,
    batch: Any,
    query: Any,
    key: Any,
    masked: Any,
    scale: Any,
  ) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    shape, refs = self._shape, self._refs
    arrays = [refs['start'], refs['end'], refs['out']]
    registers = [product, weights] + ([] if scale is None else [scale])
    layouts = [self._product, self._weights, self._scale][: len(registers)]
    count = len(registers)

    @plgpu.inline_mgpu(
      arg_types=(
        *[x.layout for x in layouts],
        *[self._splat] * 4,
        *[self._plain] * len(arrays),
      )
    )
    def store(_: Any, *values: Any) -> None:
      scalars = [ptx.scalar(x) for x in values[count : count + 4]]
      _sum_and_store(values[:count], scalars, values[count + 4 :], shape=shape)

    store(*registers, batch, query, key, masked, *arrays)


def _sum_and_store(
  registers: Any,
  scalars: list[Any],
  refs: Any,
  *,
  shape: plan.Shape,
) -> None:
  """Inline code: the scores of one product to global memory."""
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import arith

  i32, i64 = (ir.IntegerType.get_signless(n) for n in (32, 64))
  product, weights, *scales = registers
  batch, query, key, masked = scalars
  start, end, out = (ptx.global_address(x) for x in refs)

  def c32(x: int) -> Any:
    return arith.constant(i32, x)

  _, lane, _ = ptx.lane_position()
  limit = arith.muli(arith.addi(batch, c32(1)), c32(shape.num_queries))
  row = arith.addi(arith.muli(batch, c32(shape.num_queries)), query)
  row = arith.addi(row, arith.andi(lane, c32(1)))
  key = arith.addi(key, epilogue.thread_key())
  values = epilogue.sum_heads(product, weights, heads=shape.heads)
  for bundle in scales:
    [scale] = ptx.unpack(bundle)
    values = [arith.mulf(x, scale) for x in values]
  size = jnp.dtype(shape.out_dtype).itemsize
  row_bytes = arith.constant(i64, shape.num_keys * size)
  epilogue.store_scores(
    values,
    row_address=arith.addi(out, arith.muli(arith.extsi(i64, row), row_bytes)),
    key=key,
    row=row,
    row_limit=limit,
    ranges=(start, end),
    masked=masked,
    num_keys=shape.num_keys,
    out_bf16=shape.out_dtype == jnp.bfloat16,
  )


def fill(
  refs: dict[str, Any], *, shape: plan.Shape, block: Any, tile: Any
) -> None:
  """Writes -inf to one tile of one block, on the device."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  splat = plgpu.Layout.WG_SPLAT

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), splat, splat, splat))
  def store(_: Any, out: Any, batch: Any, query: Any, key: Any) -> None:
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    i32, i64 = (ir.IntegerType.get_signless(n) for n in (32, 64))
    batch, query, key = (ptx.scalar(x) for x in (batch, query, key))
    warp, lane, _ = ptx.lane_position()
    thread = arith.addi(arith.muli(warp, arith.constant(i32, 32)), lane)
    line = arith.divui(thread, arith.constant(i32, 16))
    query = arith.addi(query, line)
    column = arith.remui(thread, arith.constant(i32, 16))
    key = arith.addi(key, arith.muli(column, arith.constant(i32, 4)))
    if shape.query_block < 8:  # the other threads' queries aren't the block's
      inside = arith.cmpi(
        arith.CmpIPredicate.ult, line, arith.constant(i32, shape.query_block)
      )
      key = arith.select(inside, key, arith.constant(i32, shape.num_keys))
    row = arith.addi(
      arith.muli(batch, arith.constant(i32, shape.num_queries)), query
    )
    index = arith.addi(
      arith.muli(arith.extsi(i64, row), arith.constant(i64, shape.num_keys)),
      arith.extsi(i64, key),
    )
    size = jnp.dtype(shape.out_dtype).itemsize
    epilogue.store_empty(
      arith.addi(
        ptx.global_address(out),
        arith.muli(index, arith.constant(i64, size)),
      ),
      row_elements=8 * shape.num_keys,
      query=query,
      key=key,
      rows=shape.query_block,
      num_queries=shape.num_queries,
      num_keys=shape.num_keys,
      out_bf16=shape.out_dtype == jnp.bfloat16,
    )

  batch = block // shape.blocks_a_row
  query = lax.rem(block, shape.blocks_a_row) * shape.query_block
  store(refs['out'], batch, query, tile * ptx.KEYS)
