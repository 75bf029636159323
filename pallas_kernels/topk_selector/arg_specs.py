"""Named shapes of the token selection, for tests and benchmarks."""

import dataclasses

from pallas_kernels.lightning_indexer import arg_specs as indexer_specs


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ArgSpec:
  """An indexer shape and the number of tokens selected.

  Attributes:
    indexer: its shape.
    k: tokens selected.
    sees_all_keys: every score is finite; otherwise they are causal.
  """

  indexer: indexer_specs.ArgSpec
  k: int
  sees_all_keys: bool = False


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


def _rows(batch: int, queries: int, keys: int) -> ArgSpec:
  indexer = indexer_specs.ArgSpec(
    batch=batch, queries=queries, keys=keys, heads=64, dim=128
  )
  return ArgSpec(indexer=indexer, k=2048, sees_all_keys=True)


# Rows without -inf, as the rivals' own benchmarks have them.
BENCHMARK_SPECS |= {
  'rows_4096_32k': _rows(1, 4096, 32768),
  'rows_4096_128k': _rows(1, 4096, 131072),
  'rows_128_128k': _rows(128, 1, 131072),
}
