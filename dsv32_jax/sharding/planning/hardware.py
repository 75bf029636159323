"""What an H100 cluster does a second: every constant, with its source.

Rates of kernels are those of docs/kernels.md (one H100 80GB HBM3, SXM, capped
at 700 W), links those of NVIDIA's documents and of what NCCL's maintainers say
that it reaches. Latencies are not in here, nor traffic of other jobs.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

# NVIDIA H100 Tensor Core GPU data sheet, SXM: 1,979 TFLOP/s with sparsity.
PEAK_BF16 = 989.4e12
# Data sheet: "80 GB". nvidia-smi shows 81,559 MiB = 85.5e9 bytes; what is
# beyond 80e9 is left to the CUDA context, NCCL's buffers and fragmentation.
MEMORY_BYTES = 80e9
# docs/kernels.md: a device copy moves 2.9 to 3.0 TB/s (data sheet: 3.35).
HBM = 2.9e12
# DGX H100: eight GPUs and eight 400 Gb/s ConnectX-7 a node, one for each GPU.
GPUS_A_NODE = 8
# NVLink 4: 450 GB/s a direction; NCCL reaches 360 (github.com/NVIDIA/nccl-tests
# issues 326 and 212).
NVLINK = 360e9
# 400 Gb/s are 50 GB/s; NCCL reaches 48 to 49 a card (nccl-tests issue 267,
# which also says that an all-to-all cannot use another GPU's card).
INFINIBAND = 48e9

# FLOP/s, counting the products of the definition, from docs/kernels.md.
RATES: Mapping[str, float] = {
  # A bf16 product of 8192^3 under the power cap: 695 to 725.
  'matmul': 700e12,
  # grouped_matmul, E 64, 512 rows an expert, spread: 584, 556, 541.
  'grouped_matmul': 560e12,
  # sparse_mla_attention, 128 heads, k 2048: 4.44 ms for 4096 queries at 128K
  # keys; backward 26.5 ms at 32K keys (bound by additions to memory).
  'sparse_forward': 526e12,
  'sparse_backward': 223e12,
  # dense_attention 192/128, causal 4096: 1.21 and 4.35 ms.
  'dense_forward': 569e12,
  'dense_backward': 569e12,
  # lightning_indexer, bf16, 128K keys.
  'indexer': 658e12,
  # indexer_kl, 4096 queries, with gradients: selected keys 3.97 ms; all keys
  # 3.66 ms from latents, and from a key a head the sum of its kernels (0.83 +
  # 2 x 0.27 + 1.57 ms).
  'kl_selected': 416e12,
  'kl_latent': 451e12,
  'kl_heads': 280e12,
}
# Bytes a second of work that memory bounds; select_topk reads every score once,
# [4096, 128K] at random in 1.27 ms.
BYTE_RATES: Mapping[str, float] = {'memory': HBM, 'topk': 1.7e12}


@dataclasses.dataclass(frozen=True)
class Group:
  """Devices that take part in one collective.

  Attributes:
    size: how many.
    in_node: how many of them share a node (and NVLink).
  """

  size: int
  in_node: int

  @property
  def link(self) -> str:
    """The link that bounds it, or 'NVLink + InfiniBand' where it spans both."""
    if self.in_node == self.size:
      return 'NVLink'
    return 'InfiniBand' if self.in_node == 1 else 'NVLink + InfiniBand'


def group(sizes: Mapping[str, int], names: Iterable[str]) -> Group:
  """The group along some mesh axes.

  Devices are numbered with the last axis fastest, eight to a node.

  Args:
    sizes: all mesh axes in order, outermost first.
    names: the axes that the collective runs over.
  """
  names = set(names)
  stride, size, in_node = 1, 1, 1
  for name in reversed(tuple(sizes)):
    if name in names:
      size *= sizes[name]
      if stride < GPUS_A_NODE:
        in_node *= min(sizes[name], max(GPUS_A_NODE // stride, 1))
    stride *= sizes[name]
  return Group(size, in_node)


def seconds(kind: str, size: float | int, where: Group) -> float:
  """Time of one collective by itself: its slower link.

  Args:
    kind: HLO's name.
    size: bytes of the larger side on one device: an all-gather's result, a
      reduce-scatter's operand, all that a device sends in an all-to-all, its
      own share included.
    where: who takes part.
  """
  n, m = where.size, where.in_node
  if n == 1:
    return 0.0
  if kind == 'all-to-all':
    return size * max((m - 1) / n / NVLINK, (n - m) / n / INFINIBAND)
  if kind == 'collective-permute':
    return size / (NVLINK if n == m else INFINIBAND)
  # A node's cards share what comes from outside; NVLink spreads it.
  outside = (n - m) / n / m
  inside = (n - 1) / n - outside
  once = size * max(outside / INFINIBAND, inside / NVLINK)
  return 2 * once if kind == 'all-reduce' else once


def node_count(num_gpus: int) -> int:
  """Nodes of so many GPUs."""
  return math.ceil(num_gpus / GPUS_A_NODE)
