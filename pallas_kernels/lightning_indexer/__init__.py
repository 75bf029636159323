"""Lightning indexer: I[t, s] = sum_j w[t, j] ReLU(q[t, j] . k[s])."""

from pallas_kernels.lightning_indexer.api import (
  IMPLEMENTATIONS,
  lightning_indexer,
)
from pallas_kernels.lightning_indexer.quantization import quantize_index_keys

__all__ = ['IMPLEMENTATIONS', 'lightning_indexer', 'quantize_index_keys']
