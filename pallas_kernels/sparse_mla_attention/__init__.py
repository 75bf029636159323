"""Absorbed (MQA mode) attention over the selected latent rows."""

from pallas_kernels.sparse_mla_attention.api import (
  SparseAttentionOutput as SparseAttentionOutput,
)
from pallas_kernels.sparse_mla_attention.api import (
  sparse_mla_attention as sparse_mla_attention,
)
