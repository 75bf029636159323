"""The operations of DeepSeek-V3.2's sparse attention and expert layers.

Each op is one function with `implementation=`; see README.md for the contract.
"""

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.indexer_kl import IndexerKL, indexer_kl
from pallas_kernels.lightning_indexer import (
  lightning_indexer,
  quantize_index_keys,
)
from pallas_kernels.sparse_mla_attention import (
  SparseAttentionOutput,
  dense_mla_decode,
  pack_fp8_cache,
  physical_indices,
  sparse_mla_attention,
  sparse_mla_attention_fp8_cache,
  unpack_fp8_cache,
)
from pallas_kernels.topk_selector import (
  Selection,
  indexed_topk,
  indices_to_mask,
  select_topk,
  selection_mask,
)

__all__ = [
  'IndexerKL',
  'Selection',
  'SparseAttentionOutput',
  'dense_mla_decode',
  'grouped_matmul',
  'indexed_topk',
  'indexer_kl',
  'indices_to_mask',
  'lightning_indexer',
  'pack_fp8_cache',
  'physical_indices',
  'quantize_index_keys',
  'select_topk',
  'selection_mask',
  'sparse_mla_attention',
  'sparse_mla_attention_fp8_cache',
  'unpack_fp8_cache',
]
