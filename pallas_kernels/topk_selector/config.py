"""Block sizes of the token selection's implementations."""

import dataclasses

from pallas_kernels.lightning_indexer import config as indexer_config

# Bytes of the scores of a chunk of queries, where kernels score and select.
# Large enough to fill a GPU whatever the number of keys.
_CHUNK_BYTES = 1 << 28
# A chunk is a multiple of this many queries, so that it splits into tiles.
_CHUNK_MULTIPLE = 64


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class XlaConfig:
  """Sizes of the chunked implementation.

  Attributes:
    query_block: queries selected together.
    key_windows: how many widths of the key window are compiled.
  """

  query_block: int
  key_windows: int


def xla_config(*, batch: int, num_queries: int, num_keys: int) -> XlaConfig:
  """The block of scores is the indexer's: made and selected in one go."""
  sizes = indexer_config.xla_config(
    batch=batch, num_queries=num_queries, num_keys=num_keys
  )
  return XlaConfig(query_block=sizes.query_block, key_windows=sizes.key_windows)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TritonConfig:
  """Sizes of the Triton kernel.

  Attributes:
    tile: scores of a row looked at together; a power of two.
    capacity: keys that a row keeps; a power of two, at least k + tile.
    num_warps: warps of a program.
    programs_per_multiprocessor: programs that run at once on one.
  """

  tile: int
  capacity: int
  num_warps: int
  programs_per_multiprocessor: int


def triton_config(
  *, num_rows: int, k: int, num_multiprocessors: int
) -> TritonConfig:
  """Sizes for a shape; from measurements on an H100."""
  tile, num_warps, programs = 2048, 4, 4
  if num_rows <= num_multiprocessors or k > 2048:
    tile, num_warps, programs = 4096, 8, 2
  return TritonConfig(
    tile=tile,
    capacity=2 * tile,
    num_warps=num_warps,
    programs_per_multiprocessor=programs,
  )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MosaicConfig:
  """Sizes of the Mosaic GPU kernel.

  Attributes:
    tile: scores of a row looked at together.
    stages: tiles on their way from memory.
    capacity: keys that a row keeps; at least k + tile.
    warpgroups: of 128 threads, that share a row.
    blocks_per_multiprocessor: rows that are worked on at once on one.
  """

  tile: int
  stages: int
  capacity: int
  warpgroups: int
  blocks_per_multiprocessor: int


def mosaic_config(
  *,
  num_rows: int,
  num_keys: int,
  k: int,
  num_multiprocessors: int,
  interprets: bool = False,
) -> MosaicConfig:
  """Sizes for a shape; from measurements on an H100."""
  if interprets:
    return MosaicConfig(
      tile=128,
      stages=2,
      capacity=k + 256,
      warpgroups=1,
      blocks_per_multiprocessor=1,
    )
  if num_rows <= num_multiprocessors and num_keys <= 2**18:
    # Decode: a row has a multiprocessor to itself.
    return MosaicConfig(
      tile=4096,
      stages=6,
      capacity=max(8192, k + 4096),
      warpgroups=8,
      blocks_per_multiprocessor=1,
    )
  # Two rows hide each other's waits, as long as 512 threads with 64 registers
  # and half of the shared memory are enough for one.
  return MosaicConfig(
    tile=2048,
    stages=4,
    capacity=max(6144, k + 2048),
    warpgroups=4,
    blocks_per_multiprocessor=2,
  )


def chunk_queries(*, batch: int, num_queries: int, num_keys: int) -> int:
  """Queries scored and selected together by the kernels."""
  fit = _CHUNK_BYTES // max(1, 4 * batch * num_keys)
  if fit >= _CHUNK_MULTIPLE:
    fit -= fit % _CHUNK_MULTIPLE
  return max(1, min(fit, num_queries))
