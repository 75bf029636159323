"""Inline PTX of the indexer's forward kernel after a product: sums, stores.

Thread (warp, lane) of a warpgroup stores the score of one key, `thread_key`,
for every second query of a product.
"""

from typing import Any

from pallas_kernels.lightning_indexer.mosaic_ptx import (
  KEYS,
  ROWS,
  emit,
  global_address,
  lane_position,
  pack,
  shared_address,
  unpack,
)


def thread_key() -> Any:
  """Which of the 64 keys this thread stores, int32."""
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import arith

  i32 = ir.IntegerType.get_signless(32)
  warp, lane, group = lane_position()
  half = arith.andi(
    arith.shrui(lane, arith.constant(i32, 1)), arith.constant(i32, 1)
  )
  key = arith.addi(arith.muli(warp, arith.constant(i32, 16)), group)
  return arith.addi(key, arith.muli(half, arith.constant(i32, 8)))


def load_weights(w_ref: Any, offset: Any) -> Any:
  """Half the weights of 128 rows, as `sum_heads` wants them: 32 registers.

  Args:
    w_ref: float32, any shape, in global memory.
    offset: of the first row, int32.
  """
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import arith

  i32, i64 = (ir.IntegerType.get_signless(n) for n in (32, 64))
  _, lane, _ = lane_position()
  column = arith.muli(
    arith.remui(lane, arith.constant(i32, 4)), arith.constant(i32, 2)
  )
  address = arith.addi(
    global_address(w_ref),
    arith.muli(
      arith.extsi(i64, arith.addi(offset, column)), arith.constant(i64, 4)
    ),
  )
  count = ROWS // 4
  lines = [
    f'ld.global.nc.v2.f32 {{${2 * i}, ${2 * i + 1}}}, [${count}+{32 * i}];'
    for i in range(count // 2)
  ]
  lines += [f'mul.f32 ${i}, ${i}, 0f3F000000;' for i in range(count)]
  return pack(emit('\n'.join(lines), outputs='f' * count, operands=[address]))


def load_scale(scale_ref: Any, slot: Any) -> Any:
  """The scale of `thread_key`: one register.

  Args:
    scale_ref: float32 [slots, 64] in shared memory.
    slot: int32.
  """
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import arith

  i32 = ir.IntegerType.get_signless(32)
  index = arith.addi(arith.muli(slot, arith.constant(i32, KEYS)), thread_key())
  address = arith.addi(
    shared_address(scale_ref), arith.muli(index, arith.constant(i32, 4))
  )
  return pack(emit('ld.shared.f32 $0, [$1];', outputs='f', operands=[address]))


def sum_heads(product: Any, weights: Any, *, heads: int) -> list[Any]:
  """sum_j w_j relu(x_j) of each query: 64 / heads values a thread.

  Value m is that of query 2 m + lane % 2 of the product's 128 / heads, and of
  the key `thread_key`. relu(x) = (x + |x|) / 2: an addition with a free
  absolute value runs at twice the rate of a maximum; the half is in the
  weights.

  Args:
    product: from `await_product`.
    weights: from `load_weights`.
    heads: J, of 16, 32 and 64.

  Returns:
    Scalars.
  """
  x, w = unpack(product), unpack(weights)
  _, lane, _ = lane_position()
  text = sum_text(heads=heads)
  return emit(text, outputs='f' * (64 // heads), operands=[*x, *w, lane])


def sum_text(*, heads: int) -> str:
  """PTX of `sum_heads`: results, product, weights, lane."""
  queries = ROWS // heads
  groups = heads // 8  # of 8 rows
  results = queries // 2
  first_x, first_w = results, results + ROWS // 2
  lines = [
    '{ .reg .pred odd, low; .reg .f32 t, keep, send; .reg .b32 bit;',
    f'.reg .f32 s<{2 * queries}>; .reg .f32 k<{2 * results}>;',
    f'and.b32 bit, ${first_w + ROWS // 4}, 1; setp.ne.u32 odd, bit, 0;',
    f'and.b32 bit, ${first_w + ROWS // 4}, 2; setp.ne.u32 low, bit, 0;',
  ]
  # Starting from +0 makes the sum never -0.
  lines += [f'mov.f32 s{i}, 0f00000000;' for i in range(2 * queries)]
  for group in range(groups):
    for e in range(2):
      for query in range(queries):
        i = query * groups + group
        for half in range(2):
          register = f'${first_x + 4 * i + 2 * half + e}'
          total = f's{2 * query + half}'
          lines += [
            f'abs.f32 t, {register};',
            f'add.f32 t, t, {register};',
            f'fma.rn.f32 {total}, t, ${first_w + 2 * i + e}, {total};',
          ]
  # Sums over the four lanes of a key; each lane keeps a fourth of the values.
  for m in range(results):
    for half in range(2):
      even, uneven = f's{4 * m + half}', f's{4 * m + 2 + half}'
      lines += [
        f'selp.f32 keep, {uneven}, {even}, odd;',
        f'selp.f32 send, {even}, {uneven}, odd;',
        'shfl.sync.bfly.b32 send, send, 1, 31, 0xffffffff;',
        f'add.f32 k{2 * m + half}, keep, send;',
      ]
  for m in range(results):
    upper, lower = f'k{2 * m}', f'k{2 * m + 1}'
    lines += [
      f'selp.f32 keep, {lower}, {upper}, low;',
      f'selp.f32 send, {upper}, {lower}, low;',
      'shfl.sync.bfly.b32 send, send, 2, 31, 0xffffffff;',
      f'add.f32 ${m}, keep, send;',
    ]
  lines.append('}')
  return '\n'.join(lines)


def store_scores(
  values: list[Any],
  *,
  row_address: Any,
  key: Any,
  row: Any,
  row_limit: Any,
  ranges: tuple[Any, Any],
  masked: Any,
  num_keys: int,
  out_bf16: bool,
) -> None:
  """Writes one product's scores.

  Args:
    values: from `sum_heads`, scaled.
    row_address: of the output row of this thread's first query (lane % 2).
    key: of this thread.
    row: of this thread's first query in the ranges, [B * T].
    row_limit: one past the last row of this batch entry.
    ranges: addresses of key_start and key_end, [B * T].
    masked: int32, not 0 if some (query, key) of the tile is outside a range.
    num_keys: S, the row length of the output.
    out_bf16: bfloat16 scores, else float32.
  """
  text = store_text(count=len(values), num_keys=num_keys, out_bf16=out_bf16)
  emit(
    text,
    operands=[*values, row_address, key, row, row_limit, *ranges, masked],
  )


def store_text(*, count: int, num_keys: int, out_bf16: bool) -> str:
  """PTX of `store_scores`: values, then its other arguments in order.

  Addresses are made here, not outside, so that few registers live long.
  """
  size = 2 if out_bf16 else 4
  row_address, key, row, limit, start, end, masked = (
    f'${count + i}' for i in range(7)
  )
  lines = [
    '{ .reg .pred m, p, inside, ok; .reg .b32 lo, hi, t; .reg .f32 v; '
    '.reg .b16 h; .reg .b64 a, b, c;',
    f'setp.ne.u32 m, {masked}, 0;',
    f'setp.lt.s32 inside, {key}, {num_keys};',
    f'mad.wide.s32 a, {key}, {size}, {row_address};',
    f'mad.wide.s32 b, {row}, 4, {start};',
    f'mad.wide.s32 c, {row}, 4, {end};',
  ]
  for m in range(count):
    # Past the last query the ranges are not there to be read.
    lines += [
      f'add.s32 t, {row}, {2 * m};',
      f'setp.lt.s32 p, t, {limit};',
      'and.pred ok, m, p;',
      'mov.b32 lo, 0; mov.b32 hi, 2147483647;',
      f'@ok ld.global.nc.b32 lo, [b+{8 * m}];',
      f'@ok ld.global.nc.b32 hi, [c+{8 * m}];',
      f'setp.ge.s32 ok, {key}, lo;',
      f'setp.lt.and.s32 ok, {key}, hi, ok;',
      f'selp.f32 v, ${m}, 0fFF800000, ok;',
      'and.pred p, p, inside;',
    ]
    if out_bf16:
      lines += ['cvt.rn.bf16.f32 h, v;', '@p st.global.b16 [a], h;']
    else:
      lines.append('@p st.global.f32 [a], v;')
    lines.append(f'add.s64 a, a, {2 * num_keys * size};')
  lines.append('}')
  return '\n'.join(lines)


def store_empty(
  address: Any,
  *,
  row_elements: int,
  query: Any,
  key: Any,
  rows: int,
  num_queries: int,
  num_keys: int,
  out_bf16: bool,
) -> None:
  """Writes -inf to `rows` queries x 64 keys; 16 threads a query.

  Args:
    address: of this thread's 4 keys of its first query.
    row_elements: 8 S, from a thread's query to its next.
    query: of this thread's first row, in its batch row.
    key: of this thread's first key.
    rows: a multiple of 8; or less, and the keys of threads beyond are S.
    num_queries: T.
    num_keys: S.
    out_bf16: as `store_scores`.
  """
  size = 2 if out_bf16 else 4
  lines = [
    '{ .reg .pred p, q; .reg .b32 t; .reg .b32 e; .reg .b16 h; .reg .b64 a;',
    f'mov.b32 e, {0xFF80FF80 if out_bf16 else 0xFF800000};',
    'cvt.u16.u32 h, e;',
  ]
  for i in range(max(1, rows // 8)):
    lines += [
      f'add.s32 t, $1, {8 * i};',
      f'setp.lt.s32 p, t, {num_queries};',
      f'add.s64 a, $0, {i * row_elements * size};',
    ]
    if num_keys % 4 == 0:
      lines.append(f'setp.lt.and.s32 q, $2, {num_keys}, p;')
      lines.append(
        '@q st.global.v2.b32 [a], {e, e};'
        if out_bf16
        else '@q st.global.v4.b32 [a], {e, e, e, e};'
      )
    else:
      for j in range(4):
        lines += [
          f'setp.lt.and.s32 q, $2, {num_keys - j}, p;',
          f'@q st.global.b16 [a+{2 * j}], h;'
          if out_bf16
          else f'@q st.global.b32 [a+{4 * j}], e;',
        ]
  lines.append('}')
  emit('\n'.join(lines), operands=[address, query, key])
