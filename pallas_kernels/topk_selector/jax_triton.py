"""Token selection in Triton, through jax-triton: one read of the row.

Letters: B batch, T query tokens, S key tokens, K selected tokens, R rows, one
for each query of the batch.

A program walks over a row in tiles, in the order of the keys, and keeps a list
of the scores that can still be among the k best. When the list is full, the k
best of it are kept, and from then on a score must exceed the k-th of them: an
equal one has a higher index and loses the tie. So the list is always in the
order of the keys, nothing is read twice, no atomic is needed, and a row of
equal scores costs no more than another.
"""

import functools
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.topk_selector import by_rows, config


def select_rows(
  scores_RS: Float[Array, 'R S'],
  start_R: Int32[Array, ' R'] | None = None,
  end_R: Int32[Array, ' R'] | None = None,
  *,
  k: int,
  sizes: config.TritonConfig | None = None,
) -> Int32[Array, 'R K']:
  """Ascending indices of the k best keys of each row, then -1.

  Args:
    scores_RS: float32 or bfloat16.
    start_R: first key looked at; scores before it are not read.
    end_R: one past the last. None for both: every key.
    k: width of the result.
    sizes: None for those of `config`.

  Raises:
    NotImplementedError: there is no NVIDIA GPU, jax-triton isn't installed, or
      k is too large.
  """
  jax_triton = _import()
  R, S = scores_RS.shape
  # No row has more keys than it has: its list never holds more.
  wanted = min(k, S)
  if sizes is None:
    sizes = config.triton_config(
      num_rows=R, k=wanted, num_multiprocessors=_multiprocessors()
    )
  if wanted + sizes.tile > sizes.capacity:
    raise NotImplementedError(
      f'the Triton selection keeps {sizes.capacity} keys of a row, and selects '
      f'at most {sizes.capacity - sizes.tile}; k is {k}'
    )
  if R * S == 0:
    return jnp.full((R, k), -1, jnp.int32)
  programs = min(R, sizes.programs_per_multiprocessor * _multiprocessors())
  list_shape = jax.ShapeDtypeStruct((programs, sizes.capacity), jnp.int32)
  has_ranges = start_R is not None
  none_1 = jnp.zeros((1,), jnp.int32)
  indices_RK, *_ = jax_triton.triton_call(
    scores_RS,
    start_R if has_ranges else none_1,
    end_R if has_ranges else none_1,
    R,
    S,
    kernel=make_kernel(),
    out_shape=(
      jax.ShapeDtypeStruct((R, wanted), jnp.int32),
      list_shape,
      list_shape,
    ),
    grid=(programs,),
    name='select_rows',
    num_warps=sizes.num_warps,
    num_stages=1,
    k=wanted,
    k_padded=1 << (wanted - 1).bit_length(),
    tile=sizes.tile,
    capacity=sizes.capacity,
    has_ranges=has_ranges,
  )
  return jnp.pad(indices_RK, ((0, 0), (0, k - wanted)), constant_values=-1)


select_topk = functools.partial(by_rows.select_topk, select_rows=select_rows)
"""See `pallas_kernels.select_topk`; raises as `select_rows`."""

indexed_topk = functools.partial(by_rows.indexed_topk, select_rows=select_rows)
"""See `pallas_kernels.indexed_topk`; raises as `select_rows`."""


def _import() -> Any:
  """jax-triton, or NotImplementedError with the reason."""
  if jax.default_backend() != 'gpu':
    raise NotImplementedError(
      'the Triton selection runs on NVIDIA GPUs; the default backend is '
      f'{jax.default_backend()!r}'
    )
  try:
    import jax_triton
    import triton  # noqa: F401
  except ImportError as error:
    raise NotImplementedError(
      f'the Triton selection needs jax-triton and triton: {error}'
    ) from error
  return jax_triton


@functools.cache
def _multiprocessors() -> int:
  return jax.devices()[0].core_count


