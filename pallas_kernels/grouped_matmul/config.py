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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MosaicConfig:
  """How the Hopper kernels cut their products.

  Attributes:
    block_columns: columns of a tile, 64 to 256.
    block_depth: how far a slice reaches along the contracted side.
    stages: slices in shared memory.
    store_columns: columns that leave in one copy.
    band: tiles of rows that are walked together, see `row_tiles`.
    is_persistent: whether a block of threads does many tiles.
    copy_registers: of a thread of the warpgroup that copies.
    multiply_registers: of a thread of the two that multiply.
  """

  block_columns: int
  block_depth: int = 64
  stages: int = 4
  store_columns: int = 64
  band: int = 8
  is_persistent: bool = True
  copy_registers: int = 40
  multiply_registers: int = 232


# Rows of an expert below which tiles come and go too fast for a fixed share
# of them a multiprocessor. Measured on an H100 at 7168 -> 2048, M=32768: with
# 512 rows an expert on average persistent blocks take 1.65 ms (forward) and
# 1.73 ms (dx) against 1.80 and 1.83 ms; with 128 rows 3.42 and 4.31 ms against
# 3.05 and 3.04 ms. Slices twice as deep lose 30 to 70 percent.
_FEW_ROWS = 256


def mosaic_rows_config(
  width: int, num_rows: int, num_experts: int
) -> MosaicConfig:
  """Tiles of y and dx: the widest that divides the columns."""
  return MosaicConfig(
    block_columns=_widest(width),
    is_persistent=num_rows >= _FEW_ROWS * num_experts,
  )


def mosaic_weights_config(
  width: int, num_rows: int, num_experts: int
) -> MosaicConfig:
  """Tiles of dw: the widest that divides the columns.

  With few rows an expert the time goes into storing dw, so that the memory of
  a stage is better spent on larger stores (3.11 ms against 3.59 at 128 rows an
  expert, 1.90 against 1.78 at 512).
  """
  if num_rows >= _FEW_ROWS * num_experts:
    return MosaicConfig(block_columns=_widest(width))
  return MosaicConfig(block_columns=_widest(width), stages=3, store_columns=128)


def _widest(width: int) -> int:
  return next(columns for columns in (256, 128, 64) if not width % columns)


def _quarter_group(
  num_rows: int, num_experts: int, smallest: int, largest: int
) -> int:
  """Power of two at most a quarter of the mean group, within limits."""
  quarter = max(num_rows // (4 * num_experts), 1)
  block = 1 << (quarter.bit_length() - 1)
  return min(max(block, smallest), largest, num_rows)
