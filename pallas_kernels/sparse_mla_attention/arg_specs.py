"""Named shapes, shared by the tests and the benchmark."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ArgSpec:
  """Sizes of one call: B, T, S, H, C, R (so X = C + R) and K.

  Attributes:
    sees_all_keys: queries come after all keys, as in decoding; otherwise they
      are the last of the keys' positions and selections are causal.
  """

  batch: int
  num_queries: int
  num_keys: int
  num_heads: int
  latent_dim: int
  rope_dim: int
  topk: int
  dtype: str = 'float32'
  sees_all_keys: bool = False

  @property
  def scale(self) -> float:
    """A softmax scale of the usual size."""
    return (self.latent_dim + self.rope_dim) ** -0.5


TEST_SPECS = {
  'square': ArgSpec(
    batch=2,
    num_queries=64,
    num_keys=64,
    num_heads=4,
    latent_dim=16,
    rope_dim=8,
    topk=16,
  ),
  'ragged': ArgSpec(
    batch=3,
    num_queries=37,
    num_keys=53,
    num_heads=3,
    latent_dim=12,
    rope_dim=4,
    topk=7,
  ),
  'wider_than_keys': ArgSpec(
    batch=1,
    num_queries=19,
    num_keys=19,
    num_heads=2,
    latent_dim=8,
    rope_dim=8,
    topk=24,
  ),
  'decode': ArgSpec(
    batch=2,
    num_queries=1,
    num_keys=70,
    num_heads=4,
    latent_dim=16,
    rope_dim=8,
    topk=8,
  ),
  'bfloat16': ArgSpec(
    batch=2,
    num_queries=48,
    num_keys=48,
    num_heads=4,
    latent_dim=16,
    rope_dim=16,
    topk=12,
    dtype='bfloat16',
  ),
}


def _cpu(batch: int, length: int, topk: int) -> ArgSpec:
  return ArgSpec(
    batch=batch,
    num_queries=length,
    num_keys=length,
    num_heads=4,
    latent_dim=32,
    rope_dim=16,
    topk=topk,
  )


def _v32(num_keys: int, *, batch: int = 1, num_queries: int = 4096) -> ArgSpec:
  # Selections as the rivals' own benchmarks make them: k keys of all.
  return ArgSpec(
    batch=batch,
    num_queries=num_queries,
    num_keys=num_keys,
    num_heads=128,
    latent_dim=512,
    rope_dim=64,
    topk=2048,
    dtype='bfloat16',
    sees_all_keys=True,
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
    num_heads=64,
    latent_dim=512,
    rope_dim=64,
    topk=1024,
    dtype='bfloat16',
  ),
  'v32_4k': _v32(4096),
  'v32_32k': _v32(32768),
  'v32_128k': _v32(131072),
  # A query each of 128 sequences, which share 16 caches.
  'v32_decode_32k': _v32(32768, batch=16, num_queries=8),
}
