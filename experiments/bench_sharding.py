r"""A train step on several devices against the same step on one of them.

  python experiments/bench_sharding.py                        # two GPUs
  python experiments/bench_sharding.py --devices=4 --cases=expert
  XLA_FLAGS=--xla_force_host_platform_device_count=2 \
    python experiments/bench_sharding.py --preset=tiny --length=64 \
    --context_length=128 --rows=2 --notrace      # that it runs, on virtual ones

Cases, with n devices:

  expert          axis `expert` of n, n times the rows of one device
  expert_ragged   likewise, tokens travel by the ragged exchange (GPUs only)
  fsdp            axis `fsdp` of n, n times the rows of one device
  context         axis `context` of n, n times the rows, each cut in n
  context_strong  axis `context` of n, the same one row

Each case times the step that training runs (forward, backward, AdamW), alone on
the first device and on all of them: a process each, compiled at the same time,
then in turns, the one whose turn it is not waits. Efficiency is tokens a second
and device, n devices over one. Then a profile of the step on
all devices gives the time in collectives: of the device where it is longest,
the union of its kernels' times, 'exposed' the part beside which nothing else
ran. The bytes are the compiled program's, a device and step. With n devices
along `expert` no weight of a routed expert may be gathered: if one is, it is
named and the exit status is 1.

'load' is the busiest expert's tokens over the mean, of the most uneven layer,
in the last step: the others wait for the device that has such an expert.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

from dsv32_jax import presets
from dsv32_jax.config.data import DataConfig
from dsv32_jax.config.training import MeshConfig, OptimizerConfig, StageConfig
from dsv32_jax.evaluation import device_trace, turns
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.sharding import mesh as mesh_lib
from dsv32_jax.sharding import parallel as parallel_lib
from dsv32_jax.sharding import specs
from dsv32_jax.sharding.planning import hlo
from dsv32_jax.training import compiled_step, optimizer, stages, step
from dsv32_jax.training import state as state_lib
from dsv32_jax.training.batch import Batch

_CASES = ('expert', 'expert_ragged', 'fsdp', 'context', 'context_strong')

_PRESET = flags.DEFINE_string('preset', 'small', 'Model.')
_DEVICES = flags.DEFINE_integer('devices', 2, 'n.', 2)
_WHICH = flags.DEFINE_multi_enum(
  'cases', ['expert', 'context', 'context_strong'], _CASES, 'Which layouts.'
)
_STAGES = flags.DEFINE_multi_enum(
  'stages',
  ['pretrain', 'sparse_training'],
  ['pretrain', 'dense_warmup', 'sparse_training'],
  'Which train steps (expert, fsdp).',
)
_LONG = flags.DEFINE_multi_enum(
  'context_stages',
  ['sparse_training'],
  ['pretrain', 'dense_warmup', 'sparse_training'],
  'Which train steps (context).',
)
_ROWS = flags.DEFINE_integer('rows', 4, 'Of one device (expert, fsdp).', 1)
_LENGTH = flags.DEFINE_integer('length', 8192, 'Tokens a row (expert, fsdp).')
_CONTEXT_LENGTH = flags.DEFINE_integer(
  'context_length', 65536, 'Tokens a row (context).'
)
_CHUNK = flags.DEFINE_integer('query_chunk', 4096, 'ModelConfig.query_chunk.')
_REMAT = flags.DEFINE_enum(
  'remat', 'full', ['none', 'save_attention', 'full'], 'ModelConfig.remat.'
)
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'Turns of each side.', 1)
_STEPS = flags.DEFINE_integer('steps', 5, 'Steps a turn.', 1)
_TRACE = flags.DEFINE_bool('trace', True, 'Profile the step (GPUs only).')
_JSONL = flags.DEFINE_string('jsonl', None, 'Also append the figures here.')
_DUMP = flags.DEFINE_string(
  'dump', None, 'Keep the compiled programs in this directory.'
)
_SIDE = flags.DEFINE_string('side', None, "A side's process (internal).")


@dataclasses.dataclass(frozen=True)
class Side:
  """One train step: where it runs, and on what."""

  case: str
  kind: str
  mesh: MeshConfig | None
  rows: int
  length: int


class Step:
  """A compiled train step with its state on the devices."""

  def __init__(self, side: Side):
    self.side = side
    self.parallel = mesh_lib.make_parallel(side.mesh) if side.mesh else None
    remat: Any = _REMAT.value
    cfg = dataclasses.replace(
      presets.get(_PRESET.value),
      remat=remat,
      query_chunk=_CHUNK.value if side.length > _CHUNK.value else 0,
    )
    model = DeepSeekV32(cfg)
    kind: Any = side.kind
    config = StageConfig(
      kind=kind,
      steps=1,
      data=DataConfig(seq_len=side.length, batch_size=side.rows),
      init_from=None if side.kind == 'pretrain' else 'random',
      # Routing stays that of random weights ('load' says how even): a few steps
      # on random tokens would send nearly all of them to the same experts.
      optimizer=OptimizerConfig(peak_learning_rate=1e-9),
      indexer_optimizer=OptimizerConfig(peak_learning_rate=1e-9),
      router_bias_update_rate=0.0,
    )
    stage = stages.build(config, cfg)
    tx = optimizer.build(config, stage)
    with parallel_lib.use(self.parallel):
      variables = state_lib.init_variables(
        model, jax.random.key(0), self.parallel
      )
      shardings = (
        specs.of_leaves(variables['params']) if self.parallel else None
      )
      state = compiled_step.place_state(
        state_lib.create(variables, stage, tx, self.parallel), self.parallel
      )
      finite = compiled_step.place_state(np.asarray(True), self.parallel)
      self._carry = (state, finite)
      self._key = compiled_step.place_state(jax.random.key(1), self.parallel)
      self._batch = Batch.from_numpy(
        compiled_step.place_rows(_rows(side, cfg.vocab_size), self.parallel)
      )
      started = time.perf_counter()
      self._step: Any = compiled_step.compile_step(
        step.make_train_step(model, stage, tx, shardings),
        self._carry,
        self._batch,
        self._key,
      )
      self.compile_s = time.perf_counter() - started
    self.metrics = {}

  @property
  def text(self) -> str:
    """The compiled program."""
    return self._step.as_text()

  def run(self, steps: int) -> float:
    """Milliseconds a step."""
    started = time.perf_counter()
    for _ in range(steps):
      self._carry, self.metrics = self._step(
        self._carry, self._batch, self._key
      )
    jax.block_until_ready((self._carry, self.metrics))
    return 1e3 * (time.perf_counter() - started) / steps


def _rows(side: Side, vocab_size: int) -> dict[str, np.ndarray]:
  """Random tokens, one document a row."""
  shape = (side.rows, side.length)
  tokens = np.random.default_rng(0).integers(
    0, vocab_size, (side.rows, side.length + 1), np.int32
  )
  return {
    'tokens': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'loss_weight': np.ones(shape, np.float32),
    'segment_ids': np.ones(shape, np.int32),
    'positions': np.broadcast_to(np.arange(side.length, dtype=np.int32), shape),
  }


def _sides(case: str, kind: str) -> tuple[Side, Side]:
  """(one device, n devices)."""
  n = _DEVICES.value
  if case.startswith('context'):
    rows = 1 if case == 'context_strong' else n
    mesh = MeshConfig(rules='fsdp_expert_context', data=1, context=n)
    length = _CONTEXT_LENGTH.value
    one = Side('context', kind, None, 1, length)
    return one, Side(case, kind, mesh, rows, length)
  if case.startswith('expert'):
    exchange: Any = 'ragged' if case == 'expert_ragged' else 'dense'
    mesh = MeshConfig(rules='fsdp_expert', data=1, expert=n, exchange=exchange)
  else:
    mesh = MeshConfig(rules='fsdp', data=1, fsdp=n)
  rows, length = _ROWS.value, _LENGTH.value
  one = Side('rows', kind, None, rows, length)
  return one, Side(case, kind, mesh, n * rows, length)


def _serve(side: Side) -> None:
  """A side's process: compiles, then does what its standard input says."""
  # Here, since the parent process is to leave the devices alone.
  if jax.device_count() < _DEVICES.value:
    sys.exit(
      f'--devices: got {_DEVICES.value}, expected at most the '
      f'{jax.device_count()} devices there are'
    )
  if _TRACE.value and jax.default_backend() != 'gpu':
    sys.exit('--trace: needs GPUs; give --notrace')
  began = Step(side)
  began.run(1)
  losses = _losses(began)
  found = []
  if began.parallel is not None:
    sizes = dict(began.parallel.mesh.shape)
    found = hlo.collectives(began.text, sizes, unknown_trips=0)
  if _DUMP.value:
    devices = 'one' if side.mesh is None else 'many'
    path = pathlib.Path(_DUMP.value) / f'{side.case}_{side.kind}_{devices}.txt'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(began.text, encoding='utf-8')
  first = {
    'compile_s': began.compile_s,
    'losses': losses,
    'bytes': hlo.totals(found),
    'experts_moved': _experts_moved(found),
    'device': jax.devices()[0].device_kind,
  }
  print(json.dumps(first), flush=True)
  for line in sys.stdin:
    word, count = line.split()
    if word == 'trace':
      answer = _traced(began, int(count))
    else:
      answer = {'ms': began.run(int(count)), 'load': _load(began)}
      stats = [d.memory_stats() or {} for d in jax.local_devices()]
      answer['peak_gib'] = max(
        s.get('peak_bytes_in_use', 0) / 2**30 for s in stats
      )
    print(json.dumps(answer), flush=True)


