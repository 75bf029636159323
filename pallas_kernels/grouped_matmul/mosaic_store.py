"""Storing some rows of a block held in registers."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import mosaic


def store_rows(
  y_gmem: Any,
  value: jax.Array,
  y_smem: Any,
  *,
  first: Any,
  low: Any,
  high: Any,
  column: Any,
  target: mosaic.Target,
) -> None:
  """Writes value[low:high] to y_gmem[first + low:first + high, column:].

  TMA boxes have a static height, and the other rows belong to another group.
  Registers go out under a predicate instead, two columns at a time; only the
  ends of a group come here. Interpreted, a copy a row does the same.

  Args:
    y_gmem: [M, N], whole.
    value: bfloat16 [rows, columns] in the layout of an accumulator.
    y_smem: shared memory of value's shape, for the interpreter only.
    first: row of value[0].
    low: first row that counts.
    high: one past the last.
    column: column of value[:, 0].
    target: where the kernel runs.
  """
  from jax.experimental.pallas import mosaic_gpu as plgpu

  if target.interprets:
    y_smem[...] = value
    plgpu.commit_smem()

    def one_row(row, carry):
      plgpu.copy_smem_to_gmem(
        y_smem.at[row],
        y_gmem.at[first + row, pl.ds(column, value.shape[1])],
      )
      return carry

    lax.fori_loop(low, high, one_row, ())
    plgpu.wait_smem_to_gmem(0)
    return

  width = y_gmem.shape[1]

  @plgpu.inline_mgpu(
    arg_types=(
      plgpu.RefType(),
      plgpu.Layout.WGMMA,
      plgpu.Layout.WG_SPLAT,
      plgpu.Layout.WG_SPLAT,
      plgpu.Layout.WG_SPLAT,
      plgpu.Layout.WG_SPLAT,
    )
  )
  def store(ctx, y, block, first, low, high, column):
    del ctx
    import jax.experimental.mosaic.gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, scf

    int32 = ir.IntegerType.get_signless(32)
    int64 = ir.IntegerType.get_signless(64)
    base = llvm.ptrtoint(int64, mgpu.utils.memref_ptr(y))
    first, low, high, column = (
      x.registers.item() for x in (first, low, high, column)
    )
    places = block.layout.thread_idxs(block.shape)
    for place, pair in zip(places, block.registers.flat, strict=True):
      row, local = (arith.index_cast(int32, x) for x in place)
      inside = arith.andi(
        arith.cmpi(arith.CmpIPredicate.sge, row, low),
        arith.cmpi(arith.CmpIPredicate.slt, row, high),
      )
      branch = scf.IfOp(inside)
      with ir.InsertionPoint(branch.then_block):
        # 64 bits: M * N may pass 2^31 bytes.
        offset = arith.muli(
          arith.extsi(int64, arith.addi(first, row)), mosaic.i64(2 * width)
        )
        offset = arith.addi(
          offset,
          arith.extsi(
            int64, arith.muli(arith.addi(column, local), mosaic.i32(2))
          ),
        )
        address = llvm.inttoptr(
          ir.Type.parse('!llvm.ptr<1>'), arith.addi(base, offset)
        )
        llvm.store(pair, address)
        scf.yield_([])

  store(y_gmem, value, *(jnp.int32(x) for x in (first, low, high, column)))
