"""What the indexer's two backward kernels share.

Both keep 128 rows or keys, 64 a warpgroup, and let tiles of 128 of the other
kind stream past; both have attention's two products, the left operand of the
second one in registers.
"""

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


def drain(free: Any, count: Any) -> None:
  """Waits for every phase, or what follows would race."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  def wait(i: Any, _: Any) -> Any:
    plgpu.barrier_wait(free.at[lax.rem(i, STAGES)])
    return ()

  lax.fori_loop(jnp.maximum(count - STAGES, 0), count, wait, ())


def more_registers(target: mosaic.Target) -> None:
  from jax.experimental.pallas import mosaic_gpu as plgpu

  if not target.interprets:
    plgpu.set_max_registers(_COMPUTE_REGISTERS, action='increase')


def fewer_registers(target: mosaic.Target) -> None:
  from jax.experimental.pallas import mosaic_gpu as plgpu

  if not target.interprets:
    plgpu.set_max_registers(_LOAD_REGISTERS, action='decrease')
