"""Rows of the 8-bit cache, turned into bfloat16 on their way to shared memory.

`fp8_cache` says what is in a row. Eight threads take one, 16 bytes at a time;
loads are apart from the conversion, so that the loads of the next rows are on
their way while the tile is still in use.

Letters: S keys, Z = 656 bytes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.sparse_mla_attention import fp8_cache, mosaic_gather


def _words(part: int) -> int:
  """Registers of a row that a thread holds: values and scales, rotary keys."""
  return 2 * 4 + 2 if part < 2 else 4


def _layout(part: int) -> Any:
  from jax.experimental.pallas import mosaic_gpu as plgpu

  count = mosaic_gather.PASSES * _words(part)
  return plgpu.Layout.WG_STRIDED((mosaic_gather.THREADS * count,), vec_size=1)


def load(
  cache_ref: Any, indices: jax.Array, *, part: int, target: mosaic.Target
) -> jax.Array:
  """Starts to load a part of 64 rows.

  Args:
    cache_ref: uint8 [S, Z] in global memory.
    indices: what `mosaic_gather.load_indices` returned.
    part: 0 and 1 for a half of the latents, 2 for the rotary keys.
    target: what the kernel is built for.

  Returns:
    Something for `store`, in registers.
  """
  from jax.experimental.pallas import mosaic_gpu as plgpu

  if target.interprets:
    return indices

  count = mosaic_gather.PASSES * _words(part)

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(), mosaic_gather.index_layout()),
    return_type=plgpu.ShapeDtypeStruct(
      (mosaic_gather.THREADS * count,), jnp.int32, layout=_layout(part)
    ),
  )
  def start(ctx, cache, indices):
    import numpy as np
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    del ctx
    int32 = ir.IntegerType.get_signless(32)
    int64 = ir.IntegerType.get_signless(64)
    lane = arith.remui(mosaic_gather.thread_number(), mosaic.i32(8))
    skip = arith.extui(int64, arith.muli(lane, mosaic.i32(16)))
    base = llvm.ptrtoint(int64, mgpu.utils.memref_ptr(cache))
    registers = []

    def words(address, number, valid):
      kind = ir.VectorType.get((number,), int32)
      pointer = llvm.inttoptr(ir.Type.parse('!llvm.ptr<1>'), address)
      loaded = llvm.load(kind, pointer, alignment=4 * number)
      for i in range(number):
        word = vector.extract(loaded, [], [i])
        word = arith.select(valid, word, mosaic.i32(0))
        registers.append(vector.broadcast(ir.VectorType.get((1,), int32), word))

    for register in indices.registers.flat:
      index = vector.extract(register, [], [0])
      valid = arith.cmpi(arith.CmpIPredicate.sge, index, mosaic.i32(0))
      row = arith.extsi(int64, arith.select(valid, index, mosaic.i32(0)))
      row = arith.addi(base, arith.muli(row, mosaic.i64(fp8_cache.ROW_BYTES)))
      mine = arith.addi(row, skip)
      if part == 2:
        words(arith.addi(mine, mosaic.i64(fp8_cache.ROPE_START)), 4, valid)
        continue
      for block in (2 * part, 2 * part + 1):
        there = arith.addi(mine, mosaic.i64(block * fp8_cache.BLOCK))
        words(there, 4, valid)
      words(
        arith.addi(row, mosaic.i64(fp8_cache.SCALES_START + 8 * part)), 2, valid
      )
    return mgpu.FragmentedArray(
      _registers=np.array(registers, dtype=object),
      _layout=_layout(part).to_mgpu(),
      _is_signed=True,
    )

  return start(cache_ref, indices)


def store(
  cache_ref: Any,
  loaded: jax.Array,
  tiles_ref: Any,
  landed: mosaic_gather.Landed,
  *,
  slot: Any,
  barrier: Any,
  part: int,
) -> None:
  """Converts what `load` started to load, into a tile."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  if landed.target.interprets:
    _plain_store(cache_ref, loaded, tiles_ref, slot, part)
    plgpu.commit_smem()
    plgpu.barrier_arrive(landed.ref.at[barrier])
    return

  splat = plgpu.Layout.WG_SPLAT
  tile_width = tiles_ref.shape[2]

  @plgpu.inline_mgpu(
    arg_types=(
      _layout(part),
      plgpu.RefType(mosaic_gather.transforms()),
      plgpu.RefType(),
      splat,
      splat,
    )
  )
  def convert(ctx, loaded, tiles, barriers, slot, barrier):
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, vector

    del ctx
    thread = mosaic_gather.thread_number()
    group = arith.divui(thread, mosaic.i32(8))
    lane = arith.remui(thread, mosaic.i32(8))
    line = arith.remui(group, mosaic.i32(8))
    start = arith.addi(
      mosaic_gather.shared_address(tiles),
      arith.muli(
        slot.registers.item(), mosaic.i32(mosaic_gather.ROWS * tile_width * 2)
      ),
    )
    start = arith.addi(
      start,
      arith.addi(
        arith.muli(
          arith.divui(group, mosaic.i32(8)), mosaic.i32(8 * tile_width * 2)
        ),
        arith.muli(line, mosaic.i32(128)),
      ),
    )
    # 16 latents are two 16-byte pieces of a line of 64.
    piece = arith.muli(arith.remui(lane, mosaic.i32(4)), mosaic.i32(2))
    latents = arith.addi(
      start,
      arith.muli(arith.divui(lane, mosaic.i32(4)), mosaic.i32(8 * 128)),
    )
    pieces = [
      arith.addi(
        latents,
        arith.muli(
          arith.xori(arith.addi(piece, mosaic.i32(i)), line), mosaic.i32(16)
        ),
      )
      for i in range(2)
    ]
    rope = arith.addi(start, arith.muli(arith.xori(lane, line), mosaic.i32(16)))
    words = [vector.extract(x, [], [0]) for x in loaded.registers.flat]
    for i in range(mosaic_gather.PASSES):
      skip = i * 16 * tile_width * 2
      row = words[i * _words(part) : (i + 1) * _words(part)]
      if part == 2:
        to = skip + fp8_cache.LATENT_DIM // mosaic_gather.CHUNK * 8 * 128
        mosaic.asm(
          f'st.shared.v4.b32 [$0+{to}], {{$1, $2, $3, $4}};', rope, *row
        )
        continue
      for j in range(2):
        column = (2 * part + j) * fp8_cache.BLOCK
        scale = arith.bitcast(ir.F32Type.get(), row[8 + j])
        for k in range(2):
          _store_latents(
            pieces[k],
            skip + column // mosaic_gather.CHUNK * 8 * 128,
            row[4 * j + 2 * k : 4 * j + 2 * k + 2],
            scale,
          )
    there = arith.addi(
      mosaic_gather.shared_address(barriers),
      arith.muli(barrier.registers.item(), mosaic.i32(8)),
    )
    mosaic.asm('fence.proxy.async.shared::cta;')
    mosaic.asm('mbarrier.arrive.release.cta.shared::cta.b64 _, [$0];', there)

  convert(loaded, tiles_ref, landed.ref, jnp.int32(slot), jnp.int32(barrier))


