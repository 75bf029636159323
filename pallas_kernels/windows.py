"""Query blocks and the windows of keys that they need.

Letters: B batch, T query tokens, S key tokens.

Key s is valid for query t iff `key_start_BT[b, t] <= s < key_end_BT[b, t]`.
Compiled shapes are static, ranges are not; so an xla implementation walks over
blocks of queries, asks which keys any query of the block can see, and runs the
smallest of a few compiled window widths that covers them. Causality, packed
documents and half-empty caches are then skipped, not only masked.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

_ALIGNMENT = 128


def key_ranges(
  key_start_BT: Int[Array, 'B T'] | None,
  key_end_BT: Int[Array, 'B T'] | None,
  *,
  batch: int,
  num_queries: int,
  num_keys: int,
) -> tuple[Int[Array, 'B T'], Int[Array, 'B T']]:
  """Fills in the default range: causal, aligned at the end.

  Without ranges query t sees keys 0 .. t + (S - T), so the last query sees
  every key (a chunk of new queries after a cached prefix).

  Raises:
    ValueError: one of the two is given without the other, or a shape is not
      [batch, num_queries].
  """
  if (key_start_BT is None) != (key_end_BT is None):
    missing = 'key_start_BT' if key_start_BT is None else 'key_end_BT'
    raise ValueError(
      f'{missing} is None; expected key_start_BT and key_end_BT together, or '
      'neither'
    )
  shape = (batch, num_queries)
  if key_start_BT is None or key_end_BT is None:
    end_T = jnp.arange(num_queries, dtype=jnp.int32) + (
      1 + num_keys - num_queries
    )
    return (
      jnp.zeros(shape, jnp.int32),
      jnp.broadcast_to(jnp.maximum(end_T, 0)[None], shape),
    )
  for name, value in (
    ('key_start_BT', key_start_BT),
    ('key_end_BT', key_end_BT),
  ):
    if value.shape != shape:
      raise ValueError(f'{name} has shape {value.shape}; expected {shape}')
  return key_start_BT.astype(jnp.int32), key_end_BT.astype(jnp.int32)


def range_mask(
  key_start_BT: Int[Array, 'B T'],
  key_end_BT: Int[Array, 'B T'],
  *,
  offset: Int[Array, ''] | int = 0,
  width: int,
) -> Bool[Array, 'B T W']:
  """Which of the keys offset .. offset + width - 1 each query may see."""
  position_W = offset + jnp.arange(width, dtype=jnp.int32)[None, None]
  return (position_W >= key_start_BT[..., None]) & (
    position_W < key_end_BT[..., None]
  )


def window_widths(num_keys: int, *, count: int) -> tuple[int, ...]:
  """At most `count` widths up to `num_keys`, aligned, ascending."""
  widths = {num_keys}
  for i in range(1, count):
    width = math.ceil(num_keys * i / count / _ALIGNMENT) * _ALIGNMENT
    widths.add(min(width, num_keys))
  return tuple(sorted(widths))


def over_window(
  branch: Callable[..., Any],
  key_start_BT: Int[Array, 'B T'],
  key_end_BT: Int[Array, 'B T'],
  *operands: Any,
  num_keys: int,
  count: int,
) -> Any:
  """Runs `branch(offset, width, *operands)` on the keys that are needed.

  Args:
    branch: gets a traced int32 `offset` and a static `width`, and must return
      the same shapes for every width. Every valid key of every query lies in
      offset .. offset + width - 1.
    key_start_BT: first valid key of each query of the block.
    key_end_BT: one past the last valid key.
    *operands: passed on (arrays that differ from call to call).
    num_keys: S.
    count: how many widths to compile.
  """
  some = key_end_BT > key_start_BT
  first = jnp.min(jnp.where(some, key_start_BT, num_keys), initial=num_keys)
  last = jnp.max(jnp.where(some, key_end_BT, 0), initial=0)
  first = jnp.clip(first, 0, num_keys)
  span = jnp.minimum(last, num_keys) - first
  widths = window_widths(num_keys, count=count)

  def with_width(width: int) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
      offset = jnp.minimum(first, num_keys - width).astype(jnp.int32)
      return branch(offset, width, *args)

    return run

  if len(widths) == 1:
    return with_width(num_keys)(*operands)
  index = jnp.sum(jnp.asarray(widths[:-1], jnp.int32) < span)
  return lax.switch(index, [with_width(w) for w in widths], *operands)


def pad_queries(x: Array, *, block: int) -> Array:
  """Pads axis 1 with zeros to a multiple of `block` (an empty key range)."""
  missing = -x.shape[1] % block
  if not missing:
    return x
  return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))


def query_slice(x: Array, i: Int[Array, ''] | int, *, block: int) -> Array:
  """Block i of axis 1."""
  return lax.dynamic_slice_in_dim(x, i * block, block, axis=1)


def map_query_blocks(f: Callable[..., Any], *arrays: Array, block: int) -> Any:
  """Applies `f` to blocks of axis 1, one after the other, and joins them.

  Args:
    f: gets one block of each array ([B, block, ...]) and returns an array or a
      tree of arrays [B, block, ...].
    *arrays: [B, T, ...]; the last block is filled with zeros.
    block: queries a block.
  """
  num_queries = arrays[0].shape[1]
  if num_queries <= block:
    return f(*arrays)
  padded = [pad_queries(x, block=block) for x in arrays]
  out = lax.map(
    lambda i: f(*(query_slice(x, i, block=block) for x in padded)),
    jnp.arange(padded[0].shape[1] // block),
  )

  def join(x_nBt: Array) -> Array:
    x_Bnt = jnp.moveaxis(x_nBt, 0, 1)
    x_BT = x_Bnt.reshape(x_Bnt.shape[0], -1, *x_Bnt.shape[3:])
    return x_BT[:, :num_queries]

  return jax.tree.map(join, out)
