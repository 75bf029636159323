"""Every op that the benchmark can measure, by name."""

from collections.abc import Callable
from typing import Any

from pallas_kernels.benchmarks import (
  attention_ops,
  grouped_ops,
  indexer_kl_ops,
  indexer_ops,
  indexer_part_ops,
)
from pallas_kernels.benchmarks.op import Op


def ops(dense_attention_xla: Callable[..., Any] | None = None) -> dict[str, Op]:
  """Every op by name.

  Args:
    dense_attention_xla: (q, k, v, *, scale) -> (out, lse), which lives above
      this package; without it dense attention has the kernels only.
  """
  return {
    op.name: op
    for op in (
      indexer_ops.lightning_indexer(),
      indexer_ops.lightning_indexer_fp8(),
      indexer_ops.select_topk(),
      indexer_ops.indexed_topk(),
      attention_ops.sparse_mla_attention(),
      attention_ops.sparse_mla_attention_fp8(),
      indexer_kl_ops.indexer_kl(is_selected=False),
      indexer_kl_ops.indexer_kl(is_selected=True),
      indexer_part_ops.indexer_target_all(),
      indexer_part_ops.indexer_target_selected(),
      indexer_part_ops.indexer_gradients(),
      grouped_ops.grouped_matmul(),
      attention_ops.dense_attention(dense_attention_xla),
    )
  }
