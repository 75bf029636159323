"""Rows of keys into shared memory: device and CPU forms.

On a GPU rows are gathered by 16-byte cp.async straight into the swizzled layout
that the tensor cores read. The interpreter doesn't know it: there a row is a
plain copy.

A tile is 64 rows. The 128 threads of the loading warpgroup take eight threads a
row and four rows each, `ROWS` of them in registers.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic

TILE = 64
"""Keys of a tile: the M of a tensor-core instruction."""

CHUNK = 64
"""Columns of a swizzled bfloat16 tile: 128 bytes."""

_ROWS = 512  # 4 registers of 128 threads


def transforms() -> tuple[Any, ...]:
  """Layout of bfloat16 operands in shared memory."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  return (plgpu.TilingTransform((8, CHUNK)), plgpu.SwizzleTransform(128))


def load_rows(indices_ref: Any, offset: jax.Array) -> jax.Array:
  """Row numbers of the tile at `offset` of the flat indices; -1 gives 0.

  The result lives in registers, a thread's four rows each; only
  `gather_chunk` can make sense of it.
  """
  import jax.experimental.mosaic.gpu as mgpu
  import numpy as np
  from jax.experimental.pallas import mosaic_gpu as plgpu
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import arith, llvm, vector

  layout = plgpu.Layout.WG_STRIDED((_ROWS,), vec_size=1)

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT),
    return_type=plgpu.ShapeDtypeStruct((_ROWS,), jnp.int32, layout),
  )
  def load(ctx, indices, offset):
    del ctx
    i32, i64 = (ir.IntegerType.get_signless(n) for n in (32, 64))
    group, _ = _thread()
    base = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(indices))
    offset = offset.registers.item()
    registers = np.empty((4,), dtype=object)
    for n in range(4):
      row = arith.addi(offset, arith.addi(group, mosaic.i32(16 * n)))
      byte = arith.muli(arith.extsi(i64, row), mosaic.i64(4))
      pointer = llvm.inttoptr(
        ir.Type.parse('!llvm.ptr<1>'), arith.addi(base, byte)
      )
      index = arith.maxsi(llvm.load(i32, pointer), mosaic.i32(0))
      registers[n] = vector.broadcast(ir.VectorType.get((1,), i32), index)
    return mgpu.FragmentedArray(
      _registers=registers,
      _layout=mgpu.WGStridedFragLayout((_ROWS,), 1),
      _is_signed=True,
    )

  return load(indices_ref, offset)


def gather_chunks(
  keys_ref: Any,
  rows: jax.Array,
  smem_ref: Any,
  offset: jax.Array | int,
  *,
  width: int,
  columns: tuple[int, ...],
  tile_bytes: int,
  commit: bool = True,
) -> None:
  """Starts copies of chunks of columns of 64 rows, and commits them.

  Args:
    keys_ref: [S, width] bfloat16.
    rows: of `load_rows`.
    smem_ref: the whole buffer.
    offset: bytes from its start to the tile.
    width: of a row of keys.
    columns: first columns of the chunks; consecutive in shared memory.
    tile_bytes: from one group of eight rows to the next, 1024 where chunks
      lie one after the other, chunks * 1024 for a [64, chunks * 64] tile.
    commit: end a cp.async group.
  """
  import jax.experimental.mosaic.gpu as mgpu
  from jax.experimental.pallas import mosaic_gpu as plgpu
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import arith, llvm, vector

  layout = plgpu.Layout.WG_STRIDED((_ROWS,), vec_size=1)

  @plgpu.inline_mgpu(
    arg_types=(
      plgpu.RefType(),
      layout,
      plgpu.RefType(transforms()),
      plgpu.Layout.WG_SPLAT,
    )
  )
  def issue(ctx, keys, rows, smem, offset):
    del ctx
    i32, i64 = (ir.IntegerType.get_signless(n) for n in (32, 64))
    group, lane = _thread()
    keys = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(keys))
    smem = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(smem))
    smem = arith.addi(smem, offset.registers.item())
    lane_bytes = arith.extsi(i64, arith.muli(lane, mosaic.i32(16)))
    keys = arith.addi(keys, lane_bytes)
    for n in range(4):
      index = vector.extract(rows.registers[n], [], [0])
      source = arith.addi(
        keys, arith.muli(arith.extsi(i64, index), mosaic.i64(2 * width))
      )
      row = arith.addi(group, mosaic.i32(16 * n))
      in_tile = arith.remui(row, mosaic.i32(8))
      swizzled = arith.xori(lane, in_tile)
      place = arith.muli(
        arith.divui(row, mosaic.i32(8)), mosaic.i32(tile_bytes)
      )
      place = arith.addi(place, arith.muli(in_tile, mosaic.i32(128)))
      place = arith.addi(place, arith.muli(swizzled, mosaic.i32(16)))
      place = arith.addi(smem, place)
      for c, column in enumerate(columns):
        mosaic.asm(
          f'cp.async.cg.shared.global.L2::256B [$0+{1024 * c}],'
          f' [$1+{2 * column}], 16;',
          place,
          source,
        )
    if commit:
      mosaic.asm('cp.async.commit_group;')

  issue(keys_ref, rows, smem_ref, jnp.int32(offset))


def wait_gathers(pending: int) -> None:
  """Until at most `pending` groups are under way; what has come is visible."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  @plgpu.inline_mgpu()
  def wait(ctx):
    del ctx
    mosaic.asm(f'cp.async.wait_group {pending};')
    mosaic.asm('fence.proxy.async.shared::cta;')

  wait()


def copy_rows(
  keys_ref: Any,
  indices_ref: Any,
  offset: jax.Array,
  smem_ref: Any,
  barrier: Any,
  *,
  column: int,
  width: int,
) -> None:
  """The gather of one chunk for the interpreter: 64 arrivals on `barrier`."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu

  def copy(r, _):
    row = jnp.maximum(indices_ref[offset + r], 0)
    plgpu.copy_gmem_to_smem(
      keys_ref.at[row, pl.ds(column, width)], smem_ref.at[r], barrier
    )
    return ()

  lax.fori_loop(0, TILE, copy, ())


def _thread() -> tuple[Any, Any]:
  """Which group of eight of the warpgroup's threads, and which of them."""
  import jax.experimental.mosaic.gpu as mgpu
  from jaxlib.mlir.dialects import arith

  thread = arith.remui(mgpu.utils.thread_idx(), mosaic.i32(128))
  return (
    arith.divui(thread, mosaic.i32(8)),
    arith.remui(thread, mosaic.i32(8)),
  )