def _store_latents(address: Any, offset: int, words: Any, scale: Any) -> None:
  """Eight values of e4m3 times their scale, as bfloat16, to shared memory."""
  lines = [
    '{ .reg .b16 e<4>; .reg .b32 h<4>, w<4>; .reg .b16 x, y;',
    '.reg .f32 f, g;',
    'mov.b32 {e0, e1}, $1; mov.b32 {e2, e3}, $2;',
  ]
  for i in range(4):
    lines.append(
      f'cvt.rn.f16x2.e4m3x2 h{i}, e{i}; mov.b32 {{x, y}}, h{i}; '
      'cvt.f32.f16 f, x; cvt.f32.f16 g, y; mul.f32 f, f, $3; '
      f'mul.f32 g, g, $3; cvt.rn.bf16x2.f32 w{i}, g, f;'
    )
  lines.append(f'st.shared.v4.b32 [$0+{offset}], {{w0, w1, w2, w3}}; }}')
  mosaic.asm(' '.join(lines), address, *words, scale)


def _plain_store(cache_ref, indices, tiles_ref, slot, part):
  half = fp8_cache.LATENT_DIM // 2
  first = part * half
  last = first + (half if part < 2 else fp8_cache.ROPE_DIM)
  span = functools.partial(mosaic_gather.pl_ds, size=last - first)

  def copy(r, _):
    index = lax.dynamic_index_in_dim(indices, r, keepdims=False)
    row = cache_ref[
      jnp.maximum(index, 0), mosaic_gather.pl_ds(0, fp8_cache.ROW_BYTES)
    ]
    row = fp8_cache.unpack_rows(row)[first:last]
    row = jnp.where(index < 0, 0.0, row).astype(tiles_ref.dtype)
    tiles_ref[slot, r, span(first)] = row
    return ()

  lax.fori_loop(0, mosaic_gather.ROWS, copy, ())
