"""Which formulation `xla` takes, and its block sizes."""

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
