"""The rows that decide whether the kernels are fast enough, with their bars.

DeepSeek-V3.2's shapes on one H100: 128 heads of (512, 64), 2048 selected keys,
an indexer of 64 heads of 128, 4096 queries. A bar is a ratio to the rival's
time in the same run.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from pallas_kernels.benchmarks.costs import BACKWARD, FORWARD, GRADIENTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One comparison.

  Attributes:
    name: to ask for it.
    title: as the table shows it.
    op: name in `cases.ops`.
    shape: name in the op's specs.
    direction: what is timed.
    implementations: ours.
    rival: whose time it is compared with.
    must: largest ratio that will do; None where there is no bar.
    aim: the one to reach.
    calls: of ours in one timed program; more than 1 where a call is as short
      as its launch. The rival's adapters do likewise.
  """

  name: str
  title: str
  op: str
  shape: str
  direction: str = FORWARD
  implementations: Sequence[str] = ('mosaic_gpu',)
  rival: str
  must: float | None = None
  aim: float | None = None
  calls: int = 1


def _pairs(
  name: str, title: str, shapes: dict[str, str], **common: Any
) -> list[Row]:
  return [
    Row(name=f'{name}_{size}', title=f'{title}, {size}', shape=shape, **common)
    for size, shape in shapes.items()
  ]


ROWS = (
  *_pairs(
    'sparse_forward', 'sparse MLA forward',
    {'32k': 'v32_32k', '128k': 'v32_128k'},
    op='sparse_mla_attention', rival='flash_mla', must=1.50, aim=0.90,
  ),
  *_pairs(
    'sparse_backward', 'sparse MLA backward',
    {'4k': 'v32_4k', '32k': 'v32_32k'},
    op='sparse_mla_attention', direction=BACKWARD,
    rival='cudnn_dsa', must=2.00, aim=0.90,
  ),
  Row(
    name='target_selected_32k',
    title='stage-2 target with KL and gradient, 32k',
    op='indexer_target_selected', shape='v32_selected_32k',
    rival='cudnn_dsa', must=1.50, aim=0.80,
  ),
  Row(
    name='target_all_4k', title='stage-1 target, causal 4096',
    op='indexer_target_all', shape='v32_4k',
    rival='cudnn_dsa', must=1.50, aim=0.90,
  ),
  *_pairs(
    'indexer_bf16', 'indexer scores bf16',
    {'32k': 'v32_prefill_32k', '128k': 'v32_prefill_128k'},
    op='lightning_indexer', rival='cudnn_dsa', must=1.10, aim=0.80,
  ),
  *_pairs(
    'indexer_fp8', 'indexer scores fp8',
    {'32k': 'v32_prefill_32k', '128k': 'v32_prefill_128k'},
    op='lightning_indexer_fp8', rival='deep_gemm', must=1.50, aim=0.85,
  ),
  Row(
    name='indexer_backward_32k', title='indexer backward, selected keys, 32k',
    op='indexer_gradients', shape='v32_selected_32k',
    rival='cudnn_dsa', must=1.50, aim=0.90,
  ),
  *_pairs(
    'topk', 'top-k 2048',
    {'4096x32k': 'rows_4096_32k', '4096x128k': 'rows_4096_128k'},
    op='select_topk', implementations=('mosaic_gpu', 'triton'),
    rival='torch', must=0.60, aim=0.33,
  ),
  *_pairs(
    'topk', 'top-k 2048', {'128x128k': 'rows_128_128k'},
    op='select_topk', implementations=('mosaic_gpu', 'triton'),
    rival='torch', must=0.60, aim=0.33, calls=10,
  ),
  # The rival reads its 8-bit cache in both: it has no kernel for bfloat16.
  Row(
    name='decode_bf16', title='decode, batch 128, bf16 cache',
    op='sparse_mla_attention', shape='v32_decode_32k',
    rival='flash_mla', must=1.50, aim=0.75, calls=10,
  ),
  Row(
    name='decode_fp8', title='decode, batch 128, fp8 cache',
    op='sparse_mla_attention_fp8', shape='v32_decode_32k',
    rival='flash_mla', must=2.00, aim=1.00, calls=10,
  ),
  Row(
    name='grouped_forward', title='grouped matmul forward, equal groups',
    op='grouped_matmul', shape='v32_e64_32k_equal',
    rival='deep_gemm', must=1.60, aim=1.05,
  ),
  Row(
    name='grouped_forward_spread',
    title='grouped matmul forward, spread groups',
    op='grouped_matmul', shape='v32_e64_32k', rival='tokamax',
  ),
  Row(
    name='grouped_gradients',
    title='grouped matmul forward and backward, spread groups',
    op='grouped_matmul', shape='v32_e64_32k', direction=GRADIENTS,
    rival='tokamax', must=0.80, aim=0.45,
  ),
)  # fmt: skip

HEADER = (
  'work', 'ours, ms', 'rival, ms', 'ours / rival', 'must', 'aim', 'of ceiling',
  'error',
)  # fmt: skip


def add_ratios(records: Sequence[dict], row: Row) -> None:
  """Names the row in its records, and relates ours to the rival's."""
  rival = next((r for r in records if r.get('is_rival')), {})
  for record in records:
    record |= {
      'row': row.name,
      'title': row.title,
      'must': row.must,
      'aim': row.aim,
    }
    if record.get('is_rival'):
      continue
    record['rival'] = row.rival
    if 'ms' not in rival:
      record['no_rival'] = rival.get('unavailable', 'not asked for')
      continue
    record['rival_ms'] = rival['ms']
    if 'ms' in record:
      record['ratio'] = record['ms'] / rival['ms']


def line(record: dict) -> tuple[str, ...]:
  """The cells of a record of ours that `add_ratios` has seen."""
  title = record['title']
  if record['implementation'] != 'mosaic_gpu':
    title += f' ({record["implementation"]})'
  ours = f'{record["ms"]:.3f}' if 'ms' in record else record['unavailable']
  rival = record['rival']
  if 'rival_ms' in record:
    rival += f' {record["rival_ms"]:.3f}'
  else:
    rival += f': {record["no_rival"]}'
  ratio = record.get('ratio', math.nan)
  error = record.get('error')
  return (
    title,
    ours,
    rival,
    '' if math.isnan(ratio) else f'{ratio:.2f}{_verdict(record, ratio)}',
    *('' if x is None else f'{x:.2f}' for x in (record['must'], record['aim'])),
    f'{record["fraction"]:.2f}' if 'fraction' in record else '',
    '' if error is None else f'{error:.1e}',
  )


def _verdict(record: dict, ratio: float) -> str:
  if record['must'] is None:
    return ''
  if ratio > record['must']:
    return ' misses must'
  return ' reaches aim' if ratio <= record['aim'] else ' within must'


def render(records: Iterable[dict]) -> str:
  """A Markdown table of the records of ours that belong to rows."""
  lines = [HEADER, ('---',) * len(HEADER)]
  lines += [
    tuple(cell.replace('|', '/') for cell in line(record))
    for record in records
    if 'row' in record and not record.get('is_rival')
  ]
  return '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)
