"""Which formulation `xla` takes, and block sizes of both backends."""

import dataclasses

from pallas_kernels import mosaic
from pallas_kernels.indexer_kl import (
  mosaic_rows,
  mosaic_streams,
  mosaic_target,
  mosaic_target_heads,
)
from pallas_kernels.sparse_mla_attention import config as attention_config


def xla_config(
  *,
  batch: int,
  num_queries: int,
  num_keys: int,
  num_heads: int,
  width: int,
  topk: int | None,
  platform: str | None = None,
) -> attention_config.XlaConfig:
  """Formulation and blocks for one call.

  The same two formulations as sparse attention's, of the same cost by pair,
  hence the same crossover. Without a selection it is the mask form, its mask
  the range of valid keys.

  Args:
    batch: B.
    num_queries: T.
    num_keys: S.
    num_heads: the larger of H and J.
    width: floats read of a selected row, G * X + I.
    topk: K, None without a selection.
    platform: 'cpu', 'gpu', ...; the default backend's when None.
  """
  return attention_config.xla_config(
    batch=batch,
    num_queries=num_queries,
    num_keys=num_keys,
    num_heads=num_heads,
    width=width,
    topk=topk or num_keys,
    form='mask' if topk is None else None,
    platform=platform,
  )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MosaicConfig:
  """Pipelines of the Hopper kernels.

  Attributes:
    target: of the head-summed target over one key head.
    heads_stages: heads under way where each has its own keys.
    scores: of the index scores.
    gradients: of the indexer's gradients.
    block_elements: scores of a block of queries without a selection, queries
      times keys: bounds memory.
    selected_elements: with one, queries times selected keys.
  """

  target: mosaic_target.Blocks
  heads_stages: int
  scores: mosaic_streams.Blocks
  gradients: mosaic_streams.Blocks
  block_elements: int = 2**26
  selected_elements: int = 2**28


# Shared memory that the pipelines leave to barriers and the compiler.
_RESERVED_BYTES = 4096


def mosaic_config(*, num_heads: int, width: int) -> MosaicConfig:
  """Pipelines that fit into shared memory.

  Args:
    num_heads: H, padded.
    width: X, padded.

  Returns:
    With `target.stages` or `heads_stages` 0 where nothing fits.
  """
  free = mosaic.SHARED_MEMORY_BYTES - _RESERVED_BYTES
  tile = 2 * mosaic_rows.TILE * width
  stages = (free - 2 * num_heads * width) // tile
  chunks = width // mosaic_rows.CHUNK
  # A barrier array has 32, and two tiles' chunks have their own.
  stages = min(stages, 4 if 4 * chunks <= 32 else 2 if 2 * chunks <= 32 else 0)
  stages = {0: 0, 1: 1, 2: 2, 3: 2, 4: 4}[max(stages, 0)]
  heads_stages = min(free // (4 * mosaic_target_heads.TILE * width), 4)
  return MosaicConfig(
    target=mosaic_target.Blocks(stages=stages, lag=5),
    heads_stages=heads_stages,
    scores=mosaic_streams.Blocks(stages=4, lag=3),
    gradients=mosaic_streams.Blocks(stages=4, lag=3),
  )
