"""Block sizes of the lightning indexer's implementations."""

import dataclasses

import jax

# Elements of one [B, block, S] block of scores. 1 MiB of float32: it is read
# and written once a head, and once a step of the selection, so it should stay
# in the second-level cache of a CPU core.
_BLOCK_ELEMENTS = 1 << 18
# Elements of the keys that are dequantised or gathered together: 1 MiB of
# float32 on a CPU, 256 MiB on an accelerator.
_CPU_KEY_ELEMENTS = 1 << 18
_ACCELERATOR_KEY_ELEMENTS = 1 << 26
_SMALLEST_KEY_CHUNK = 256


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class XlaConfig:
  """Sizes of the chunked implementation.

  Attributes:
    query_block: queries scored together.
    key_windows: how many widths of the key window are compiled; the smallest
      that covers a query block's valid keys runs.
  """

  query_block: int
  key_windows: int


def xla_config(*, batch: int, num_queries: int, num_keys: int) -> XlaConfig:
  """Block sizes for a shape: a block of scores fits a core's cache."""
  block = 16
  while block < 512 and batch * 2 * block * num_keys <= _BLOCK_ELEMENTS:
    block *= 2
  # Few windows where scoring everything is cheap: each costs compile time.
  windows = 1 if num_keys <= 256 else 2 if num_keys < 1024 else 4
  return XlaConfig(query_block=min(block, num_queries), key_windows=windows)


def key_chunk(*, batch: int, dim: int) -> int:
  """Keys of a row that are made from their stored form at a time."""
  on_cpu = jax.default_backend() == 'cpu'
  elements = _CPU_KEY_ELEMENTS if on_cpu else _ACCELERATOR_KEY_ELEMENTS
  fit = elements // (batch * dim)
  return max(1 << max(fit.bit_length() - 1, 0), _SMALLEST_KEY_CHUNK)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MosaicConfig:
  """Sizes of the Hopper forward kernel.

  Attributes:
    groups: warpgroups that compute.
    slabs: products of 128 rows (heads of queries) that each of them owns; a
      block is 128 groups slabs rows.
    stages: tiles of 64 keys in flight.
    unroll: tiles between which the products of a warpgroup overlap.
    blocks_per_multiprocessor: blocks of threads that run at once on one; more
      than one with one computing warpgroup only.
  """

  groups: int
  slabs: int
  stages: int
  unroll: int = 1
  blocks_per_multiprocessor: int = 1


def mosaic_config(
  *, num_queries: int, heads: int, row_bytes: int
) -> MosaicConfig:
  """Sizes for a shape."""
  stages = 5 if row_bytes > 128 else 8
  # A few queries (decode) leave most rows of a large block empty.
  if num_queries * heads <= 128:
    return MosaicConfig(
      groups=1, slabs=1, stages=stages, blocks_per_multiprocessor=2
    )
  if num_queries * heads <= 256:
    return MosaicConfig(groups=2, slabs=1, stages=stages)
  return MosaicConfig(groups=4, slabs=1, stages=stages)
