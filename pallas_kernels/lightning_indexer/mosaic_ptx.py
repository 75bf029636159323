"""Inline PTX of the indexer's forward kernel: product, relu sum, stores.

One thread's registers cross from one piece of inline code to the next as a
"bundle": an array of 128 n elements, of which every thread of a warpgroup
holds n. Only these functions give the elements a meaning.

A product is a warpgroup's [64 keys, 128 rows] where a row is one head of one
query; thread (warp, lane) holds keys 16 warp + lane / 4 + {0, 8} and, of each
8 rows, 2 (lane % 4) + {0, 1}: registers 4 i + 2 half + e.

None of this can be interpreted; `mosaic_forward` has a plain body for that.
"""

from typing import Any

import numpy as np

ROWS = 128
"""Rows (heads of queries) of one product."""

KEYS = 64
"""Keys of one product."""

_THREADS = 128


def bundle(count: int, dtype: Any) -> Any:
  """The type of `count` registers a thread."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  return plgpu.ShapeDtypeStruct(
    (_THREADS * count,), dtype, layout=bundle_layout(count)
  )


def bundle_layout(count: int) -> Any:
  from jax.experimental.pallas import mosaic_gpu as plgpu

  return plgpu.Layout.WG_STRIDED((_THREADS * count,), vec_size=1)


def unpack(array: Any) -> list[Any]:
  """Registers of a bundle as scalars."""
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import vector

  return [
    vector.extract(
      x,
      dynamic_position=[],
      static_position=ir.DenseI64ArrayAttr.get([0]),
    )
    for x in array.registers.flat
  ]


def pack(values: list[Any], *, is_signed: bool | None = None) -> Any:
  """The bundle of some scalars; `is_signed` for integers."""
  import jax.experimental.mosaic.gpu as mgpu
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import vector

  layout = mgpu.WGStridedFragLayout((_THREADS * len(values),), vec_size=1)
  kind = ir.VectorType.get((1,), values[0].type)
  registers = np.empty((len(values),), object)
  for i, value in enumerate(values):
    registers[i] = vector.broadcast(kind, value)
  return mgpu.FragmentedArray(
    _registers=registers, _layout=layout, _is_signed=is_signed
  )


def emit(
  text: str,
  *,
  outputs: str = '',
  operands: tuple[Any, ...] | list[Any] = (),
  tied: int = 0,
  pure: bool = False,
) -> list[Any]:
  """Emits PTX. `$n` are outputs first, then operands.

  Args:
    text: the instructions.
    outputs: one letter an output: f, r or l.
    operands: values.
    tied: the first `tied` operands share the registers of the first outputs.
    pure: no effects: may be moved, merged or dropped.
  """
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import llvm

  kinds = {
    'f': ir.F32Type.get(),
    'r': ir.IntegerType.get_signless(32),
    'l': ir.IntegerType.get_signless(64),
  }
  letters = {str(kind): letter for letter, kind in kinds.items()}
  constraints = [f'={x}' for x in outputs]
  for i, operand in enumerate(operands):
    constraints.append(str(i) if i < tied else letters[str(operand.type)])
  types = [kinds[x] for x in outputs]
  if not types:
    result_type = ir.Type.parse('!llvm.void')
  elif len(types) == 1:
    result_type = types[0]
  else:
    result_type = llvm.StructType.get_literal(types)
  result: Any = llvm.inline_asm(
    result_type,
    list(operands),
    text,
    ','.join(constraints),
    has_side_effects=not pure,
  )
  if not types:
    return []
  if len(types) == 1:
    return [result]
  return [llvm.extractvalue(x, result, [i]) for i, x in enumerate(types)]


def shared_address(ref: Any) -> Any:
  """Byte address of a shared memory ref, int32."""
  import jax.experimental.mosaic.gpu as mgpu
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import llvm

  return llvm.ptrtoint(
    ir.IntegerType.get_signless(32), mgpu.utils.memref_ptr(ref)
  )


def global_address(ref: Any) -> Any:
  """Byte address of a global memory ref, int64."""
  import jax.experimental.mosaic.gpu as mgpu
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import llvm

  return llvm.ptrtoint(
    ir.IntegerType.get_signless(64), mgpu.utils.memref_ptr(ref)
  )


def scalar(array: Any) -> Any:
  """The value of an array with layout WG_SPLAT."""
  return array.registers.item()


def _descriptor(address: Any, *, swizzle: int, row_group_bytes: int) -> Any:
  """A wgmma matrix descriptor: rows of `swizzle` bytes, K contiguous."""
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import arith

  i32, i64 = (ir.IntegerType.get_signless(n) for n in (32, 64))
  mode = {128: 1, 64: 2, 32: 3}[swizzle]
  constant = ((row_group_bytes >> 4) << 32) | (mode << 62)
  if constant >= 1 << 63:
    constant -= 1 << 64
  encoded = arith.shrui(address, arith.constant(i32, 4))
  encoded = arith.andi(encoded, arith.constant(i32, 0x3FFF))
  return arith.ori(arith.extui(i64, encoded), arith.constant(i64, constant))


def issue_product(
  keys_ref: Any,
  rows_ref: Any,
  slot: Any,
  slab: Any,
  *,
  row_bytes: int,
  dtype: str,
) -> Any:
  """Starts keys[slot] @ rows[slab]^T and commits it as one group.

  The result may be read only after `await_product`.

  Args:
    keys_ref: [slots, 64, I] in shared memory, tiled and swizzled.
    rows_ref: [slabs, 128, I], likewise.
    slot: int32.
    slab: int32.
    row_bytes: of one key.
    dtype: 'bf16' or 'e4m3'.

  Returns:
    A bundle of 64 float32.
  """
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import arith

  i32 = ir.IntegerType.get_signless(32)
  swizzle = min(128, row_bytes)
  group_bytes = 8 * row_bytes

  def descriptor(ref: Any, index: Any, block_bytes: int) -> Any:
    offset = arith.muli(index, arith.constant(i32, block_bytes))
    return _descriptor(
      arith.addi(shared_address(ref), offset),
      swizzle=swizzle,
      row_group_bytes=group_bytes,
    )

  a = descriptor(keys_ref, slot, KEYS * row_bytes)
  b = descriptor(rows_ref, slab, ROWS * row_bytes)
  text = product_text(row_bytes=row_bytes, dtype=dtype)
  return pack(emit(text, outputs='f' * (ROWS // 2), operands=[a, b]))


def product_text(*, row_bytes: int, dtype: str) -> str:
  """PTX of one product: 64 registers, then the two descriptors."""
  swizzle = min(128, row_bytes)
  columns = row_bytes // swizzle
  count = ROWS // 2
  registers = ','.join(f'${i}' for i in range(count))
  shape, suffix = {
    'bf16': (f'm64n{ROWS}k16.f32.bf16.bf16', ', 1, 1, 0, 0'),
    'e4m3': (f'm64n{ROWS}k32.f32.e4m3.e4m3', ', 1, 1'),
  }[dtype]
  lines = [
    '{ .reg .pred p; .reg .b64 a, b;',
    'wgmma.fence.sync.aligned;',
  ]
  first = True
  for column in range(columns):
    for step in range(swizzle // 32):
      # In units of 16 bytes: a column of tiles is 8 rows of `swizzle` bytes.
      advance = (column * 8 * swizzle + step * 32) >> 4
      lines += [
        f'add.s64 a, ${count}, {advance};',
        f'add.s64 b, ${count + 1}, {advance};',
        f'setp.ne.b32 p, {0 if first else 1}, 0;',
        f'wgmma.mma_async.sync.aligned.{shape} '
        f'{{{registers}}}, a, b, p{suffix};',
      ]
      first = False
  lines.append('wgmma.commit_group.sync.aligned; }')
  return '\n'.join(lines)


def await_product(product: Any, *, pending: int) -> Any:
  """Waits until at most `pending` groups run; returns the finished product."""
  # The registers pass through the wait, or the compiler could read them before.
  values = unpack(product)
  return pack(
    emit(
      f'wgmma.wait_group.sync.aligned {pending};',
      outputs='f' * len(values),
      operands=values,
      tied=len(values),
    )
  )


def lane_position() -> tuple[Any, Any, Any]:
  """(warp of the warpgroup, lane, lane / 4) of this thread."""
  import jax.experimental.mosaic.gpu as mgpu
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import arith

  i32 = ir.IntegerType.get_signless(32)
  thread = arith.remui(mgpu.utils.thread_idx(), arith.constant(i32, 128))
  lane = arith.remui(thread, arith.constant(i32, 32))
  warp = arith.divui(thread, arith.constant(i32, 32))
  return warp, lane, arith.divui(lane, arith.constant(i32, 4))
