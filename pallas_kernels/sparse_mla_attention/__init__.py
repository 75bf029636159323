"""Absorbed (MQA mode) attention over the selected latent rows."""

from pallas_kernels.sparse_mla_attention.api import (
  SparseAttentionOutput as SparseAttentionOutput,
)
from pallas_kernels.sparse_mla_attention.api import (
  sparse_mla_attention as sparse_mla_attention,
)
from pallas_kernels.sparse_mla_attention.api import (
  sparse_mla_attention_fp8_cache as sparse_mla_attention_fp8_cache,
)
from pallas_kernels.sparse_mla_attention.dense import (
  dense_mla_decode as dense_mla_decode,
)
from pallas_kernels.sparse_mla_attention.fp8_cache import (
  pack_fp8_cache as pack_fp8_cache,
)
from pallas_kernels.sparse_mla_attention.fp8_cache import (
  unpack_fp8_cache as unpack_fp8_cache,
)
from pallas_kernels.sparse_mla_attention.pages import (
  physical_indices as physical_indices,
)
