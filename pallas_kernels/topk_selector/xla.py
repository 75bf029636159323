"""Token selection on any backend: exact threshold, then packed bits.

Letters: B batch, T query tokens, S key tokens, K selected tokens.

No sort and no top-k: those take time in proportion to k log k a row on one
core, and partition badly. Instead

  1. each score becomes an int32 that orders as the score does, the top and
     bottom halves of which are int16;
  2. the k-th largest is found bit by bit, 16 steps for each half, each step
     one count over the row (int16 compares fill a vector unit twice as well as
     int32 ones, and the step count doesn't depend on the data, so nothing has
     to be agreed between devices);
  3. masks are packed 32 keys to a word (`xla_words`); of the keys equal to the
     threshold the first ones are kept, and the index of the last one kept is a
     search over the words' running popcounts;
  4. the same search turns the selected words into ascending indices.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int16, Int32

from pallas_kernels import windows
from pallas_kernels.lightning_indexer import quantization
from pallas_kernels.lightning_indexer import xla as lightning_indexer
from pallas_kernels.lightning_indexer.stored_keys import StoredKeys
from pallas_kernels.topk_selector import config, xla_words
from pallas_kernels.topk_selector.selection import Selection

_INT32_MIN = np.int32(-(2**31))
_INT16_MIN = np.int16(-(2**15))
_LANES = 128
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
    return xla_words.indices(
      xla_words.pack(above), xla_words.pack(at_threshold), room, k=k
    )

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
    last = xla_words.last_kept(xla_words.pack(at_threshold), room)
    position = jnp.arange(S, dtype=jnp.int32)[None, None]
    return above | (at_threshold & (position <= last[..., None]))

  with jax.named_scope('selection_mask'):
    return windows.map_query_blocks(block, scores_BTS, block=sizes.query_block)


@functools.partial(jax.jit, static_argnames=('k', 'scale_format'))
def indexed_topk(
  q_index_BTJI: Float[Array, 'B T J I'],
  k_index_BSI: Float[Array, '_B _S I'],
  w_index_BTJ: Float[Array, 'B T J'],
  *,
  k: int,
  key_start_BT: Int32[Array, 'B T'] | None = None,
  key_end_BT: Int32[Array, 'B T'] | None = None,
  k_scale_BS: Float32[Array, '_B _S'] | None = None,
  pages_BN: Int32[Array, 'B N'] | None = None,
  scale_format: str = 'float32',
) -> Selection:
  """See `pallas_kernels.indexed_topk`."""
  q_BTJI, k_BSI, w_BTJ = lax.stop_gradient(
    (q_index_BTJI, k_index_BSI, w_index_BTJ)
  )
  keys = StoredKeys(k_BSI, k_scale_BS, pages_BN)
  if k_scale_BS is not None:
    q_BTJI = quantization.round_trip(q_BTJI, scale_format == 'ue8m0')
  B, T = q_BTJI.shape[:2]
  S = keys.num_keys
  start_BT, end_BT = windows.key_ranges(
    key_start_BT, key_end_BT, batch=B, num_queries=T, num_keys=S
  )
  sizes = config.xla_config(batch=B, num_queries=T, num_keys=S)
  num_words = math.ceil(S / xla_words.WORD)
  few = T == 1 and k <= _FEW

  def block(
    q_BtJI: Array, w_BtJ: Array, start_Bt: Array, end_Bt: Array
  ) -> Array:
    def branch(offset: Array, width: int) -> tuple[Array, ...]:
      scores_BtW = lightning_indexer.score_stored(
        q_BtJI, keys, w_BtJ, start_Bt, end_Bt, offset, width
      )
      if few:
        return _few_indices(scores_BtW, k=k), offset
      above, at_threshold, room = _split(scores_BtW, k=k)
      # Packed and padded, every width gives the same small shape, and what
      # follows is compiled once.
      words = [
        jnp.pad(x, ((0, 0), (0, 0), (0, num_words - x.shape[-1])))
        for x in (xla_words.pack(above), xla_words.pack(at_threshold))
      ]
      return *words, room, offset

    *parts, offset = windows.over_window(
      branch, start_Bt, end_Bt, num_keys=S, count=sizes.key_windows
    )
    indices_BtK = parts[0] if few else xla_words.indices(*parts, k=k)
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
