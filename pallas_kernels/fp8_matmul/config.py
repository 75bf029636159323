"""Tile sizes of the float8 matrix product's kernel."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MosaicConfig:
  """How the work is cut.

  Attributes:
    columns: outputs of a warpgroup's tile.
    splits_columns: the two multiplying warpgroups share 64 rows and have
      outputs of their own; otherwise they share outputs and have 64 rows each.
    stages: groups of the contraction in flight.
    pairs: start two products before the first is added up. With 128 columns
      that is slower than one after the other (docs/kernels.md).
  """

  columns: int
  splits_columns: bool
  stages: int
  pairs: bool


def mosaic_config(*, num_rows: int, num_outputs: int) -> MosaicConfig | None:
  """Sizes for a shape; None where no tile divides the outputs."""
  splits_columns = num_rows <= 64
  shared = 2 if splits_columns else 1
  # A few rows (decode) read the weights once: many small tiles keep every
  # multiprocessor reading.
  widths = (32,) if splits_columns else (128, 64)
  for columns in widths:
    if num_outputs % (shared * columns) == 0:
      stages = 8 if columns < 128 else 5
      return MosaicConfig(
        columns=columns,
        splits_columns=splits_columns,
        stages=stages,
        pairs=splits_columns,
      )
  return None
