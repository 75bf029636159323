"""Named shapes of the lightning indexer, for tests and benchmarks.

Letters: B batch, T query tokens, S key tokens, J indexer heads, I index head
dim.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ArgSpec:
  """One shape; `causal` ranges aligned at the end."""

  batch: int
  queries: int
  keys: int
  heads: int
  dim: int

  def make(
    self,
    *,
    seed: int,
    dtype: Any = jnp.float32,
    integers: bool = False,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Random (q_BTJI, k_BSI, w_BTJ).

    Args:
      seed: of the generator.
      dtype: of the three arrays.
      integers: small whole numbers, so that every implementation computes the
        same scores to the last bit, with many ties and many zeros.
    """
    rng = np.random.default_rng(seed)
    shapes = (
      (self.batch, self.queries, self.heads, self.dim),
      (self.batch, self.keys, self.dim),
      (self.batch, self.queries, self.heads),
    )
    arrays = [rng.normal(size=shape) for shape in shapes]
    if integers:
      arrays = [np.round(x) for x in arrays]
    q, k, w = (jnp.asarray(x, dtype) for x in arrays)
    return q, k, w


TEST_SPECS = {
  'one_block': ArgSpec(batch=2, queries=9, keys=9, heads=3, dim=5),
  'ragged_blocks': ArgSpec(batch=1, queries=600, keys=600, heads=2, dim=4),
  'several_windows': ArgSpec(batch=2, queries=40, keys=1300, heads=2, dim=4),
  'decode': ArgSpec(batch=3, queries=1, keys=300, heads=4, dim=8),
}

BENCHMARK_SPECS = {
  'cpu_train': ArgSpec(batch=8, queries=512, keys=512, heads=8, dim=32),
  'tiny_long': ArgSpec(batch=1, queries=4096, keys=4096, heads=16, dim=16),
  'tiny_decode_1k': ArgSpec(batch=1, queries=1, keys=1024, heads=16, dim=16),
  'tiny_decode_16k': ArgSpec(batch=1, queries=1, keys=16384, heads=16, dim=16),
  'v32_prefill_32k': ArgSpec(
    batch=1, queries=4096, keys=32768, heads=64, dim=128
  ),
  'v32_prefill_4k': ArgSpec(
    batch=1, queries=4096, keys=4096, heads=64, dim=128
  ),
  'v32_prefill_128k': ArgSpec(
    batch=1, queries=4096, keys=131072, heads=64, dim=128
  ),
  'glm_prefill_32k': ArgSpec(
    batch=1, queries=4096, keys=32768, heads=32, dim=128
  ),
  'v32_decode_128k': ArgSpec(
    batch=64, queries=1, keys=131072, heads=64, dim=128
  ),
}
