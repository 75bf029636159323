"""Named shapes, shared by the tests and the benchmark."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ArgSpec:
  """Sizes of one call: B, T, S, J, I, H, G, X and K.

  Attributes:
    sees_all_keys: queries come after all keys; otherwise they are the last of
      the keys' positions. Of selections only: all keys are always causal.
  """

  batch: int
  num_queries: int
  num_keys: int
  index_heads: int
  index_dim: int
  num_heads: int
  num_key_heads: int
  width: int
  topk: int
  dtype: str = 'float32'
  sees_all_keys: bool = False

  @property
  def scale(self) -> float:
    """A softmax scale of the usual size."""
    return self.width**-0.5


TEST_SPECS = {
  'latent_keys': ArgSpec(
    batch=2,
    num_queries=64,
    num_keys=64,
    index_heads=4,
    index_dim=16,
    num_heads=4,
    num_key_heads=1,
    width=24,
    topk=16,
  ),
  'key_per_head': ArgSpec(
    batch=2,
    num_queries=40,
    num_keys=40,
    index_heads=3,
    index_dim=8,
    num_heads=4,
    num_key_heads=4,
    width=12,
    topk=9,
  ),
  'ragged': ArgSpec(
    batch=3,
    num_queries=37,
    num_keys=53,
    index_heads=2,
    index_dim=12,
    num_heads=6,
    num_key_heads=2,
    width=10,
    topk=7,
  ),
  'bfloat16': ArgSpec(
    batch=2,
    num_queries=48,
    num_keys=48,
    index_heads=4,
    index_dim=16,
    num_heads=4,
    num_key_heads=1,
    width=32,
    topk=12,
    dtype='bfloat16',
  ),
}


def _cpu(batch: int, length: int, topk: int) -> ArgSpec:
  return ArgSpec(
    batch=batch,
    num_queries=length,
    num_keys=length,
    index_heads=4,
    index_dim=32,
    num_heads=4,
    num_key_heads=1,
    width=48,
    topk=topk,
  )


def _v32(length: int, key_heads: int = 1, width: int = 576) -> ArgSpec:
  return ArgSpec(
    batch=1,
    num_queries=4096,
    num_keys=length,
    index_heads=64,
    index_dim=128,
    num_heads=128,
    num_key_heads=key_heads,
    width=width,
    topk=2048,
    dtype='bfloat16',
  )


BENCHMARK_SPECS = {
  't0_256': _cpu(2, 256, 64),
  't0_1k': _cpu(1, 1024, 256),
  'cpu_512': _cpu(8, 512, 64),
  'cpu_4k_k64': _cpu(1, 4096, 64),
  'cpu_16k_k32': _cpu(1, 16384, 32),
  'small_4k': ArgSpec(
    batch=1,
    num_queries=4096,
    num_keys=4096,
    index_heads=32,
    index_dim=128,
    num_heads=64,
    num_key_heads=1,
    width=576,
    topk=1024,
    dtype='bfloat16',
  ),
  'v32_4k': _v32(4096),
  'v32_32k': _v32(32768),
  # A selection as the rivals' own benchmarks make it: k keys of all.
  'v32_selected_32k': dataclasses.replace(_v32(32768), sees_all_keys=True),
  # Keys per head, as in dense warm-up.
  'v32_heads_4k': _v32(4096, key_heads=128, width=192),
}
