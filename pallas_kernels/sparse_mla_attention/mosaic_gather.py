"""Rows of keys, named one by one, into the shared memory that wgmma reads.

The tensor memory accelerator of a Hopper GPU can't gather, so 128 threads copy
16 bytes each with cp.async, straight into the 128-byte swizzle. A barrier in
shared memory counts the copies as they land (`cp.async.mbarrier.arrive`), so
that the gathering threads never wait for what they asked for; Pallas has
neither this nor a way to hand its barriers to inline code, hence `Landed`.

The interpreter runs no inline code: there the same steps are plain stores and
a Pallas barrier.

A tile holds 64 rows as [64, W], W a multiple of 64, tiled (8, 64).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic

ROWS = 64
_PREFETCH = '.L2::256B'  # Of every line that isn't there.
THREADS = 128
CHUNK = 64  # Columns of a swizzled line: 128 bytes.
_LANES = 8  # Threads of a line, 16 bytes each.
PASSES = ROWS * _LANES // THREADS


def tile(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> Any:
  """Shared memory in the layout of wgmma's operands."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  return plgpu.SMEM(shape, dtype, transforms=transforms())


def compiler_params() -> Any:
  """Lane semantics, no barriers but the body's own, no memory for sums.

  Rows of wgmma's layout are summed by shuffles; what Pallas would set aside
  for other layouts is memory that the tiles need.
  """
  from jax.experimental.pallas import mosaic_gpu as plgpu

  return plgpu.CompilerParams(
    approx_math=True,
    unsafe_no_auto_barriers=True,
    lowering_semantics=plgpu.LoweringSemantics.Lane,
    reduction_scratch_bytes=0,
  )


def transforms():
  from jax.experimental.pallas import mosaic_gpu as plgpu

  return (plgpu.TilingTransform((8, CHUNK)), plgpu.SwizzleTransform(128))


def index_layout():
  from jax.experimental.pallas import mosaic_gpu as plgpu

  return plgpu.Layout.WG_STRIDED((THREADS * PASSES,), vec_size=1)


@dataclasses.dataclass(frozen=True)
class Landed:
  """Barriers that complete when the gathered parts of tiles have landed.

  Attributes:
    ref: the scratch that `scratch` asked for.
    target: what the kernel is built for.
  """

  ref: Any
  target: mosaic.Target

  @staticmethod
  def scratch(count: int, target: mosaic.Target) -> Any:
    """What a kernel asks for to hold `count` of them."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if target.interprets:
      return plgpu.Barrier(num_barriers=count)
    return plgpu.SMEM((2 * count,), jnp.int32)

  def initialize(self, count: int) -> None:
    """To be called by all threads of the block, before anything else."""
    if self.target.interprets:
      return
    from jax.experimental.pallas import mosaic_gpu as plgpu

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def initialize(ctx, ref):
      from jax.experimental.mosaic import gpu as mgpu
      from jaxlib.mlir.dialects import arith, nvvm, scf

      del ctx
      first = arith.cmpi(
        arith.CmpIPredicate.eq, mgpu.utils.thread_idx(), mosaic.i32(0)
      )
      branch = scf.IfOp(first)
      with mgpu.utils.ir.InsertionPoint(branch.then_block):
        base = shared_address(ref)
        for i in range(count):
          mosaic.asm(
            f'mbarrier.init.shared::cta.b64 [$0+{8 * i}], {THREADS};', base
          )
        mosaic.asm('fence.mbarrier_init.release.cluster;')
        scf.yield_([])
      del nvvm
      mosaic.asm('bar.sync 0;')

    initialize(self.ref)

  def wait(self, index: Any, parity: Any) -> None:
    """Waits for phase `parity` (0 first, then 1, 0...) of barrier `index`."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if self.target.interprets:
      plgpu.barrier_wait(self.ref.at[index])
      return

    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), splat, splat))
    def wait(ctx, ref, index, parity):
      from jaxlib.mlir import ir
      from jaxlib.mlir.dialects import arith, llvm, nvvm

      del ctx
      address = arith.addi(
        shared_address(ref),
        arith.muli(index.registers.item(), mosaic.i32(8)),
      )
      pointer = llvm.inttoptr(ir.Type.parse('!llvm.ptr<3>'), address)
      nvvm.mbarrier_try_wait_parity(
        pointer, parity.registers.item(), mosaic.i32(10_000_000)
      )
      # What cp.async wrote is read by wgmma, which is another proxy.
      mosaic.asm('fence.proxy.async.shared::cta;')

    wait(self.ref, jnp.int32(index), jnp.int32(parity))