@functools.cache
@typing.no_type_check  # the tests' type checker would wrap what Triton reads
def make_kernel():
  """The Triton kernel; made here, because Triton is an optional dependency."""
  import triton
  import triton.language as tl

  lowest = tl.constexpr(-(2**31))

  @triton.jit
  def load(row_ptr, position, start, end):
    valid = (position >= start) & (position < end)
    score = tl.load(row_ptr + position, mask=valid, other=-float('inf'))
    return score.to(tl.float32)

  @triton.jit
  def key_of_score(score):
    """int32 that orders as the score does; -0.0 and 0.0 have the same."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)

  @triton.jit
  def score_of_key(key):
    bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.int32)
    return bits.to(tl.float32, bitcast=True)

  @triton.jit
  def best(key, k: tl.constexpr):
    """The k largest of more than k keys, and the k-th largest.

    Of equal keys the first are taken. An unused entry holds the least int32.
    """
    used = key != lowest
    low = tl.min(tl.where(used, key, 0x7FFFFFFF)).to(tl.int64)
    high = tl.max(key).to(tl.int64)
    # At least k keys are >= low, and fewer than k are > high, or low is found.
    at_low = tl.sum(used.to(tl.int32))
    above_high = 0
    halve = False
    while low < high:
      # By turns where k would lie if the counts rose evenly, and in the middle.
      share = (at_low - k).to(tl.float32) / (at_low - above_high).to(tl.float32)
      share = tl.where(halve, 0.5, share)
      step = ((high - low).to(tl.float32) * share).to(tl.int64)
      middle = tl.minimum(low + 1 + step, high)
      enough = tl.sum((key >= middle.to(tl.int32)).to(tl.int32))
      found = enough >= k
      low = tl.where(found, middle, low)
      at_low = tl.where(found, enough, at_low)
      high = tl.where(found, high, middle - 1)
      above_high = tl.where(found, above_high, enough)
      high = tl.where(enough == k, low, high)
      halve = not halve
    threshold = low.to(tl.int32)
    above = key > threshold
    equal = (key == threshold) & used
    room = k - tl.sum(above.to(tl.int32))
    kept = above | (equal & (tl.cumsum(equal.to(tl.int32)) <= room))
    return kept, threshold

  @triton.jit
  def select_rows(
    scores_ptr,
    start_ptr,
    end_ptr,
    num_rows,
    num_keys,
    indices_ptr,
    list_key_ptr,
    list_index_ptr,
    k: tl.constexpr,
    k_padded: tl.constexpr,
    tile: tl.constexpr,
    capacity: tl.constexpr,
    has_ranges: tl.constexpr,
  ):
    """Writes the ascending indices of the k best of each row, then -1.

    Args:
      scores_ptr: [num_rows, num_keys].
      start_ptr: int32 [num_rows], first key looked at, where `has_ranges`.
      end_ptr: int32 [num_rows], one past the last.
      num_rows: rows.
      num_keys: keys of a row.
      indices_ptr: int32 [num_rows, k].
      list_key_ptr: int32 [programs, capacity], scratch.
      list_index_ptr: int32 [programs, capacity], scratch.
      k: keys selected.
      k_padded: the power of two from k up.
      tile: scores looked at together.
      capacity: entries of the list; at least k + tile.
      has_ranges: whether only start .. end - 1 count.
    """
    program = tl.program_id(0)
    list_key_ptr += program * capacity
    list_index_ptr += program * capacity
    lane = tl.arange(0, tile)
    entry = tl.arange(0, capacity)
    slot = tl.arange(0, k_padded)
    for row in range(program, num_rows, tl.num_programs(0)):
      row_ptr = scores_ptr + tl.cast(row, tl.int64) * num_keys
      start = 0
      end = num_keys
      if has_ranges:
        start = tl.maximum(tl.load(start_ptr + row), 0)
        end = tl.minimum(tl.load(end_ptr + row), num_keys)
      first = start // tile * tile
      count = 0
      floor = -float('inf')
      score = load(row_ptr, first + lane, start, end)
      for base in range(first, end, tile):
        ahead = load(row_ptr, base + tile + lane, start, end)
        keep = score > floor
        added = tl.sum(keep.to(tl.int32))
        if count + added > capacity:
          tl.debug_barrier()
          key = tl.load(list_key_ptr + entry, mask=entry < count, other=lowest)
          index = tl.load(list_index_ptr + entry, mask=entry < count, other=0)
          kept, threshold = best(key, k)
          position = tl.cumsum(kept.to(tl.int32)) - 1
          tl.debug_barrier()
          tl.store(list_key_ptr + position, key, mask=kept)
          tl.store(list_index_ptr + position, index, mask=kept)
          count = k
          floor = score_of_key(threshold)
          keep = score > floor
          added = tl.sum(keep.to(tl.int32))
        position = count + tl.cumsum(keep.to(tl.int32)) - 1
        tl.store(list_key_ptr + position, key_of_score(score), mask=keep)
        tl.store(list_index_ptr + position, base + lane, mask=keep)
        count += added
        score = ahead

      tl.debug_barrier()
      out_ptr = indices_ptr + tl.cast(row, tl.int64) * k
      if count > k:
        key = tl.load(list_key_ptr + entry, mask=entry < count, other=lowest)
        kept, _ = best(key, k)
        index = tl.load(list_index_ptr + entry, mask=entry < count, other=0)
        tl.store(out_ptr + tl.cumsum(kept.to(tl.int32)) - 1, index, mask=kept)
      else:
        all_of_them = tl.load(
          list_index_ptr + slot, mask=slot < count, other=-1
        )
        tl.store(out_ptr + slot, all_of_them, mask=slot < k)
      tl.debug_barrier()

  return select_rows
