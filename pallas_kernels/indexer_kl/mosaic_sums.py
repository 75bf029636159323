"""Accumulators out of registers: added to rows in memory, summed by columns.

Inline code, for the device only: where a kernel is interpreted, its caller adds
and sums outside of it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic
from pallas_kernels.indexer_kl.mosaic_rows import TILE


def add_rows(
  total_ref: Any,
  update: jax.Array,
  rows_ref: Any,
  slot: jax.Array,
  *,
  width: int,
) -> None:
  """Adds a [64, width] accumulator to the rows that `rows_ref[slot]` names.

  An accumulator's row lies in four lanes, pairs of columns each. Lanes swap
  pairs with their neighbour and then quadruples with the next row's lanes, so
  that an addition covers 128 consecutive bytes of a row: whole cache lines.

  Args:
    total_ref: [S, width] float32.
    update: in the accumulator's layout.
    rows_ref: [slots, 64] int32 in shared memory; a negative row is left out.
      None if the rows are consecutive.
    slot: which, or the first row.
    width: a multiple of 32.
  """
  import jax.experimental.mosaic.gpu as mgpu
  from jax.experimental.pallas import mosaic_gpu as plgpu
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import arith, llvm, vector

  named = rows_ref is not None
  arg_types = (plgpu.RefType(), plgpu.Layout.WGMMA, plgpu.Layout.WG_SPLAT)

  def is_set(value, bit):
    masked = arith.andi(value, mosaic.i32(bit))
    return arith.cmpi(arith.CmpIPredicate.ne, masked, mosaic.i32(0))

  def swap(halves, upper, distance):
    """Of (low, high) of two lanes: the lows for one, the highs for the other.

    Returns what came from the lower lane and what came from the upper.
    """
    low, high = halves

    def choose(if_upper, if_lower):
      return [
        arith.select(upper, x, y)
        for x, y in zip(if_upper, if_lower, strict=True)
      ]

    kept = choose(high, low)
    got = [mgpu.utils.shfl_bfly(x, distance) for x in choose(low, high)]
    return choose(got, kept), choose(kept, got)

  @plgpu.inline_mgpu(arg_types=arg_types + (plgpu.RefType(),) * named)
  def add(ctx, total, update, slot, *rows):
    del ctx
    i32, i64 = (ir.IntegerType.get_signless(n) for n in (32, 64))
    thread = arith.remui(mgpu.utils.thread_idx(), mosaic.i32(128))
    odd_lane, odd_row = is_set(thread, 1), is_set(thread, 4)
    # Bytes of this lane's four columns in the 128: even lanes have the first
    # eight of sixteen columns, odd rows the second sixteen.
    column = arith.muli(arith.andi(thread, mosaic.i32(2)), mosaic.i32(8))
    for bit, stride in ((odd_lane, 32), (odd_row, 64)):
      column = arith.addi(
        column, arith.select(bit, mosaic.i32(stride), mosaic.i32(0))
      )
    total = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(total))
    total = arith.addi(total, arith.extsi(i64, column))
    slot = slot.registers.item()
    names: Any = None
    if named:
      names = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(rows[0]))
      names = arith.addi(names, arith.muli(slot, mosaic.i32(4 * TILE)))

    def target_of(row):
      """Index of a row of the tile, and the address of this lane's part."""
      if named:
        place = arith.addi(names, arith.muli(row, mosaic.i32(4)))
        pointer = llvm.inttoptr(ir.Type.parse('!llvm.ptr<3>'), place)
        index = llvm.load(i32, pointer)
      else:
        index = arith.addi(slot, row)
      offset = arith.muli(arith.extsi(i64, index), mosaic.i64(4 * width))
      return index, arith.addi(total, offset)

    warp = arith.divui(thread, mosaic.i32(32))
    pair_of_rows = arith.andi(arith.divui(thread, mosaic.i32(4)), mosaic.i32(6))
    first_row = arith.addi(arith.muli(warp, mosaic.i32(16)), pair_of_rows)
    registers = update.registers.reshape(width // 8, 2)
    for half in range(2):
      targets = [
        target_of(arith.addi(first_row, mosaic.i32(8 * half + n)))
        for n in range(2)
      ]
      for line in range(width // 32):
        quadruples = []
        for n in range(2):
          group = 4 * line + 2 * n
          pairs = [
            [
              vector.extract(registers[group + m, half], [], [e])
              for e in (0, 1)
            ]
            for m in range(2)
          ]
          left, right = swap(pairs, odd_lane, 1)
          quadruples.append(left + right)
        sums = swap(quadruples, odd_row, 4)
        for (index, place), values in zip(targets, sums, strict=True):
          llvm.inline_asm(
            ir.Type.parse('!llvm.void'),
            [index, place, *values],
            '{ .reg .pred p; setp.ge.s32 p, $0, 0;'
            f' @p red.global.add.v4.f32 [$1+{128 * line}],'
            ' {$2, $3, $4, $5}; }',
            'r,l,f,f,f,f',
            has_side_effects=True,
          )

  add(total_ref, update, jnp.int32(slot), *((rows_ref,) if named else ()))


def store_column_sums(sums_ref: Any, t: jax.Array, x: jax.Array) -> None:
  """Stores the sums of each 16 rows of an accumulator: sums_ref[t] = [4, J].

  Pallas' own sum over all rows goes through shared memory that the warpgroups
  of a block have in common, without a barrier between them.

  Args:
    sums_ref: [T, 4, J] float32.
    t: which.
    x: [64, J], in the accumulator's layout.
  """
  import jax.experimental.mosaic.gpu as mgpu
  from jax.experimental.pallas import mosaic_gpu as plgpu
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import arith, llvm, vector

  num_columns = x.shape[1]

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT, plgpu.Layout.WGMMA)
  )
  def store(ctx, sums, t, x):
    del ctx
    i64 = ir.IntegerType.get_signless(64)
    thread = arith.remui(mgpu.utils.thread_idx(), mosaic.i32(128))
    lane = arith.remui(thread, mosaic.i32(32))
    row = arith.muli(t.registers.item(), mosaic.i32(4))
    row = arith.addi(row, arith.divui(thread, mosaic.i32(32)))
    column = arith.muli(arith.remui(lane, mosaic.i32(4)), mosaic.i32(2))
    place = arith.muli(arith.extsi(i64, row), mosaic.i64(4 * num_columns))
    place = arith.addi(
      place, arith.extsi(i64, arith.muli(column, mosaic.i32(4)))
    )
    place = arith.addi(place, llvm.ptrtoint(i64, mgpu.utils.memref_ptr(sums)))
    registers = x.registers.reshape(num_columns // 8, 2)
    for n, (top, bottom) in enumerate(registers):
      pair = arith.addf(top, bottom)
      sums = []
      for e in range(2):
        value = vector.extract(pair, [], [e])
        for distance in (4, 8, 16):
          value = arith.addf(value, mgpu.utils.shfl_bfly(value, distance))
        sums.append(value)
      llvm.inline_asm(
        ir.Type.parse('!llvm.void'),
        [lane, place, *sums],
        '{ .reg .pred p; setp.lt.s32 p, $0, 4;'
        f' @p st.global.v2.f32 [$1+{32 * n}], {{$2, $3}}; }}',
        'r,l,f,f',
        has_side_effects=True,
      )

  store(sums_ref, t, x)
