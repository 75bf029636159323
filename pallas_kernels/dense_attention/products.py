"""Matrix products that the kernels share."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import mosaic


def add(
  total: jax.Array, a: jax.Array, b: Any, *, target: mosaic.Target
) -> jax.Array:
  """total + a @ b, finished when it returns.

  Args:
    total: float32 accumulator.
    a: left side, in registers.
    b: right side, in shared memory.
    target: where the kernel runs; the interpreter has no products of
      registers, nor accumulators that begin with a value.
  """
  from jax.experimental.pallas import mosaic_gpu as plgpu

  if target.interprets:
    return total + lax.dot(a.astype(jnp.float32), b[...].astype(jnp.float32))

  def accumulate(acc):
    plgpu.wgmma(acc, a, b)

  result: Any = pl.run_state(accumulate)(plgpu.ACC.init(total))
  return result


def new(a: Any, b: Any, shape: tuple[int, int]) -> jax.Array:
  """a @ b in float32, both in shared memory."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  def accumulate(acc):
    plgpu.wgmma(acc, a, b)
    return acc[...]

  return pl.run_scoped(accumulate, plgpu.ACC(shape, jnp.float32))


def chunks(width: int) -> int:
  """How many 64 columns there are: operands are kept in such chunks."""
  return width // 64


def multiply_transposed(acc: Any, a: Any, b: Any) -> None:
  """acc += a @ b.T, begun and not waited for.

  Args:
    acc: accumulator [rows, columns].
    a: [chunks, rows, 64] in shared memory.
    b: [chunks, columns, 64] in shared memory.
  """
  from jax.experimental.pallas import mosaic_gpu as plgpu

  for chunk in range(a.shape[0]):
    plgpu.wgmma(acc, a.at[chunk], b.at[chunk].transpose((1, 0)))


def copy_chunks(source: Any, smem: Any, barrier: Any) -> None:
  """Copies [rows, chunks * 64] of global memory to [chunks, rows, 64].

  Args:
    source: a function of a slice of columns that gives the reference.
    smem: where to.
    barrier: arrives once a chunk.
  """
  from jax.experimental.pallas import mosaic_gpu as plgpu

  for chunk in range(smem.shape[0]):
    plgpu.copy_gmem_to_smem(
      source(pl.ds(chunk * 64, 64)), smem.at[chunk], barrier
    )
