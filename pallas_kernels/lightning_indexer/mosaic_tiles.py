"""What the indexer's two backward kernels share.

Both keep 128 rows or keys, 64 a warpgroup, and let tiles of 128 of the other
kind stream past; both have attention's two products, the left operand of the
second one in registers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import mosaic

TILE = 128
"""Keys, or rows, that stream past; also rows, or keys, of a block."""

GROUPS = 2
"""Warpgroups that compute; a third one loads."""

HALF = TILE // GROUPS
"""Rows, or keys, of a computing warpgroup."""

STAGES = 3
"""Tiles in flight."""

_COMPUTE_REGISTERS = 232
_LOAD_REGISTERS = 40


def transforms(dim: int, dtype: Any) -> Any:
  from jax.experimental.pallas import mosaic_gpu as plgpu

  size = jnp.dtype(dtype).itemsize
  swizzle = min(128, dim * size)
  return (
    plgpu.TilingTransform((8, swizzle // size)),
    plgpu.SwizzleTransform(swizzle),
  )


def query_range(
  start: Any, end: Any, b: Any, query: Any, num_queries: int
) -> tuple[Any, Any]:
  bounded = jnp.minimum(query, num_queries - 1)
  hi = jnp.where(query < num_queries, end[b, bounded], 0)
  return start[b, bounded], hi


def iota(axis: int) -> Any:
  from jax.experimental.pallas import mosaic_gpu as plgpu

  return plgpu.broadcasted_iota(
    jnp.int32, (HALF, TILE), axis, layout=plgpu.Layout.WGMMA
  )


def zeros(shape: tuple[int, int]) -> Any:
  from jax.experimental.pallas import mosaic_gpu as plgpu

  return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def product(a: Any, b: Any, shape: tuple[int, int]) -> Any:
  from jax.experimental.pallas import mosaic_gpu as plgpu

  def compute(acc: Any) -> Any:
    plgpu.wgmma(acc, a, b)
    return acc[...]

  return pl.run_scoped(compute, plgpu.ACC(shape, jnp.float32))


def accumulate(total: Any, a: Any, b: Any, target: mosaic.Target) -> Any:
  from jax.experimental.pallas import mosaic_gpu as plgpu

  if target.interprets:  # which has no left operand in registers
    return total + jnp.dot(a.astype(jnp.float32), b[...].astype(jnp.float32))

  def compute(acc: Any) -> None:
    plgpu.wgmma(acc, a, b)

  return pl.run_state(compute)(plgpu.ACC.init(total))


def spread(
  source: Callable[[int], Any],
  ranges: Sequence[tuple[Any, Any]],
  keys: Any,
  *,
  heads: int,
  axis: int,
) -> Any:
  """Gradients of a tile's scores for its products, 0 outside the ranges.

  Args:
    source: of a query's number in the tile: where its scores' gradients are.
    ranges: for each query (first valid key, one past the last).
    keys: number of each key, laid out as a vector along the other axis.
    heads: J; the rows of query j are `heads` j and the ones after it.
    axis: of the tile's rows.
  """
  from jax.experimental.pallas import mosaic_gpu as plgpu

  def one(j: int) -> Any:
    lo, hi = ranges[j]
    g = plgpu.load(source(j), layout=plgpu.Layout.WGMMA.reduce(axis))
    g = jnp.where((keys >= lo) & (keys < hi), g, 0.0)
    return lax.broadcast_in_dim(g, (HALF, TILE), [1 - axis])

  tile = one(0)
  for j in range(1, len(ranges)):
    later = one(j)
    tile = jnp.where(iota(axis) >= j * heads, later, tile)
  return tile


def load_tiles(count: Any, free: Any, load: Callable[[Any, Any], None]) -> None:
  """The loading warpgroup: calls load(i, slot) as slots get free."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  def step(i: Any, _: Any) -> Any:
    slot = lax.rem(i, STAGES)

    @pl.when(i >= STAGES)
    def _() -> None:
      plgpu.barrier_wait(free.at[slot])

    load(i, slot)
    return ()

  lax.fori_loop(0, count, step, ())

  # Every phase is waited for, or what follows would race.
  def drain(i: Any, _: Any) -> Any:
    plgpu.barrier_wait(free.at[lax.rem(i, STAGES)])
    return ()

  lax.fori_loop(jnp.maximum(count - STAGES, 0), count, drain, ())


def more_registers(target: mosaic.Target) -> None:
  from jax.experimental.pallas import mosaic_gpu as plgpu

  if not target.interprets:
    plgpu.set_max_registers(_COMPUTE_REGISTERS, action='increase')


def fewer_registers(target: mosaic.Target) -> None:
  from jax.experimental.pallas import mosaic_gpu as plgpu

  if not target.interprets:
    plgpu.set_max_registers(_LOAD_REGISTERS, action='decrease')


def kernel(
  body: Callable[..., None], *, target: mosaic.Target, blocks: int, **types: Any
) -> Callable[..., Any]:
  """`mosaic.kernel` of the warpgroups above."""
  return mosaic.kernel(
    body,
    target=target,
    grid=(blocks,),
    grid_names=('block',),
    num_threads=GROUPS + 1,
    thread_name='warpgroup',
    **types,
  )
