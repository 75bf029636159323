"""Rows in registers, added to rows of global memory that are named one by one.

In wgmma's layout a thread has two neighbouring columns of every 8. Four floats
at once are the widest addition that the memory system takes, so the buffer's
columns are kept in another order, in which a thread's columns of 16 are
neighbours: `to_column_order` undoes it.

Additions from several blocks of threads arrive in any order, so the last bits
of a sum differ from run to run.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic

_EVICT_LAST = 0x14F0000000000000  # The L2's policy: keep these lines.
_GROUP = 16  # Columns that four threads share.


def to_column_order(sums_SW: jax.Array) -> jax.Array:
  """The columns of a buffer that `add_rows` filled, in their own order."""
  num_rows, width = sums_SW.shape
  x = sums_SW.reshape(num_rows, width // _GROUP, 4, 2, 2)
  return jnp.swapaxes(x, 2, 3).reshape(num_rows, width)


def add_rows(
  sums_ref: Any,
  indices: jax.Array,
  rows: jax.Array,
  *,
  column: int,
  target: mosaic.Target,
) -> None:
  """Adds 64 rows to those named; a negative name is none.

  Threads of neighbouring rows exchange values first, so that eight of them
  write a line of 128 bytes, and ask the L2 to keep it.

  Args:
    sums_ref: float32 [S, W] in global memory, in its own column order.
    indices: int32 [64], in the layout of wgmma's rows.
    rows: float32 [64, M] in wgmma's layout, M a multiple of 16.
    column: the first of the M columns.
    target: what the kernel is built for.
  """
  from jax.experimental.pallas import mosaic_gpu as plgpu

  if target.interprets:
    _plain_add(sums_ref, indices, rows, column)
    return

  width = sums_ref.shape[1]
  num_groups = rows.shape[1] // _GROUP

  @plgpu.inline_mgpu(
    arg_types=(
      plgpu.RefType(),
      plgpu.Layout.WGMMA.reduce(1),
      plgpu.Layout.WGMMA,
    )
  )
  def add(ctx, sums, indices, rows):
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    del ctx
    int64 = ir.IntegerType.get_signless(64)

    def scalar(register, position=0):
      if isinstance(register.type, ir.VectorType):
        return vector.extract(register, [], [position])
      return register

    thread = mgpu.utils.thread_idx()
    quarter = arith.remui(thread, mosaic.i32(4))
    start = llvm.ptrtoint(int64, mgpu.utils.memref_ptr(sums))
    start = arith.addi(
      start, arith.extui(int64, arith.muli(quarter, mosaic.i32(16)))
    )
    # The threads of the next row differ in this bit.
    odd = arith.cmpi(
      arith.CmpIPredicate.ne,
      arith.andi(thread, mosaic.i32(4)),
      mosaic.i32(0),
    )
    start = arith.addi(start, arith.select(odd, mosaic.i64(64), mosaic.i64(0)))
    values = rows.registers.reshape(2 * num_groups, 2)

    def address_of(index):
      skip = arith.muli(arith.extsi(int64, index), mosaic.i64(width * 4))
      return arith.addi(start, skip)

    def emit(address, offset, floats, index):
      mosaic.asm(
        '{ .reg .pred p; setp.ge.s32 p, $5, 0; '
        '@p red.relaxed.gpu.global.add.L2::cache_hint.v4.f32 '
        f'[$0+{offset}], {{$1, $2, $3, $4}}, $6; }}',
        address,
        *floats,
        index,
        mosaic.i64(_EVICT_LAST),
      )

    def swap(x):
      return mgpu.utils.shfl_bfly(x, 4)

    for i, register in enumerate(indices.registers.flat):
      index = scalar(register)
      groups = [
        [
          scalar(values[2 * group + j, i], k)
          for j in range(2)
          for k in range(2)
        ]
        for group in range(num_groups)
      ]
      others = swap(index)
      even_index = arith.select(odd, others, index)
      odd_index = arith.select(odd, index, others)
      even_address, odd_address = address_of(even_index), address_of(odd_index)
      for group in range(0, num_groups, 2):
        low, high = groups[group : group + 2]
        got = [
          swap(arith.select(odd, x, y)) for x, y in zip(low, high, strict=True)
        ]
        offset = 4 * (column + group * _GROUP)
        mine = [arith.select(odd, x, y) for x, y in zip(got, low, strict=True)]
        emit(even_address, offset, mine, even_index)
        mine = [arith.select(odd, x, y) for x, y in zip(high, got, strict=True)]
        emit(odd_address, offset, mine, odd_index)

  add(sums_ref, indices, rows)


def _plain_add(sums_ref, indices, rows, column):
  from jax.experimental import pallas as pl

  num_rows, width = rows.shape
  rows = rows.reshape(num_rows, width // _GROUP, 2, 4, 2)
  rows = jnp.swapaxes(rows, 2, 3).reshape(num_rows, width)

  def add(r, _):
    index = lax.dynamic_index_in_dim(indices, r, keepdims=False)
    row = lax.dynamic_index_in_dim(rows, r, keepdims=False)

    @pl.when(index >= 0)
    def _add():
      there = (index, pl.ds(column, width))
      sums_ref[there] = sums_ref[there] + row

    return ()

  lax.fori_loop(0, num_rows, add, ())
