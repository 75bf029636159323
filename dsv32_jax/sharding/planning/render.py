"""Plans as text for people and as rows for files."""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from dsv32_jax.sharding import axes
from dsv32_jax.sharding.planning import activations, hardware, weights
from dsv32_jax.sharding.planning.plan import Memory, Plan
from dsv32_jax.sharding.planning.request import STAGES, Request
from dsv32_jax.sharding.rules import MESH_AXES

_GB = 1e9


def text(plan: Plan) -> str:
  """The whole plan of one layout."""
  parts = (
    _layout(plan),
    _memory(plan.memory),
    _work(plan),
    _messages(plan),
    _time(plan),
  )
  return '\n\n'.join('\n'.join(part) for part in parts)


def mesh_text(request: Request) -> str:
  """`fsdp=2,expert=16,context=8`."""
  return ','.join(
    f'{name}={request.sizes[name]}'
    for name in MESH_AXES
    if request.sizes[name] > 1
  )


def _layout(plan: Plan) -> list[str]:
  request, counts = plan.request, plan.counts
  data, stage = request.stage.data, request.stage
  cfg = request.model
  moments = stage.optimizer.moment_dtype
  return [
    f'{request.num_devices} H100s: {mesh_text(request)}, rules {request.rules}',
    f'{stage.kind}: {data.batch_size} rows x {data.seq_len:,} tokens a step, '
    f'{stage.micro_batches} micro-batches',
    f'{request.rows} row(s) x {request.row_tokens:,} tokens a device and '
    'micro-batch',
    f'parameters: {counts["main"]:,} main model, {counts["mtp"]:,} MTP module, '
    f'{counts["all"]:,} in all',
    f'types: parameters and gradients {cfg.precision.param}, moments '
    f'{moments}, products {cfg.precision.compute}; remat {cfg.remat}, '
    f'query_chunk {cfg.query_chunk}',
  ]


def _memory(memory: Memory) -> list[str]:
  held = memory.activations
  rows = [
    ('parameters', memory.parameters, 'exact'),
    ('optimizer state', memory.optimizer, 'exact'),
    ('gradients', memory.gradients, 'sum and newest, if accumulated'),
    ('batch', memory.batch, 'exact'),
    ('kept by the layers', held.saved, f'{_mb(held.saved_a_layer)} a layer'),
    (f'work: {held.fullest}', held.work[held.fullest], 'estimate'),
    ('together', memory.total, f'of {hardware.MEMORY_BYTES / _GB:.0f} GB: '
     + ('fits' if memory.fits else 'DOES NOT FIT')),
  ]  # fmt: skip
  others = ', '.join(
    f'{name} {size / _GB:.1f}'
    for name, size in held.work.items()
    if name != held.fullest
  )
  return [
    'memory of one device (GB):',
    *_table([(name, f'{size / _GB:8.2f}', note) for name, size, note in rows]),
    f'  work of the other phases, not at the same time: {others}',
  ]


def lengths(
  request: Request,
  state: weights.State,
  *,
  seq_lens: Sequence[int] = (4096, 32_768, 131_072),
  remats: Sequence[str] = ('full', 'save_attention', 'none'),
) -> list[str]:
  """Activations by length, remat policy and query_chunk, a table.

  Args:
    request: the layout; its rows stay, their length changes.
    state: from `weights.build`.
    seq_lens: tokens a row; those that the mesh cannot cut are left out.
    remats: policies, each with the request's query_chunk and without.
  """
  rows = [('tokens', 'remat', 'chunk', 'a layer', 'kept', 'work', 'sum')]
  shards = 2 * request.parallel.shards(axes.SEQUENCE)
  chunks = sorted({0, request.model.query_chunk})
  for length in seq_lens:
    for remat, chunk in itertools.product(remats, chunks):
      if length % shards:
        continue
      changes: dict[str, Any] = {'remat': remat, 'query_chunk': chunk}
      other = dataclasses.replace(
        request,
        model=dataclasses.replace(request.model, **changes),
        stage=dataclasses.replace(
          request.stage,
          data=dataclasses.replace(request.stage.data, seq_len=length),
        ),
      )
      held = activations.estimate(other, state.weights)
      rows.append(
        (
          f'{length:,}',
          remat,
          str(chunk),
          _mb(held.saved_a_layer),
          f'{held.saved / _GB:.2f}',
          f'{held.work[held.fullest] / _GB:.2f} {held.fullest}',
          f'{held.total / _GB:.2f}',
        )
      )
  return [
    f'activations of {request.rows} row(s) a device and micro-batch (GB; work '
    'is an estimate):',
    *_table(rows),
  ]


def _work(plan: Plan) -> list[str]:
  rows = [
    (
      part.part,
      f'{part.amount / 1e12:12,.1f} '
      + ('TFLOP' if part.rate in hardware.RATES else 'TB'),
      f'{part.seconds:8.2f} s',
      part.rate,
    )
    for part in plan.work
  ]
  return ['work of one device a step, at measured rates:', *_table(rows)]


def _messages(plan: Plan) -> list[str]:
  sums: dict[tuple, list[float]] = collections.defaultdict(lambda: [0, 0, 0.0])
  for message in plan.messages:
    planned = message.planned
    key = (
      planned.subject,
      planned.kind,
      ' x '.join(planned.axes),
      message.where.link,
      'hidden' if planned.hides else 'waited for',
    )
    sums[key][0] += planned.count
    sums[key][1] += planned.total
    sums[key][2] += message.seconds
  rows = [
    (*key[:4], f'{count:,} x', f'{size / _GB:10,.1f} GB', f'{s:7.2f} s', key[4])
    for key, (count, size, s) in sums.items()
  ]
  return [
    'collectives of one device a step (bytes of the larger side):',
    *(_table(rows) or ['  none']),
  ]


