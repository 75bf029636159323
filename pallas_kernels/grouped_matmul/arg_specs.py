"""Named shapes, shared by the tests and the benchmark."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ArgSpec:
  """Sizes of one call: M rows, D and F widths, E experts.

  Attributes:
    has_equal_groups: otherwise each row's expert is drawn by itself.
  """

  num_rows: int
  input_dim: int
  output_dim: int
  num_experts: int
  dtype: str = 'float32'
  has_equal_groups: bool = False


# Small enough for the definition, which computes every expert for every row.
TEST_SPECS = {
  'even_blocks': ArgSpec(
    num_rows=256, input_dim=16, output_dim=8, num_experts=4
  ),
  'ragged_rows': ArgSpec(
    num_rows=301, input_dim=12, output_dim=20, num_experts=5
  ),
  'one_expert': ArgSpec(num_rows=70, input_dim=8, output_dim=8, num_experts=1),
  'fewer_rows_than_experts': ArgSpec(
    num_rows=9, input_dim=8, output_dim=4, num_experts=16
  ),
  'bfloat16': ArgSpec(
    num_rows=192, input_dim=32, output_dim=16, num_experts=4, dtype='bfloat16'
  ),
}

# The routed experts' first product (gate and up side by side would be 2 F).
BENCHMARK_SPECS = {
  'cpu_512': ArgSpec(num_rows=512, input_dim=128, output_dim=64, num_experts=8),
  'cpu_2k': ArgSpec(num_rows=2048, input_dim=128, output_dim=64, num_experts=8),
  'cpu_8k': ArgSpec(num_rows=8192, input_dim=128, output_dim=64, num_experts=8),
  'cpu_32k': ArgSpec(
    num_rows=32768, input_dim=128, output_dim=64, num_experts=8
  ),
  'mini_64k': ArgSpec(
    num_rows=65536,
    input_dim=384,
    output_dim=256,
    num_experts=8,
    dtype='bfloat16',
  ),
  'small_64k': ArgSpec(
    num_rows=65536,
    input_dim=1024,
    output_dim=512,
    num_experts=16,
    dtype='bfloat16',
  ),
  # V3.2's first product for 4096 tokens: a quarter of the experts, and all.
  'v32_e64_32k': ArgSpec(
    num_rows=32768,
    input_dim=7168,
    output_dim=2048,
    num_experts=64,
    dtype='bfloat16',
  ),
  'v32_e64_32k_equal': ArgSpec(
    num_rows=32768,
    input_dim=7168,
    output_dim=2048,
    num_experts=64,
    dtype='bfloat16',
    has_equal_groups=True,
  ),
  'v32_e256_32k': ArgSpec(
    num_rows=32768,
    input_dim=7168,
    output_dim=2048,
    num_experts=256,
    dtype='bfloat16',
  ),
}
