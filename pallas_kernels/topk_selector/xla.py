"""Token selection on any backend: exact threshold, then packed bits.

Letters: B batch, T query tokens, S key tokens, K selected tokens, W words of
32 keys.

No sort and no top-k: those take time in proportion to k log k a row on one
core, and partition badly. Instead

  1. each score becomes an int32 that orders as the score does, the top and
     bottom halves of which are int16;
  2. the k-th largest is found bit by bit, 16 steps for each half, each step
     one count over the row (int16 compares fill a vector unit twice as well as
     int32 ones, and the step count doesn't depend on the data, so nothing has
     to be agreed between devices);
  3. masks are packed 32 keys to a word; of the keys equal to the threshold the
     first ones are kept, and the index of the last one kept is a search over
     the words' running popcounts;
  4. the same search turns the selected words into ascending indices.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int16, Int32, UInt32

from pallas_kernels import windows
from pallas_kernels.lightning_indexer import xla as lightning_indexer
from pallas_kernels.topk_selector import config
from pallas_kernels.topk_selector.selection import Selection

_INT32_MIN = np.int32(-(2**31))
_INT16_MIN = np.int16(-(2**15))
_LANES = 128
_WORD = 32
# On one row and up to about this k, `lax.top_k` beats the threshold search.
_FEW = 128
# Keys of a block of `_top_k_of_blocks`.
_BLOCK = 64


@functools.partial(jax.jit, static_argnames='k')
def select_topk(scores_BTS: Float[Array, 'B T S'], *, k: int) -> Selection:
  """See `pallas_kernels.select_topk`."""
  scores_BTS = lax.stop_gradient(scores_BTS)
  B, T, S = scores_BTS.shape
  sizes = config.xla_config(batch=B, num_queries=T, num_keys=S)

  def block(scores_BtS: Array) -> Array:
    above, at_threshold, room = _split(scores_BtS, k=k)
    return _indices(_pack(above), _pack(at_threshold), room, k=k)

  with jax.named_scope('select_topk'):
    indices_BTK = windows.map_query_blocks(
      block, scores_BTS, block=sizes.query_block
    )
  return Selection(indices_BTK=indices_BTK)


@functools.partial(jax.jit, static_argnames='k')
def selection_mask(
  scores_BTS: Float[Array, 'B T S'], *, k: int
) -> Bool[Array, 'B T S']:
  """See `pallas_kernels.selection_mask`."""
  scores_BTS = lax.stop_gradient(scores_BTS)
  B, T, S = scores_BTS.shape
  sizes = config.xla_config(batch=B, num_queries=T, num_keys=S)

  def block(scores_BtS: Array) -> Array:
    above, at_threshold, room = _split(scores_BtS, k=k)
    last = _last_kept(_pack(at_threshold), room)
    position = jnp.arange(S, dtype=jnp.int32)[None, None]
    return above | (at_threshold & (position <= last[..., None]))

  with jax.named_scope('selection_mask'):
    return windows.map_query_blocks(block, scores_BTS, block=sizes.query_block)


@functools.partial(jax.jit, static_argnames='k')
def indexed_topk(
  q_index_BTJI: Float[Array, 'B T J I'],
  k_index_BSI: Float[Array, 'B S I'],
  w_index_BTJ: Float[Array, 'B T J'],
  *,
  k: int,
  key_start_BT: Int32[Array, 'B T'] | None = None,
  key_end_BT: Int32[Array, 'B T'] | None = None,
) -> Selection:
  """See `pallas_kernels.indexed_topk`."""
  q_BTJI, k_BSI, w_BTJ = lax.stop_gradient(
    (q_index_BTJI, k_index_BSI, w_index_BTJ)
  )
  B, T = q_BTJI.shape[:2]
  S = k_BSI.shape[1]
  start_BT, end_BT = windows.key_ranges(
    key_start_BT, key_end_BT, batch=B, num_queries=T, num_keys=S
  )
  sizes = config.xla_config(batch=B, num_queries=T, num_keys=S)
  num_words = math.ceil(S / _WORD)
  few = T == 1 and k <= _FEW

  def block(
    q_BtJI: Array, w_BtJ: Array, start_Bt: Array, end_Bt: Array
  ) -> Array:
    def branch(offset: Array, width: int) -> tuple[Array, ...]:
      k_BWI = lax.dynamic_slice_in_dim(k_BSI, offset, width, axis=1)
      scores_BtW = lightning_indexer.score_window(
        q_BtJI, k_BWI, w_BtJ, start_Bt, end_Bt, offset
      )
      if few:
        return _few_indices(scores_BtW, k=k), offset
      above, at_threshold, room = _split(scores_BtW, k=k)
      # Packed and padded, every width gives the same small shape, and what
      # follows is compiled once.
      words = [
        jnp.pad(x, ((0, 0), (0, 0), (0, num_words - x.shape[-1])))
        for x in (_pack(above), _pack(at_threshold))
      ]
      return *words, room, offset

    *parts, offset = windows.over_window(
      branch, start_Bt, end_Bt, num_keys=S, count=sizes.key_windows
    )
    indices_BtK = parts[0] if few else _indices(*parts, k=k)
    return jnp.where(indices_BtK < 0, -1, indices_BtK + offset)

  with jax.named_scope('indexed_topk'):
    indices_BTK = windows.map_query_blocks(
      block, q_BTJI, w_BTJ, start_BT, end_BT, block=sizes.query_block
    )
  return Selection(indices_BTK=indices_BTK)


def _few_indices(
  scores: Float[Array, 'B T S'], *, k: int
) -> Int32[Array, 'B T K']:
  """A small k of one query: `lax.top_k`, which keeps the lowest of equals."""
  S = scores.shape[-1]
  scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
  if S > 2 * k * _BLOCK:
    best, index = _top_k_of_blocks(scores, k)
  else:
    best, index = lax.top_k(scores, min(k, S))
  index = jnp.sort(jnp.where(best > -jnp.inf, index, S), axis=-1)
  index = jnp.pad(
    index, ((0, 0), (0, 0), (0, max(k - S, 0))), constant_values=S
  )
  return jnp.where(index == S, -1, index).astype(jnp.int32)


def _top_k_of_blocks(
  scores: Float[Array, 'B T S'], k: int
) -> tuple[Float[Array, 'B T K'], Int32[Array, 'B T K']]:
  """What `lax.top_k` gives, looking at k blocks of keys only.

  They are the k blocks of the largest maxima, the first of equal ones. A key
  elsewhere is beaten by the maximum of each of them: by a larger score, or by
  an equal one at a lower index.
  """
  missing = -scores.shape[-1] % _BLOCK
  if missing:
    scores = jnp.pad(
      scores, ((0, 0), (0, 0), (0, missing)), constant_values=-jnp.inf
    )
  blocks_BTNb = scores.reshape(*scores.shape[:2], -1, _BLOCK)
  _, block_BTK = lax.top_k(jnp.max(blocks_BTNb, axis=-1), k)
  block_BTK = jnp.sort(block_BTK, axis=-1)
  few = jnp.take_along_axis(blocks_BTNb, block_BTK[..., None], axis=2)
  best, index = lax.top_k(few.reshape(*scores.shape[:2], -1), k)
  block = jnp.take_along_axis(block_BTK, index // _BLOCK, axis=-1)
  return best, block * _BLOCK + index % _BLOCK


def _split(
  scores: Float[Array, 'B T S'], *, k: int
) -> tuple[Bool[Array, 'B T S'], Bool[Array, 'B T S'], Int32[Array, 'B T']]:
  """Keys above the k-th largest score, keys at it, and the room for those.

  Where all valid keys are selected the threshold is below them all, and the
  room is 0.
  """
  key = _ordered_int(scores)
  threshold, above, valid = _threshold(key, k=k)
  return (
    key > threshold[..., None],
    key == threshold[..., None],
    jnp.minimum(k, valid) - above,
  )


def _last_kept(
  at_words: UInt32[Array, 'B T W'], room: Int32[Array, 'B T']
) -> Int32[Array, 'B T']:
  """Index of the last of the first `room` keys at the threshold; -1 if none."""
  rank = jnp.maximum(room - 1, 0)[..., None]
  return jnp.where(room > 0, _nth_set_bit(at_words, rank)[..., 0], -1)


def _indices(
  above_words: UInt32[Array, 'B T W'],
  at_words: UInt32[Array, 'B T W'],
  room: Int32[Array, 'B T'],
  *,
  k: int,
) -> Int32[Array, 'B T K']:
  """Ascending indices of the selected keys, then -1."""
  # Keep the bits of at_words up to the last one kept, inclusive.
  first_bit = _WORD * jnp.arange(above_words.shape[-1], dtype=jnp.int32)
  keep = _last_kept(at_words, room)[..., None] + 1 - first_bit[None, None]
  keep = jnp.clip(keep, 0, _WORD)
  # A shift by the whole width of a word is undefined.
  low = jnp.left_shift(
    jnp.uint32(1), jnp.minimum(keep, _WORD - 1).astype(jnp.uint32)
  )
  low = jnp.where(keep == _WORD, jnp.uint32(0xFFFFFFFF), low - 1)
  words = above_words | (at_words & low)

  count = jnp.sum(
    lax.population_count(words), axis=-1, keepdims=True, dtype=jnp.int32
  )
  rank = jnp.broadcast_to(
    jnp.arange(k, dtype=jnp.int32)[None, None], (*words.shape[:2], k)
  )
  return jnp.where(rank < count, _nth_set_bit(words, rank), -1)


def _ordered_int(scores: Float[Array, '*b S']) -> Int32[Array, '*b S']:
  """int32 in the order of the scores; the minimum for -inf and NaN."""
  bits = lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.int32)
  # Floats are sign and magnitude: flip the magnitude of the negative ones.
  key = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
  key = jnp.where(bits == _INT32_MIN, 0, key)  # the bits of -0.0
  return jnp.where(scores > -jnp.inf, key, _INT32_MIN)


def _threshold(
  key: Int32[Array, '*b S'], *, k: int
) -> tuple[Int32[Array, '*b'], Int32[Array, '*b'], Int32[Array, '*b']]:
  """The k-th largest key, the count above it, and the count of valid keys.

  With fewer than k valid keys the threshold is below all of them.
  """
  missing = -key.shape[-1] % _LANES
  if missing:
    key = jnp.pad(
      key,
      [(0, 0)] * (key.ndim - 1) + [(0, missing)],
      constant_values=_INT32_MIN,
    )
  key = key.reshape(*key.shape[:-1], -1, _LANES)
  top = jnp.right_shift(key, 16).astype(jnp.int16)
  bottom = ((key & 0xFFFF) - 2**15).astype(jnp.int16)

  def half(
    state: tuple[Array, Array], is_bottom: Array
  ) -> tuple[tuple[Array, Array], Array]:
    high, need = state
    # Of the bottom halves only those count whose top half is the threshold's.
    # The others go to the minimum, where no step of the search counts them.
    shared = jnp.where(top == high[..., None, None], bottom, _INT16_MIN)
    part = jnp.where(is_bottom, shared, top)
    found = _kth_largest(part, need)
    return (found, need - _count(part > found[..., None, None])), found

  (_, room), (high, low) = lax.scan(
    half,
    (
      jnp.full(key.shape[:-2], _INT16_MIN),
      jnp.full(key.shape[:-2], k, jnp.int32),
    ),
    jnp.asarray([False, True]),
  )
  threshold = jnp.left_shift(high.astype(jnp.int32), 16) + (
    low.astype(jnp.int32) + 2**15
  )
  return threshold, k - room, _count(key > _INT32_MIN)


def _kth_largest(
  key: Int16[Array, '*b N L'], k: Int32[Array, '*b']
) -> Int16[Array, '*b']:
  """Largest t with at least k keys >= t, bit by bit; the minimum if none."""

  def step(i: Array, found: Array) -> Array:
    candidate = found + jnp.right_shift(jnp.int32(2**15), i)
    enough = _count(key >= candidate.astype(jnp.int16)[..., None, None]) >= k
    return jnp.where(enough, candidate, found)

  start = jnp.full(k.shape, _INT16_MIN, jnp.int32)
  return lax.fori_loop(0, 16, step, start).astype(jnp.int16)


def _count(mask: Bool[Array, '*b N L']) -> Int32[Array, '*b']:
  """Number of True, added up lane by lane in int16 (so S < 2**22) first."""
  lanes = jnp.sum(mask.astype(jnp.int16), axis=-2, dtype=jnp.int16)
  return jnp.sum(lanes, axis=-1, dtype=jnp.int32)


def _pack(mask: Bool[Array, '*b S']) -> UInt32[Array, '*b W']:
  """Packs 32 keys to a word, the lowest index in the lowest bit."""
  missing = -mask.shape[-1] % _WORD
  if missing:
    mask = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, missing)])
  mask = mask.reshape(*mask.shape[:-1], -1, _WORD)
  bit = jnp.left_shift(jnp.uint32(1), jnp.arange(_WORD, dtype=jnp.uint32))
  bit = bit.reshape((1,) * (mask.ndim - 1) + (_WORD,))
  return jnp.sum(jnp.where(mask, bit, 0), axis=-1, dtype=jnp.uint32)


def _nth_set_bit(
  words: UInt32[Array, '*b W'], rank: Int[Array, '*b K']
) -> Int32[Array, '*b K']:
  """Position of the set bit number `rank` (from 0) of each row.

  Where a row has no such bit the result is arbitrary, but not negative.
  """
  num_words = words.shape[-1]
  counts = lax.population_count(words).astype(jnp.int32)
  total = jnp.cumsum(counts, axis=-1)

  def take(x: Array, i: Array) -> Array:
    return jnp.take_along_axis(x, i, axis=-1, mode='promise_in_bounds')

  # Loops, not unrolled: a chain of gathers takes long to compile. First the
  # word whose running total is the first to exceed the rank, by bisection.
  levels = (num_words - 1).bit_length()

  def narrow(i: Array, word: Array) -> Array:
    candidate = word + jnp.right_shift(jnp.int32(1 << levels), i + 1)
    before = take(total, jnp.minimum(candidate, num_words) - 1)
    skip = (before <= rank) & (candidate < num_words)
    return jnp.where(skip, candidate, word)

  word = lax.fori_loop(0, levels, narrow, jnp.zeros(rank.shape, jnp.int32))

  # Then the bit within the word, halving the part that is looked at.
  bits = take(words, word)
  rest = jnp.maximum(rank - take(total - counts, word), 0).astype(jnp.uint32)

  def halve(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
    position, rest = state
    width = jnp.right_shift(jnp.uint32(_WORD), (i + 1).astype(jnp.uint32))
    part = jnp.left_shift(jnp.uint32(1), width) - 1
    below = lax.population_count(jnp.right_shift(bits, position) & part)
    skip = below <= rest
    return (
      jnp.where(skip, position + width, position),
      jnp.where(skip, rest - below, rest),
    )

  position, _ = lax.fori_loop(0, 5, halve, (jnp.zeros_like(rest), rest))
  return word * _WORD + position.astype(jnp.int32)
