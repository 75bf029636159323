"""Masks of keys packed 32 to a word, and the keys that their bits name.

Letters: B batch, T query tokens, S key tokens, K selected tokens, W words of
32 keys.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Int32, UInt32

WORD = 32
"""Keys of a word."""


def pack(mask: Bool[Array, '*b S']) -> UInt32[Array, '*b W']:
  """Packs 32 keys to a word, the lowest index in the lowest bit."""
  missing = -mask.shape[-1] % WORD
  if missing:
    mask = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, missing)])
  mask = mask.reshape(*mask.shape[:-1], -1, WORD)
  bit = jnp.left_shift(jnp.uint32(1), jnp.arange(WORD, dtype=jnp.uint32))
  bit = bit.reshape((1,) * (mask.ndim - 1) + (WORD,))
  return jnp.sum(jnp.where(mask, bit, 0), axis=-1, dtype=jnp.uint32)


def last_kept(
  at_words: UInt32[Array, 'B T W'], room: Int32[Array, 'B T']
) -> Int32[Array, 'B T']:
  """Index of the last of the first `room` keys at the threshold; -1 if none."""
  rank = jnp.maximum(room - 1, 0)[..., None]
  return jnp.where(room > 0, _nth_set_bit(at_words, rank)[..., 0], -1)


def indices(
  above_words: UInt32[Array, 'B T W'],
  at_words: UInt32[Array, 'B T W'],
  room: Int32[Array, 'B T'],
  *,
  k: int,
) -> Int32[Array, 'B T K']:
  """Ascending indices of the selected keys, then -1."""
  # Keep the bits of at_words up to the last one kept, inclusive.
  first_bit = WORD * jnp.arange(above_words.shape[-1], dtype=jnp.int32)
  keep = last_kept(at_words, room)[..., None] + 1 - first_bit[None, None]
  keep = jnp.clip(keep, 0, WORD)
  # A shift by the whole width of a word is undefined.
  low = jnp.left_shift(
    jnp.uint32(1), jnp.minimum(keep, WORD - 1).astype(jnp.uint32)
  )
  low = jnp.where(keep == WORD, jnp.uint32(0xFFFFFFFF), low - 1)
  words = above_words | (at_words & low)

  count = jnp.sum(
    lax.population_count(words), axis=-1, keepdims=True, dtype=jnp.int32
  )
  rank = jnp.broadcast_to(
    jnp.arange(k, dtype=jnp.int32)[None, None], (*words.shape[:2], k)
  )
  return jnp.where(rank < count, _nth_set_bit(words, rank), -1)


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

  word = jnp.zeros(rank.shape, jnp.int32)
  if levels:
    # Not for 0 levels: a loop of none leaves arrays of size 0 to autodiff, on
    # which XLA fails where they enter a `jax.shard_map` inside of a scan.
    word = lax.fori_loop(0, levels, narrow, word)

  # Then the bit within the word, halving the part that is looked at.
  bits = take(words, word)
  rest = jnp.maximum(rank - take(total - counts, word), 0).astype(jnp.uint32)

  def halve(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
    position, rest = state
    width = jnp.right_shift(jnp.uint32(WORD), (i + 1).astype(jnp.uint32))
    part = jnp.left_shift(jnp.uint32(1), width) - 1
    below = lax.population_count(jnp.right_shift(bits, position) & part)
    skip = below <= rest
    return (
      jnp.where(skip, position + width, position),
      jnp.where(skip, rest - below, rest),
    )

  position, _ = lax.fori_loop(0, 5, halve, (jnp.zeros_like(rest), rest))
  return word * WORD + position.astype(jnp.int32)
