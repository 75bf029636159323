"""Named shapes of the token selection, for tests and benchmarks."""

import dataclasses

from pallas_kernels.lightning_indexer import arg_specs as indexer_specs


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ArgSpec:
  """An indexer shape and the number of tokens selected."""

  indexer: indexer_specs.ArgSpec
  k: int


TEST_SPECS = {
  'one_block': ArgSpec(indexer=indexer_specs.TEST_SPECS['one_block'], k=4),
  'fewer_keys_than_k': ArgSpec(
    indexer=indexer_specs.TEST_SPECS['one_block'], k=12
  ),
  'ragged_blocks': ArgSpec(
    indexer=indexer_specs.TEST_SPECS['ragged_blocks'], k=33
  ),
  'several_windows': ArgSpec(
    indexer=indexer_specs.TEST_SPECS['several_windows'], k=130
  ),
  'decode': ArgSpec(indexer=indexer_specs.TEST_SPECS['decode'], k=32),
}

BENCHMARK_SPECS = {
  name: ArgSpec(indexer=indexer_specs.BENCHMARK_SPECS[name], k=k)
  for name, k in (
    ('cpu_train', 64),
    ('tiny_long', 32),
    ('tiny_decode_1k', 32),
    ('tiny_decode_16k', 32),
    ('v32_prefill_32k', 2048),
    ('v32_decode_128k', 2048),
  )
}
