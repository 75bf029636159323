"""Time of a call, and the ceilings of the machine in the same process."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.benchmarks import costs


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
  """What the machine reaches on the two plainest programs.

  Attributes:
    flops: a second, of a square matrix product.
    bytes: a second, read and written by a copy.
    dtype: of the product.
    side: of its matrices.
  """

  flops: float
  bytes: float
  dtype: str
  side: int

  def seconds(self, cost: costs.Cost) -> float:
    """The least time of some work: products and copies overlap."""
    return max(self._products(cost), cost.bytes / self.bytes)

  def bound(self, cost: costs.Cost) -> str:
    """Which of the two it is."""
    is_products = self._products(cost) >= cost.bytes / self.bytes
    return 'matmul' if is_products else 'copy'

  def _products(self, cost: costs.Cost) -> float:
    return cost.flops / (cost.rate * self.flops)


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
  """Time of one call, from a queue of calls long enough to hide the launch.

  The function must have run before: nothing may compile now.
  """
  begin = time.perf_counter()
  jax.block_until_ready(function(*arguments))
  once = time.perf_counter() - begin
  calls = max(1, min(50, int(0.02 / max(once, 1e-6))))
  begin = time.perf_counter()
  result = None
  for _ in range(calls):
    result = function(*arguments)
  jax.block_until_ready(result)
  return (time.perf_counter() - begin) / calls


def median_seconds(function: Callable[..., Any], *arguments: Any) -> float:
  """Median of five `seconds`."""
  jax.block_until_ready(function(*arguments))
  return statistics.median(seconds(function, *arguments) for _ in range(5))


def ceilings() -> Ceilings:
  """Measures both on random data (constants run faster than the power cap)."""
  on_gpu = jax.default_backend() == 'gpu'
  side, dtype = (8192, jnp.bfloat16) if on_gpu else (1024, jnp.float32)
  size = 2**29 if on_gpu else 2**24
  keys = jax.random.split(jax.random.key(0), 3)
  a, b = (jax.random.normal(key, (side, side), dtype) for key in keys[:2])
  product = median_seconds(jax.jit(jnp.matmul), a, b)
  x = jax.random.normal(keys[2], (size,), jnp.float32)
  copy = _negation_seconds(x)
  return Ceilings(
    flops=2 * side**3 / product,
    bytes=2 * 4 * size / copy,
    dtype=jnp.dtype(dtype).name,
    side=side,
  )


def _negation_seconds(x: jax.Array) -> float:
  """Reads and writes x once, in place: new pages cost a CPU more than both.

  Negation, as XLA may see through a plain copy.
  """
  negate = jax.jit(jnp.negative, donate_argnums=0)
  x = jax.block_until_ready(negate(x))
  times = []
  for _ in range(5):
    begin = time.perf_counter()
    for _ in range(10):
      x = negate(x)
    jax.block_until_ready(x)
    times.append((time.perf_counter() - begin) / 10)
  return statistics.median(times)
