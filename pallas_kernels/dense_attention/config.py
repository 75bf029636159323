"""Tile sizes of the dense attention kernels."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ForwardConfig:
  """Forward: 64 queries for each of two warpgroups.

  Attributes:
    block_keys: keys of a block.
    stages: blocks of keys and values in shared memory.
    l2_bytes: keys and values of the heads that run at a time.
  """

  block_keys: int = 128
  stages: int = 2
  l2_bytes: int = 24 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BackwardConfig:
  """Backward: 64 rows for each of two warpgroups, blocks of the other side.

  Attributes:
    block: keys (dq) or queries (dk, dv) of a block.
    stages: blocks in shared memory.
    l2_bytes: as in `ForwardConfig`.
  """

  block: int = 64
  stages: int = 3
  l2_bytes: int = 24 * 2**20
