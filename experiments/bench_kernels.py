r"""Times of every op x implementation x named shape, beside their rivals.

  python experiments/bench_kernels.py
  python experiments/bench_kernels.py --ops=grouped_matmul --shapes=v32_e64_32k
  python experiments/bench_kernels.py --rivals=none --jsonl=kernels.jsonl \
    --plot=kernels.png

Shapes are each op's `arg_specs.BENCHMARK_SPECS`; without --shapes, all that
the machine does in reasonable time. Implementations that can't run here are
listed with their reason. Takes turns, round after round, so that whatever
else the machine does meets all; a rival (torch.topk, tokamax, DeepGEMM,
FlashMLA, cuDNN-frontend; `experiments/rivals/kernel_worker.py`) is a process
of its own, which waits on its standard input when it isn't its turn.

Printed: median time, TFLOP/s and GB/s of the work that the definition needs
(`pallas_kernels.benchmarks.costs`), the fraction of the ceiling, and the error
against the definition in float32: relative norm, or the share of rows with
another set for selections. The ceiling is the larger of FLOPs over the rate of
a square matmul and bytes over the rate of a copy, both measured first in the
same process.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys

import jax
import jax.numpy as jnp
from absl import app, flags

from dsv32_jax.functional import attention
from pallas_kernels.benchmarks import cases, measure

WORKER = pathlib.Path(__file__).parent / 'rivals' / 'kernel_worker.py'
# (rival, op, direction): the package that it needs.
RIVALS = {
  ('torch', 'select_topk', 'forward'): 'torch',
  ('tokamax', 'grouped_matmul', 'forward'): 'tokamax',
  ('tokamax', 'grouped_matmul', 'gradients'): 'tokamax',
  ('tokamax', 'dense_attention', 'forward'): 'tokamax',
  ('tokamax', 'dense_attention', 'gradients'): 'tokamax',
  ('deep_gemm', 'grouped_matmul', 'forward'): 'deep_gemm',
  ('deep_gemm', 'lightning_indexer', 'forward'): 'deep_gemm',
  ('flash_mla', 'sparse_mla_attention', 'forward'): 'flash_mla',
  ('cudnn_dsa', 'lightning_indexer', 'forward'): 'cudnn',
  ('cudnn_dsa', 'sparse_mla_attention', 'gradients'): 'cudnn',
  ('cudnn_dsa', 'indexer_kl_selected', 'forward'): 'cudnn',
}
# Work that one call may take where --shapes names none.
CPU_FLOPS, CPU_BYTES = 5e9, 1e9
GPU_BYTES = 3e10

_OPS = flags.DEFINE_list('ops', None, 'Ops; all by default.')
_SHAPES = flags.DEFINE_list('shapes', None, 'Named shapes.')
_IMPLEMENTATIONS = flags.DEFINE_list(
  'implementations', None, 'Implementations; all but the definition by default.'
)
_DIRECTIONS = flags.DEFINE_list(
  'directions',
  ['forward', 'gradients'],
  'forward; gradients (forward and backward together).',
)
_RIVALS = flags.DEFINE_list(
  'rivals', None, 'Rivals, or none; those installed by default.'
)
_RIVAL_PYTHON = flags.DEFINE_string(
  'rival_python', sys.executable, 'Interpreter that has the rivals.'
)
_DTYPE = flags.DEFINE_enum(
  'dtype',
  None,
  ['float32', 'bfloat16'],
  "Of the inputs; by default the shape's, else bfloat16 on a GPU.",
)
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Turns each.', lower_bound=1)
_SEED = flags.DEFINE_integer('seed', 0, 'Of the inputs.')
_ERRORS = flags.DEFINE_bool('errors', True, 'Compare with the definition.')
_JSONL = flags.DEFINE_string('jsonl', None, 'Append the figures here.')
_PLOT = flags.DEFINE_string('plot', None, 'Draw a roofline here (.png, .svg).')


class Rival:
  """A worker process that waits for its turn."""

  def __init__(self, name: str, op: str, direction: str, spec, dtype: str):
    request = {
      'rival': name,
      'op': op,
      'direction': direction,
      'dtype': dtype,
      'spec': dataclasses.asdict(spec),
    }
    self._process = subprocess.Popen(
      (_RIVAL_PYTHON.value, str(WORKER), json.dumps(request)),
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
      env={**os.environ, 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'},
    )
    self.remark = self._answer().get('remark')

  def seconds(self) -> float:
    assert self._process.stdin is not None
    self._process.stdin.write('go\n')
    self._process.stdin.flush()
    return self._answer()['seconds']

  def close(self) -> None:
    self._process.kill()
    self._process.communicate()

  def _answer(self) -> dict:
    assert self._process.stdout is not None
    for line in self._process.stdout:
      # Packages print; answers are the lines that are JSON objects.
      if line.startswith('{'):
        answer = json.loads(line)
        if 'error' in answer:
          raise NotImplementedError(answer['error'])
        return answer
    raise NotImplementedError(
      f'the worker ended with status {self._process.wait()}'
    )


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    fail(f'unexpected argument {argv[1]!r}')
  ops = cases.ops(dense_attention_xla=attention.dense_attention)
  todo = selected(ops)
  ceilings = measure.ceilings()
  machine = {
    'device': jax.devices()[0].device_kind,
    'jax': jax.__version__,
    'matmul_tflops': round(ceilings.flops / 1e12, 3),
    'matmul': f'{ceilings.dtype} {ceilings.side}^3',
    'copy_gbps': round(ceilings.bytes / 1e9, 1),
  }
  print('{device}, jax {jax}: {matmul} matmul {matmul_tflops} TFLOP/s, copy '
        '{copy_gbps} GB/s'.format(**machine))  # fmt: skip
  records = []
  for op, shape, direction in todo:
    for record in measured(ops[op], shape, direction, ceilings):
      report(record)
      records.append(record)
      if _JSONL.value:
        with open(_JSONL.value, 'a', encoding='utf-8') as file:
          file.write(json.dumps({**record, **machine}) + '\n')
  if _PLOT.value:
    timed = [record for record in records if 'ms' in record]
    draw(_PLOT.value, timed, ceilings, machine)


def fail(message: str) -> None:
  print(f'error: {message}', file=sys.stderr)
  sys.exit(1)


def selected(ops) -> list[tuple[str, str, str]]:
  """(op, shape, direction) to measure; unknown names end the program."""
  for flag, known in (
    (_OPS, ops),
    (_SHAPES, {name for op in ops.values() for name in op.specs}),
    (_IMPLEMENTATIONS, {n for op in ops.values() for n in op.implementations}),
    (_DIRECTIONS, ('forward', 'gradients')),
    (_RIVALS, {'none', *(rival for rival, *_ in RIVALS)}),
  ):
    for name in flag.value or ():
      if name not in known:
        expected = ', '.join(sorted(known))
        fail(f'--{flag.name}: got {name!r}, expected some of: {expected}')
  todo = [
    (op.name, shape, direction)
    for op in ops.values()
    if not _OPS.value or op.name in _OPS.value
    for shape, spec in op.specs.items()
    if (shape in _SHAPES.value if _SHAPES.value else is_reasonable(op, spec))
    for direction in op.directions
    if direction in _DIRECTIONS.value
  ]
  if not todo:
    fail('no op has a shape of that name and a direction of that kind')
  return todo


def dtype_of(spec) -> str:
  if _DTYPE.value:
    return _DTYPE.value
  on_gpu = jax.default_backend() == 'gpu'
  return getattr(spec, 'dtype', 'bfloat16' if on_gpu else 'float32')


def is_reasonable(op, spec) -> bool:
  cost = op.cost(spec, 'forward', jnp.dtype(dtype_of(spec)).itemsize)
  if jax.default_backend() == 'gpu':
    return cost.bytes <= GPU_BYTES
  return cost.flops <= CPU_FLOPS and cost.bytes <= CPU_BYTES


def measured(op, shape: str, direction: str, ceilings) -> list[dict]:
  """One record for each implementation and rival of one case."""
  spec, dtype = op.specs[shape], dtype_of(op.specs[shape])
  cost = op.cost(spec, direction, jnp.dtype(dtype).itemsize)
  arguments = op.make(spec, jnp.dtype(dtype), _SEED.value)
  base = {'op': op.name, 'shape': shape, 'direction': direction, 'dtype': dtype}
  records, runners, rivals = [], [], []

  names = [
    name
    for name in op.implementations
    if (
      name in _IMPLEMENTATIONS.value
      if _IMPLEMENTATIONS.value
      else name != 'reference'
    )
  ]
  for name in names:
    record = {**base, 'implementation': name}
    records.append(record)
    try:
      function = op.function(name, spec, direction)
      outputs = jax.block_until_ready(function(*arguments))
      if _ERRORS.value:
        record['error'] = cases.error(op, spec, direction, arguments, outputs)
      del outputs
      runners.append(
        (record, lambda f=function: measure.seconds(f, *arguments))
      )
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
      record['unavailable'] = str(error).partition('\n')[0][:200]

  for (name, its_op, its_direction), package in RIVALS.items():
    if (its_op, its_direction) != (op.name, direction):
      continue
    if _RIVALS.value is None:
      # Another interpreter may have what this one lacks: its worker knows.
      is_ours = _RIVAL_PYTHON.value == sys.executable
      wanted = not is_ours or importlib.util.find_spec(package) is not None
    else:
      wanted = name in _RIVALS.value
    if not wanted:
      continue
    record = {**base, 'implementation': name, 'is_rival': True}
    records.append(record)
    try:
      rival = Rival(name, op.name, direction, spec, dtype)
      rivals.append(rival)
      if rival.remark:
        record['remark'] = rival.remark
      runners.append((record, rival.seconds))
    except NotImplementedError as error:
      record['unavailable'] = str(error)[:200]

  times = [[] for _ in runners]
  try:
    for _ in range(_ROUNDS.value):
      for (_, run), seconds in zip(runners, times, strict=True):
        seconds.append(run())
  finally:
    for rival in rivals:
      rival.close()
  for (record, _), seconds in zip(runners, times, strict=True):
    median = statistics.median(seconds)
    record |= {
      'ms': 1e3 * median,
      'tflops': cost.flops / median / 1e12,
      'gbps': cost.bytes / median / 1e9,
      'flops_per_byte': cost.flops / cost.bytes,
      'bound': ceilings.bound(cost.flops, cost.bytes),
      'fraction': ceilings.seconds(cost.flops, cost.bytes) / median,
    }
  return records


def report(record: dict) -> None:
  name = '{op:22s} {shape:16s} {direction:9s} {implementation:11s}'
  if 'unavailable' in record:
    print((name + ' unavailable: {unavailable}').format(**record), flush=True)
    return
  error = record.get('error')
  print(
    (
      name + ' {ms:10.4f} ms {tflops:9.3f} TFLOP/s {gbps:9.1f} GB/s '
      '{fraction:6.3f} of {bound:6s}'
    ).format(**record)
    + (f' error {error:.2g}' if error is not None else '')
    + (f' ({record["remark"]})' if 'remark' in record else ''),
    flush=True,
  )


def draw(path: str, records: list[dict], ceilings, machine: dict) -> None:
  """Roofline of the ops with products, and everybody's fraction of it."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt
  import numpy as np

  height = max(4.0, 0.22 * len(records))
  figure, (roof, bars) = plt.subplots(1, 2, figsize=(14, height))
  names = sorted({r['implementation'] for r in records})
  colour = {name: f'C{i % 10}' for i, name in enumerate(names)}
  products = [r for r in records if r['tflops'] > 0]
  if products:
    intensity = np.array([r['flops_per_byte'] for r in products])
    x = np.geomspace(intensity.min() / 2, intensity.max() * 2, 200)
    y = np.minimum(ceilings.flops, x * ceilings.bytes) / 1e12
    roof.loglog(x, y, color='black')
    for name in names:
      some = [r for r in products if r['implementation'] == name]
      roof.loglog(
        [r['flops_per_byte'] for r in some],
        [r['tflops'] for r in some],
        'x' if any(r.get('is_rival') for r in some) else 'o',
        color=colour[name],
        label=name,
      )
    roof.legend()
  roof.set_xlabel('FLOPs a byte')
  roof.set_ylabel('TFLOP/s')
  roof.set_title('{device}, jax {jax}'.format(**machine))
  labels = [
    '{op} {shape} {direction} {implementation}'.format(**r) for r in records
  ]
  position = np.arange(len(records))[::-1]
  bars.barh(
    position,
    [r['fraction'] for r in records],
    color=[colour[r['implementation']] for r in records],
  )
  bars.set_yticks(position, labels, fontsize=6)
  bars.set_xlabel('fraction of the matmul or copy ceiling')
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  plt.close(figure)


if __name__ == '__main__':
  app.run(main)
