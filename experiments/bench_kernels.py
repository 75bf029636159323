r"""Times of every op x implementation x named shape, beside their rivals.

  python experiments/bench_kernels.py --table --jsonl=table.jsonl
  python experiments/bench_kernels.py --table --rows=topk_4096x32k,decode_fp8
  python experiments/bench_kernels.py --table --installed_rivals_only
  python experiments/bench_kernels.py --ops=grouped_matmul --shapes=v32_e64_32k
  python experiments/bench_kernels.py --rivals=none --jsonl=kernels.jsonl \
    --plot=kernels.png

--table measures the rows that have bars (`pallas_kernels.benchmarks.table`):
DeepSeek-V3.2's shapes, ours beside one rival each. All rivals start and all
kernels compile first, side by side; then row after row is measured, printed
and written, and the table comes last. It takes a GPU of 80 GB and less than
eight minutes.

Otherwise shapes are each op's `arg_specs.BENCHMARK_SPECS`; without --shapes,
all that the machine does in reasonable time. Implementations that can't run
here are listed with their reason. Ours and the rivals (torch.topk, tokamax,
DeepGEMM, FlashMLA, cuDNN-frontend; `experiments/rivals/kernel_worker.py`) take
turns, round after round, so that whatever else the machine does meets all; a
rival is a process of its own, which waits when it isn't its turn.

Printed: median time, TFLOP/s and GB/s of the work that the definition needs
(`pallas_kernels.benchmarks.costs`), the fraction of the ceiling, and the error
against the definition in float32: relative norm, or the share of rows with
another set for selections. The ceiling is the larger of FLOPs over the rate of
a square matmul and bytes over the rate of a copy, both measured first in the
same process; float8 products count as twice as fast as the bfloat16 matmul.
Directions: forward; backward, the pullback alone; gradients, both together.
"""

import os
import pathlib
import sys

import jax
import jax.numpy as jnp
from absl import app, flags

from dsv32_jax.functional import attention
from pallas_kernels.benchmarks import (
  cases,
  costs,
  records,
  rivals,
  runner,
  table,
)

WORKER = pathlib.Path(__file__).parent / 'rivals' / 'kernel_worker.py'
# Work that one call may take where --shapes names none.
CPU_FLOPS, CPU_BYTES = 5e9, 1e9
GPU_BYTES = 3e10

_TABLE = flags.DEFINE_bool('table', False, 'The rows that have bars.')
_ROWS = flags.DEFINE_list('rows', None, 'Of the table; all by default.')
_INSTALLED = flags.DEFINE_bool(
  'installed_rivals_only',
  False,
  'Leave out rows of the table whose rival this interpreter lacks.',
)
_OPS = flags.DEFINE_list('ops', None, 'Ops; all by default.')
_SHAPES = flags.DEFINE_list('shapes', None, 'Named shapes.')
_IMPLEMENTATIONS = flags.DEFINE_list(
  'implementations', None, 'Implementations; all but the definition by default.'
)
_DIRECTIONS = flags.DEFINE_list(
  'directions',
  list(costs.DIRECTIONS),
  'Some of forward, backward, gradients.',
)
_RIVALS = flags.DEFINE_list(
  'rivals',
  None,
  'Rivals, or none; those installed (in a table all) by default.',
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
_START_LIMIT = flags.DEFINE_float(
  'start_limit', rivals.START_LIMIT, 'Seconds that rivals have to start.'
)
_THREADS = flags.DEFINE_integer(
  'compile_threads', 8, 'Programs of a table compiled at a time.', lower_bound=1
)
_JSONL = flags.DEFINE_string('jsonl', None, 'Append the figures here.')
_PLOT = flags.DEFINE_string('plot', None, 'Draw a roofline here (.png, .svg).')


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    fail(f'unexpected argument {argv[1]!r}')
  # The rivals need some of the GPU's memory; read when jax first uses it.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  ops = cases.ops(dense_attention_xla=attention.dense_attention)
  check_names(ops)
  todo = table_cases(ops) if _TABLE.value else selected(ops)
  settings = runner.Settings(
    worker=(_RIVAL_PYTHON.value, str(WORKER)),
    rounds=_ROUNDS.value,
    seed=_SEED.value,
    with_errors=_ERRORS.value,
    is_prepared=_TABLE.value,
    start_limit=_START_LIMIT.value,
    threads=_THREADS.value,
  )
  measured = []
  for record in runner.run(todo, settings, say):
    say(records.describe(record))
    measured.append(record)
    if _JSONL.value:
      records.append(_JSONL.value, record)
  if _TABLE.value:
    say(f'\n{table.render(measured)}')
  if _PLOT.value:
    draw(_PLOT.value, [record for record in measured if 'fraction' in record])


def say(text: str) -> None:
  print(text, flush=True)


def fail(message: str) -> None:
  print(f'error: {message}', file=sys.stderr)
  sys.exit(1)


def check_names(ops) -> None:
  """Ends the program where a flag has an unknown name."""
  for flag, known in (
    (_ROWS, [row.name for row in table.ROWS]),
    (_OPS, ops),
    (_SHAPES, {name for op in ops.values() for name in op.specs}),
    (_IMPLEMENTATIONS, {n for op in ops.values() for n in op.implementations}),
    (_DIRECTIONS, costs.DIRECTIONS),
    (_RIVALS, {'none', *rivals.PACKAGES}),
  ):
    for name in flag.value or ():
      if name not in known:
        expected = ', '.join(sorted(known))
        fail(f'--{flag.name}: got {name!r}, expected some of: {expected}')


def table_cases(ops) -> list[runner.Case]:
  rows = [
    row
    for row in table.ROWS
    if not _ROWS.value or row.name in _ROWS.value
    if _RIVALS.value is None or row.rival in _RIVALS.value
    if not _INSTALLED.value or rivals.is_installed(row.rival)
  ]
  if not rows:
    fail('no row of the table has such a name and such a rival')
  return runner.table_cases(ops, rows)


def selected(ops) -> list[runner.Case]:
  """What --ops, --shapes and --directions ask for."""
  todo = [
    case(op, shape, direction)
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


def case(op, shape: str, direction: str) -> runner.Case:
  return runner.Case(
    op=op,
    shape=shape,
    direction=direction,
    dtype=dtype_of(op.specs[shape]),
    implementations=[
      name
      for name in op.implementations
      if (
        name in _IMPLEMENTATIONS.value
        if _IMPLEMENTATIONS.value
        else name != 'reference'
      )
    ],
    rivals=[
      rival
      for rival, *what in rivals.RIVALS
      if what == [op.name, direction] and is_wanted(rival)
    ],
  )


def is_wanted(rival: str) -> bool:
  if _RIVALS.value is not None:
    return rival in _RIVALS.value
  # Another interpreter may have what this one lacks: its worker knows.
  is_ours = _RIVAL_PYTHON.value == sys.executable
  return not is_ours or rivals.is_installed(rival)


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


def draw(path: str, records: list[dict]) -> None:
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
    copied = x * products[0]['copy_gbps'] / 1e3
    roof.loglog(
      x, np.minimum(products[0]['matmul_tflops'], copied), color='black'
    )
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
    roof.set_title('{device}, jax {jax}'.format(**products[0]))
  roof.set_xlabel('FLOPs a byte')
  roof.set_ylabel('TFLOP/s')
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
