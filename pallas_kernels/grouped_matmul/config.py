"""Block sizes of the grouped matrix product."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
  """How the rows of a group are cut.

  Attributes:
    block_rows: rows of a block; a block belongs to one expert, so on average
      half a block an expert is computed for nothing.
  """

  block_rows: int


def loop_config(num_rows: int, num_experts: int) -> Config:
  """Blocks for `xla_loop`, the choice on CPU.

  Measured on two cores at D=128, F=64, E=8, float32: 32 rows are best at
  M=512, 64 at M=2048, 64 and 128 equal from M=8192 on, where 32 loses a third
  to the overhead of a step and 256 and more lose to rows outside the group.
  """
  return Config(block_rows=_quarter_group(num_rows, num_experts, 32, 128))


def batched_config(num_rows: int, num_experts: int) -> Config:
  """Blocks for `xla_batched`, the choice on accelerators.

  A quarter of the mean group bounds both costs of that formulation: at most
  about M / 8 rows computed for nothing, and about five copies of the weights
  gathered. On an H100 it is the best block, up to the noise of the
  measurement, forward and backward, at every shape of
  `arg_specs.BENCHMARK_SPECS`; the loop takes 4 to 40 times as long there.
  """
  return Config(block_rows=_quarter_group(num_rows, num_experts, 64, 1024))


def _quarter_group(
  num_rows: int, num_experts: int, smallest: int, largest: int
) -> int:
  """Power of two at most a quarter of the mean group, within limits."""
  quarter = max(num_rows // (4 * num_experts), 1)
  block = 1 << (quarter.bit_length() - 1)
  return min(max(block, smallest), largest, num_rows)
