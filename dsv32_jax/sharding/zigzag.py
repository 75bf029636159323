"""Order of a sequence that is cut over devices, so that each has equal work.

A query attends to the tokens before it, so contiguous shares of a sequence
would cost the last device nearly twice the mean. The sequence is cut into 2n
chunks instead, and device i holds chunks i and 2n - 1 - i: an early and a late
one. With causal attention every device then has the same number of (query, key)
pairs.

Everything that belongs to a token is made in natural order first (positions,
key ranges, targets, next tokens) and then put into this one.
"""

import jax.numpy as jnp
from jaxtyping import Array, Shaped


def to_zigzag(
  x: Shaped[Array, '...'], n: int, axis: int = 1
) -> Shaped[Array, '...']:
  """Puts a sequence in natural order into that of `n` shards.

  Args:
    x: any array.
    n: shards; 1 changes nothing.
    axis: the sequence; a multiple of 2 n.

  Returns:
    The same values; part i of n equal parts is what shard i holds.

  Raises:
    ValueError: for a length that 2 n does not divide.

  Example:
    >>> to_zigzag(jnp.arange(8)[None], 2).tolist()
    [[0, 1, 6, 7, 2, 3, 4, 5]]
  """
  if n == 1:
    return x
  early, late = jnp.split(_chunked(x, (2, n), n, axis), 2, axis)
  pairs = jnp.concatenate(
    [jnp.swapaxes(early, axis, axis + 1),
     jnp.swapaxes(jnp.flip(late, axis + 1), axis, axis + 1)],
    axis + 1,
  )  # fmt: skip
  return pairs.reshape(x.shape)


def to_natural(
  x: Shaped[Array, '...'], n: int, axis: int = 1
) -> Shaped[Array, '...']:
  """Undoes `to_zigzag`.

  Args:
    x: an array in the order of `n` shards.
    n: shards; 1 changes nothing.
    axis: the sequence; a multiple of 2 n.

  Raises:
    ValueError: for a length that 2 n does not divide.

  Example:
    >>> to_natural(to_zigzag(jnp.arange(8)[None], 2), 2).tolist()
    [[0, 1, 2, 3, 4, 5, 6, 7]]
  """
  if n == 1:
    return x
  early, late = jnp.split(_chunked(x, (n, 2), n, axis), 2, axis + 1)
  halves = jnp.concatenate([early, jnp.flip(late, axis)], axis + 1)
  return jnp.swapaxes(halves, axis, axis + 1).reshape(x.shape)


def _chunked(x: Array, split: tuple[int, int], n: int, axis: int) -> Array:
  """The sequence as 2 n chunks, in two dims."""
  length = x.shape[axis]
  if n < 1 or length % (2 * n):
    raise ValueError(
      f'a sequence of {length} tokens cannot be put into zigzag order over '
      f'{n} shards: expected a multiple of {2 * n}'
    )
  return x.reshape(
    *x.shape[:axis], *split, length // (2 * n), *x.shape[axis + 1 :]
  )
