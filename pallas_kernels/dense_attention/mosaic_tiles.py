"""What the three kernels of dense attention share.

A task is a tile of one head: 128 queries or keys, 64 for each of two
warpgroups. A third one copies blocks of the other side to a ring of slots.
Blocks are visited in three runs, of which only the first and the last are
masked (`key_blocks`).
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import mosaic

ROWS = 64
"""Queries, or keys, of a warpgroup."""

LOG2_E = math.log2(math.e)


def heads_at_a_time(num_heads: int, bytes_a_head: int, l2_bytes: int) -> int:
  """The largest divisor of the heads whose operands stay in the L2 cache."""
  return max(
    n
    for n in range(1, num_heads + 1)
    if not num_heads % n and (n == 1 or n * bytes_a_head <= l2_bytes)
  )


def place(
  task: Any,
  *,
  num_heads: int,
  together: int,
  tiles: int,
  last_first: bool,
) -> tuple[Any, Any, Any]:
  """(batch entry, head, tile) of a task.

  Args:
    task: its number.
    num_heads: H.
    together: heads side by side, so that they share the L2 cache.
    tiles: of a head.
    last_first: whether tiles count down: the longest of a causal mask first,
      so that the last ones to finish are short.
  """
  head_in = lax.rem(task, together)
  task = task // together
  tile = lax.rem(task, tiles)
  if last_first:
    tile = tiles - 1 - tile
  task = task // tiles
  head = lax.rem(task, num_heads // together) * together + head_in
  return task // (num_heads // together), head, tile


def copy_blocks(
  first: Any,
  end: Any,
  *parts: tuple[Any, Callable[[Any, Any], None]],
  size: int,
  stages: int,
) -> None:
  """The copying warpgroup's work on a tile.

  Args:
    first: first block.
    end: one past the last.
    *parts: (barriers of free slots, function that starts the copies) of what
      gets free at a time; the function gets the block's slice and its slot.
    size: of a block.
    stages: slots.
  """
  from jax.experimental.pallas import mosaic_gpu as plgpu

  def one_block(i, carry):
    slot = lax.rem(i, stages)
    here = pl.ds((first + i) * size, size)
    for free, copy in parts:

      @pl.when(i >= stages)
      def _(free=free):
        plgpu.barrier_wait(free.at[slot])

      copy(here, slot)
    return carry

  lax.fori_loop(0, end - first, one_block, ())

  # No barrier is left in a phase that nobody has seen.
  def drain(i, carry):
    for free, _ in parts:
      plgpu.barrier_wait(free.at[lax.rem(i, stages)])
    return carry

  lax.fori_loop(jnp.maximum(end - first - stages, 0), end - first, drain, ())


def over_blocks(
  bounds: tuple[Any, Any, Any, Any], one_block: Callable[..., Any], carry: Any
) -> Any:
  """Runs carry = one_block(i, carry, is_masked=) over a tile's blocks.

  Args:
    bounds: first, whole_first, whole_end, end of `key_blocks.Blocks`.
    one_block: what to do.
    carry: its first value.
  """
  for i, is_masked in enumerate((True, False, True)):
    carry = lax.fori_loop(
      bounds[i],
      bounds[i + 1],
      lambda j, carry, m=is_masked: one_block(j, carry, is_masked=m),
      carry,
    )
  return carry


def swizzled() -> tuple[Any, ...]:
  """Layout of bfloat16 operands in shared memory."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  return (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def kernel(
  body: Callable[..., None], *, tasks: int, target: mosaic.Target, **types: Any
) -> Callable[..., Any]:
  """`mosaic.kernel` of the warpgroups above."""
  return mosaic.kernel(
    body,
    target=target,
    grid=(tasks,),
    grid_names=('task',),
    num_threads=3,
    thread_name='wg',
    **types,
  )