def load_indices(
  indices_ref: Any, offset: Any, base: Any, target: mosaic.Target
) -> jax.Array:
  """The rows that this thread copies of the 64 named at `offset`.

  Args:
    indices_ref: int32 in global memory, flat.
    offset: of the first index.
    base: added to every index that isn't negative.
    target: what the kernel is built for.

  Returns:
    Something for `gather`, in registers.
  """
  from jax.experimental.pallas import mosaic_gpu as plgpu

  if target.interprets:
    indices = indices_ref[pl_ds(offset, ROWS)]
    return jnp.where(indices < 0, -1, indices + base)

  splat = plgpu.Layout.WG_SPLAT

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(), splat, splat),
    return_type=plgpu.ShapeDtypeStruct(
      (THREADS * PASSES,), jnp.int32, layout=index_layout()
    ),
  )
  def load(ctx, ref, offset, base):
    import numpy as np
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    del ctx
    int32 = ir.IntegerType.get_signless(32)
    int64 = ir.IntegerType.get_signless(64)
    group = arith.divui(thread_number(), mosaic.i32(_LANES))
    pointer = llvm.ptrtoint(int64, mgpu.utils.memref_ptr(ref))
    registers = []
    for i in range(PASSES):
      row = arith.addi(
        offset.registers.item(),
        arith.addi(group, mosaic.i32(i * THREADS // _LANES)),
      )
      address = arith.addi(
        pointer, arith.muli(arith.extsi(int64, row), mosaic.i64(4))
      )
      address = llvm.inttoptr(ir.Type.parse('!llvm.ptr<1>'), address)
      index = llvm.load(int32, address)
      valid = arith.cmpi(arith.CmpIPredicate.sge, index, mosaic.i32(0))
      index = arith.select(
        valid, arith.addi(index, base.registers.item()), mosaic.i32(-1)
      )
      registers.append(vector.broadcast(ir.VectorType.get((1,), int32), index))
    return mgpu.FragmentedArray(
      _registers=np.array(registers, dtype=object),
      _layout=index_layout().to_mgpu(),
      _is_signed=True,
    )

  return load(indices_ref, jnp.int32(offset), jnp.int32(base))


def gather(
  rows_ref: Any,
  indices: jax.Array,
  tiles_ref: Any,
  landed: Landed,
  *,
  slot: Any,
  barrier: Any,
  columns: tuple[int, int],
) -> None:
  """Copies columns of 64 rows into a tile, zeros for the rows named -1.

  Args:
    rows_ref: [S, X] in global memory; columns from X on are zeros.
    indices: what `load_indices` returned.
    tiles_ref: [slots, 64, W] from `tile`.
    landed: gets one completion, when everything is there.
    slot: which tile.
    barrier: which barrier of `landed`.
    columns: first and last (exclusive), multiples of 64.
  """
  from jax.experimental.pallas import mosaic_gpu as plgpu

  width = rows_ref.shape[1]
  if landed.target.interprets:
    _plain_gather(rows_ref, indices, tiles_ref, slot, columns)
    plgpu.commit_smem()
    plgpu.barrier_arrive(landed.ref.at[barrier])
    return

  splat = plgpu.Layout.WG_SPLAT
  tile_width = tiles_ref.shape[2]

  @plgpu.inline_mgpu(
    arg_types=(
      plgpu.RefType(),
      index_layout(),
      plgpu.RefType(transforms()),
      plgpu.RefType(),
      splat,
      splat,
    )
  )
  def issue(ctx, rows, indices, tiles, barriers, slot, barrier):
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    del ctx
    int64 = ir.IntegerType.get_signless(64)
    thread = thread_number()
    group = arith.divui(thread, mosaic.i32(_LANES))
    lane = arith.remui(thread, mosaic.i32(_LANES))
    source = llvm.ptrtoint(int64, mgpu.utils.memref_ptr(rows))
    source = arith.addi(
      source, arith.extui(int64, arith.muli(lane, mosaic.i32(16)))
    )
    # Row r is line r % 8 of a tile of 8; its 16-byte pieces are exchanged by
    # the line's number.
    line = arith.remui(group, mosaic.i32(8))
    destination = arith.addi(
      shared_address(tiles),
      arith.muli(slot.registers.item(), mosaic.i32(ROWS * tile_width * 2)),
    )
    destination = arith.addi(
      destination,
      arith.muli(
        arith.divui(group, mosaic.i32(8)), mosaic.i32(8 * tile_width * 2)
      ),
    )
    destination = arith.addi(
      destination,
      arith.addi(
        arith.muli(line, mosaic.i32(128)),
        arith.muli(arith.xori(lane, line), mosaic.i32(16)),
      ),
    )
    for i, register in enumerate(indices.registers.flat):
      index = vector.extract(register, [], [0])
      valid = arith.cmpi(arith.CmpIPredicate.sge, index, mosaic.i32(0))
      size = arith.select(valid, mosaic.i32(16), mosaic.i32(0))
      row = arith.select(valid, index, mosaic.i32(0))
      address = arith.addi(
        source, arith.muli(arith.extsi(int64, row), mosaic.i64(width * 2))
      )
      skip = i * (THREADS // _LANES) * tile_width * 2
      for column in range(*columns, CHUNK):
        to = skip + column // CHUNK * 8 * 128
        here = width - column
        size_here = size
        if here <= 0:
          size_here = mosaic.i32(0)
        elif here < CHUNK:
          inside = arith.cmpi(
            arith.CmpIPredicate.ult, lane, mosaic.i32(here // 8)
          )
          size_here = arith.select(inside, size, mosaic.i32(0))
        start = min(column, width - CHUNK) if here <= 0 else column
        mosaic.asm(
          f'cp.async.cg.shared.global{_PREFETCH} [$0+{to}], [$1+{2 * start}], '
          '16, $2;',
          destination,
          address,
          size_here,
        )
    there = arith.addi(
      shared_address(barriers),
      arith.muli(barrier.registers.item(), mosaic.i32(8)),
    )
    mosaic.asm('cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];', there)

  issue(
    rows_ref,
    indices,
    tiles_ref,
    landed.ref,
    jnp.int32(slot),
    jnp.int32(barrier),
  )


def _plain_gather(rows_ref, indices, tiles_ref, slot, columns):
  first, last = columns
  width = min(rows_ref.shape[1], last) - first

  def copy(r, _):
    index = lax.dynamic_index_in_dim(indices, r, keepdims=False)
    if width > 0:
      row = rows_ref[jnp.maximum(index, 0), pl_ds(first, width)]
      row = jnp.where(index < 0, jnp.zeros_like(row), row)
      tiles_ref[slot, r, pl_ds(first, width)] = row
    if first + width < last:
      start = first + max(width, 0)
      tiles_ref[slot, r, pl_ds(start, last - start)] = jnp.zeros(
        (last - start,), tiles_ref.dtype
      )
    return ()

  lax.fori_loop(0, ROWS, copy, ())


def fence(target: mosaic.Target) -> None:
  """Orders a thread's accesses to memory with those of bulk copies."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  if target.interprets:
    return

  @plgpu.inline_mgpu()
  def order(ctx):
    del ctx
    mosaic.asm('fence.proxy.async;')

  order()


def pl_ds(start: Any, size: int) -> Any:
  """`pl.ds`, Pallas imported where it is used."""
  from jax.experimental import pallas as pl

  return pl.ds(start, size)


def thread_number() -> Any:
  """This thread's number in its warpgroup."""
  from jax.experimental.mosaic import gpu as mgpu
  from jaxlib.mlir.dialects import arith

  return arith.remui(mgpu.utils.thread_idx(), mosaic.i32(THREADS))


def shared_address(ref: Any) -> Any:
  """Address of shared memory, as inline code takes it."""
  from jax.experimental.mosaic import gpu as mgpu
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import llvm

  return llvm.ptrtoint(
    ir.IntegerType.get_signless(32), mgpu.utils.memref_ptr(ref)
  )
