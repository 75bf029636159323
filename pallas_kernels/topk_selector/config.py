"""Block sizes of the token selection's implementations."""

import dataclasses

from pallas_kernels.lightning_indexer import config as indexer_config


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