def _time(plan: Plan) -> list[str]:
  rate = plan.step_tokens / plan.step_seconds / plan.request.num_devices
  return [
    f'a step: {plan.compute_seconds:.1f} s of work beside '
    f'{plan.hidden_seconds:.1f} s of collectives, then '
    f'{plan.exposed_seconds:.1f} s of collectives that work waits for: '
    f'{plan.step_seconds:.1f} s (estimate); {plan.serial_seconds:.1f} s if '
    'nothing ran beside the work',
    f'{rate:,.0f} tokens a second and GPU, {plan.tokens_a_day / 1e9:.2f} '
    f'billion a day; model FLOPs {100 * plan.model_flops_share:.1f} % of the '
    'peak',
  ]


def recipe(plans: Iterable[Plan]) -> list[str]:
  """GPU-hours of the paper's two stages."""
  rows = [('stage', 'mesh', 'remat', 'tokens', 'steps', 'GPU-hours', 'days')]
  total = 0.0
  for plan in plans:
    request, hours = plan.request, plan.stage_hours
    if hours is None:
      continue
    tokens = STAGES[request.stage.kind].tokens
    total += hours
    rows.append(
      (
        request.stage.kind,
        f'{mesh_text(request)} x {request.stage.micro_batches}',
        request.model.remat,
        f'{tokens / 1e9:,.1f} B',
        f'{tokens / plan.step_tokens:,.0f}',
        f'{hours:,.0f}',
        f'{hours / request.num_devices / 24:,.1f}',
      )
    )
  rows.append(('both', '', '', '', '', f'{total:,.0f}', ''))
  return ['the recipe (estimates; mesh x micro-batches):', *_table(rows)]


def found(plans: Sequence[Plan]) -> list[str]:
  """Plans of a search, a table."""
  rows = [
    (
      *('GPUs', 'mesh', 'rules', 'micro', 'remat', 'GB'),
      *('step s', 'work', 'hidden', 'waited', 'serial'),
      *('tok/s/GPU', 'B tok/day'),
    ),
  ]
  for plan in plans:
    row = record(plan)
    rows.append(
      (
        str(row['gpus']),
        row['mesh'],
        row['rules'],
        str(row['micro_batches']),
        row['remat'],
        f'{row["memory_gb"]["total"]:.1f}' + ('' if row['fits'] else ' (!)'),
        f'{row["step_s"]:.1f}',
        f'{row["work_s"]:.1f}',
        f'{row["hidden_s"]:.1f}',
        f'{row["exposed_s"]:.1f}',
        f'{row["serial_s"]:.1f}',
        f'{row["tokens_s_gpu"]:.0f}',
        f'{row["tokens_a_day"] / 1e9:.2f}',
      )
    )
  return _table(rows)


def record(plan: Plan) -> dict[str, Any]:
  """A plan as a row of a JSONL file."""
  request, memory = plan.request, plan.memory
  held = memory.activations
  return {
    'gpus': request.num_devices,
    'mesh': mesh_text(request),
    'rules': request.rules,
    'stage': request.stage.kind,
    'length': request.stage.data.seq_len,
    'batch_size': request.stage.data.batch_size,
    'micro_batches': request.stage.micro_batches,
    'remat': request.model.remat,
    'query_chunk': request.model.query_chunk,
    'param_dtype': request.model.precision.param,
    'moment_dtype': request.stage.optimizer.moment_dtype,
    'fits': memory.fits,
    'memory_gb': {
      'parameters': memory.parameters / _GB,
      'optimizer': memory.optimizer / _GB,
      'gradients': memory.gradients / _GB,
      'batch': memory.batch / _GB,
      'saved': held.saved / _GB,
      'work': held.work[held.fullest] / _GB,
      'total': memory.total / _GB,
    },
    'fullest_phase': held.fullest,
    'work_s': plan.compute_seconds,
    'hidden_s': plan.hidden_seconds,
    'exposed_s': plan.exposed_seconds,
    'step_s': plan.step_seconds,
    'serial_s': plan.serial_seconds,
    'tokens_s_gpu': plan.step_tokens / plan.step_seconds / request.num_devices,
    'tokens_a_day': plan.tokens_a_day,
    'model_flops_share': plan.model_flops_share,
    'stage_gpu_hours': plan.stage_hours,
    'work': {part.part: part.seconds for part in plan.work},
    'collectives': _by_subject(plan),
  }


def _by_subject(plan: Plan) -> dict[str, dict[str, Any]]:
  sums: dict[str, dict[str, Any]] = {}
  for message in plan.messages:
    row = sums.setdefault(message.planned.subject, {'bytes': 0, 'seconds': 0.0})
    row['bytes'] += message.planned.total
    row['seconds'] += message.seconds
  return sums


def _mb(size: float | int) -> str:
  return f'{size / 1e6:,.0f} MB'


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
  """Columns of one width, two spaces apart."""
  if not rows:
    return []
  widths = [
    max(len(cell) for cell in column) for column in zip(*rows, strict=True)
  ]
  return [
    '  '
    + '  '.join(
      cell.ljust(width) for cell, width in zip(row, widths, strict=True)
    ).rstrip()
    for row in rows
  ]
