"""Named shapes, shared by the tests and the benchmark."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ArgSpec:
  """Sizes of one call: B, T, S, H, X and U."""

  batch: int
  num_queries: int
  num_keys: int
  num_heads: int
  width: int
  value_width: int
  dtype: str = 'bfloat16'

  @property
  def scale(self) -> float:
    """A softmax scale of the usual size."""
    return self.width**-0.5


def _causal(length: int, num_heads: int, width: int, value_width: int):
  return ArgSpec(
    batch=1,
    num_queries=length,
    num_keys=length,
    num_heads=num_heads,
    width=width,
    value_width=value_width,
  )


BENCHMARK_SPECS = {
  'cpu_512': ArgSpec(
    batch=1,
    num_queries=512,
    num_keys=512,
    num_heads=4,
    width=48,
    value_width=32,
    dtype='float32',
  ),
  'v32_4k': _causal(4096, 128, 192, 128),
  'v32_16k': _causal(16384, 128, 192, 128),
}