class Turns(turns.Worker):
  """A side in a process of its own."""

  def __init__(self, side: Side, folder: pathlib.Path):
    devices = 'one device' if side.mesh is None else f'{_DEVICES.value} devices'
    self.side = side
    self.found: list[dict] = []
    mesh = side.mesh and dataclasses.asdict(side.mesh)
    super().__init__(
      f'{side.case} {side.kind} on {devices}',
      (
        *(sys.executable, __file__, *sys.argv[1:]),
        f'--side={json.dumps(dataclasses.asdict(side) | {"mesh": mesh})}',
      ),
      folder / f'{side.case}_{side.kind}_{devices}.log',
      # Several processes share the devices.
      environment={**os.environ, 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'},
    )

  def ready(self) -> None:
    """Waits until it has compiled."""
    self.first = self.answer()
    print(
      f'{self.name}: compiled in {self.first["compile_s"]:.0f} s', flush=True
    )

  def turn(self) -> None:
    """Runs the steps of a turn."""
    self.found.append(self.ask(f'run {_STEPS.value}'))

  @property
  def ms(self) -> float:
    """Median of the turns."""
    return statistics.median(one['ms'] for one in self.found)


def _measure(pairs: Sequence[tuple[str, str]]) -> Iterator[dict]:
  """Compiles cases together, then times them one after the other."""
  with contextlib.ExitStack() as stack:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    workers: dict[Side, Turns] = {}
    for case, kind in pairs:
      for side in _sides(case, kind):
        if side not in workers:
          workers[side] = Turns(side, pathlib.Path(folder))
          stack.callback(workers[side].kill)
    for worker in workers.values():
      worker.ready()
    for case, kind in pairs:
      one, many = (workers[side] for side in _sides(case, kind))
      yield _figures(case, one, many)


def _figures(case: str, one: Turns, many: Turns) -> dict:
  """Times one case in turns."""
  for worker in (one, many):
    worker.found = []
    worker.ask('run 1')
  for _ in range(_ROUNDS.value):
    one.turn()
    many.turn()
  n = _DEVICES.value
  tokens = [worker.side.rows * worker.side.length for worker in (one, many)]
  figures = {
    'preset': _PRESET.value,
    'case': case,
    'stage': many.side.kind,
    'devices': n,
    'rows': many.side.rows,
    'length': many.side.length,
    'remat': _REMAT.value,
    'one_ms': one.ms,
    'many_ms': many.ms,
    'tokens_s_device': tokens[1] / many.ms / n * 1e3,
    'efficiency': (tokens[1] / many.ms / n) / (tokens[0] / one.ms),
    'load': many.found[-1]['load'],
    'peak_gib': [w.found[-1]['peak_gib'] for w in (one, many)],
    'one_turns_ms': [found['ms'] for found in one.found],
    'many_turns_ms': [found['ms'] for found in many.found],
    'first_losses': [worker.first['losses'] for worker in (one, many)],
    'compile_s': [worker.first['compile_s'] for worker in (one, many)],
    'bytes': many.first['bytes'],
    'experts_moved': many.first['experts_moved'],
    'device': many.first['device'],
    'jax': jax.__version__,
  }
  print(_line(figures), flush=True)
  if _TRACE.value:
    figures['trace_ms'] = many.ask('trace 3')
    print(_traced_line(figures['trace_ms']), flush=True)
  return figures


def _losses(side: Step) -> dict[str, float]:
  return {
    name: float(value)
    for name, value in side.metrics.items()
    if name.startswith('loss/')
  }


def _load(side: Step) -> float:
  """The busiest expert's tokens over the mean, the largest of all layers."""
  load_LE = np.asarray(side.metrics['expert_load_LE'])
  return float(np.max(load_LE.max(-1) / np.maximum(load_LE.mean(-1), 1)))


def _experts_moved(found: list[hlo.Collective]) -> list[str]:
  """All-gathers inside the region of routed experts."""
  return sorted(
    {
      one.scope
      for one in found
      if one.kind == 'all-gather' and 'routed_experts' in one.scope
    }
  )


def _traced(side: Step, steps: int) -> dict[str, float]:
  """Milliseconds a step in collectives, of the device with the most."""
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      side.run(steps)
    devices = device_trace.collective_seconds(pathlib.Path(folder))
  worst = max(devices.values(), key=lambda seconds: seconds['collectives'])
  return {name: 1e3 * value / steps for name, value in worst.items()}


def _line(figures: dict) -> str:
  parts = [
    f'{figures["case"]:15s} {figures["stage"]:16s}',
    f'{figures["rows"]} x {figures["length"]}',
    f'one {figures["one_ms"]:.1f} ms',
    f'{figures["devices"]} devices {figures["many_ms"]:.1f} ms',
    f'efficiency {figures["efficiency"]:.3f}',
    f'load {figures["load"]:.2f}',
  ]
  parts += [
    f'{name} {value / 1e9:.3f} GB' for name, value in figures['bytes'].items()
  ]
  return '  '.join(parts)


def _traced_line(milliseconds: dict[str, float]) -> str:
  parts = [f'{name} {value:.2f} ms' for name, value in milliseconds.items()]
  return '  a step: ' + ', '.join(parts)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  if _SIDE.value:
    values = json.loads(_SIDE.value)
    values['mesh'] = values['mesh'] and MeshConfig(**values['mesh'])
    _serve(Side(**values))
    return
  pairs = {
    'rows': [(c, k) for c in _WHICH.value for k in _STAGES.value
             if not c.startswith('context')],
    # Long rows are for the sparse stage, unless another one is asked for.
    'context': [(c, k) for c in _WHICH.value for k in _LONG.value
                if c.startswith('context')],
  }  # fmt: skip
  failed = False
  for figures in itertools.chain.from_iterable(map(_measure, pairs.values())):
    if figures['experts_moved'] and 'expert' in figures['case']:
      failed = True
      print(f'  gathered experts: {figures["experts_moved"]}')
    if _JSONL.value:
      with open(_JSONL.value, 'a', encoding='utf-8') as file:
        file.write(json.dumps(figures) + '\n')
  if failed:
    sys.exit(1)


def _main(argv):
  try:
    main(argv)
  except RuntimeError as error:
    # What a side's process said.
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  app.run(_main)
