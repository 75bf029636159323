"""Fine-grained token selection: the k keys of highest index score."""

from pallas_kernels.topk_selector.api import (
  INDEXED_TOPK_IMPLEMENTATIONS,
  SELECT_TOPK_IMPLEMENTATIONS,
  indexed_topk,
  indices_to_mask,
  select_topk,
  selection_mask,
)
from pallas_kernels.topk_selector.selection import Selection

__all__ = [
  'INDEXED_TOPK_IMPLEMENTATIONS',
  'SELECT_TOPK_IMPLEMENTATIONS',
  'Selection',
  'indexed_topk',
  'indices_to_mask',
  'select_topk',
  'selection_mask',
]
