"""Our train step beside MaxText 0.2.5's: same weights, tokens, losses; times.

  python3.12 -m venv ~/maxtext
  ~/maxtext/bin/pip install -r experiments/rivals/maxtext_requirements.txt
  python experiments/bench_maxtext.py --maxtext_python=~/maxtext/bin/python
  python experiments/bench_maxtext.py --crossover    # needs no MaxText

Config T0 (1,153,792 parameters, float32) at T0-256 (2 rows of 256 tokens,
k = 64) and T0-1k (1 row of 1024, k = 256), modes dense, sparse and warmup.

How it is kept fair. Each side is a process of its own (`experiments/rivals/`)
that compiles its step once and then waits for its turn; the turns alternate
A/B/A/B, so that whatever else the machine does meets both, and the one whose
turn it is not waits on its standard input. Both get the same tokens, both
start from MaxText's random weights, and both do the same work: float32, the
same AdamW and clip norm, the router-bias update, full rematerialisation
(`--remat` changes ours only). A step is timed to the end of its last output.
MaxText has two ways through its experts, ragged_dot over sorted tokens and
every expert on every token; the times beside ours are those of whichever is
faster here, and both are printed.

What must be equal to 1e-5, else the exit status is 1: the LM loss of the first
step (dense, sparse) and the layer mean of the indexer's KL (sparse). In its
warm-up MaxText runs the layers on the indexer's mask where the paper keeps
dense attention, so that only the first layer's KL can be compared there.

Two cores, about 12 minutes; the crossover up to 16K about 15 more. Figures and
their environment go to experiments/results/bench_maxtext/*.jsonl.
"""

import contextlib
import itertools
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence

import numpy as np
from absl import app, flags

from dsv32_jax.evaluation import turns

RIVALS = pathlib.Path(__file__).parent / 'rivals'
SIZES = {
  'T0-256': {'batch': 2, 'length': 256, 'index_topk': 64},
  'T0-1k': {'batch': 1, 'length': 1024, 'index_topk': 256},
}
TOLERANCE = 1e-5
# Our time over MaxText's that each mode is to stay below.
TARGETS = {'dense': 0.9, 'sparse': 0.6, 'warmup': 0.9}

_MAXTEXT = flags.DEFINE_string(
  'maxtext_python', None, 'interpreter of an environment with MaxText 0.2.5'
)
_SIZES = flags.DEFINE_multi_enum('sizes', list(SIZES), list(SIZES), 'which')
_MODES = flags.DEFINE_multi_enum(
  'modes', list(TARGETS), list(TARGETS), 'which train steps'
)
_EXPERTS = flags.DEFINE_multi_enum(
  'maxtext_experts',
  ['einsum', 'ragged'],
  ['einsum', 'ragged'],
  "MaxText's ways through its experts that are timed",
)
_REMAT = flags.DEFINE_enum(
  'remat', 'full', ['none', 'save_attention', 'full'], 'of our step'
)
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'turns of each side', 3)
_STEPS = flags.DEFINE_integer('steps', 5, 'steps a turn', 1)
_CROSSOVER = flags.DEFINE_bool(
  'crossover', False, 'our dense against our sparse step by length, k = 64'
)
_LENGTHS = flags.DEFINE_multi_integer(
  'lengths', [256 * 2**i for i in range(7)], 'of the crossover'
)
_OUTPUT = flags.DEFINE_string(
  'output', str(RIVALS.parent / 'results' / 'bench_maxtext'), 'directory'
)


class Worker(turns.Worker):
  """One side: a process that runs steps when told to."""

  def __init__(self, name: str, command: Sequence[str], log: pathlib.Path):
    environment = dict(os.environ, JAX_PLATFORMS='cpu', DECOUPLE_GCLOUD='TRUE')
    super().__init__(name, command, log, environment=environment)
    self.step_ms: list[float] = []
    self.first = self.answer()

  def run(self, steps: int) -> list[float]:
    """Milliseconds of each of `steps` further steps."""
    return self.ask(steps)['step_ms']


def start(
  name: str, python: str, script: str, request: dict, directory: pathlib.Path
) -> Worker:
  """Starts a worker of `rivals/` on one request."""
  command = [python, str(RIVALS / script), json.dumps(request)]
  return Worker(name, command, directory / f'{name}.log')


def alternate(workers: Sequence[Worker], rounds: int, steps: int) -> None:
  """Times the workers in turns, after one turn that does not count."""
  for worker in workers:
    worker.run(min(steps, 2))
  for _, worker in itertools.product(range(rounds), workers):
    worker.step_ms += worker.run(steps)


def write_tokens(path: pathlib.Path, batch: int, length: int) -> str:
  """Saves one column more than the length: inputs and targets."""
  shape = (batch, length + 1)
  tokens = np.random.RandomState(0).randint(0, 512, shape)
  np.save(path, tokens.astype(np.int32))
  return str(path)


def timing(worker: Worker) -> dict:
  """What is recorded of one worker."""
  return {
    'min_ms': min(worker.step_ms),
    'median_ms': statistics.median(worker.step_ms),
    'step_ms': [round(ms, 3) for ms in worker.step_ms],
    **worker.first,
  }


def loss_differences(mode: str, ours: dict, theirs: dict) -> dict[str, float]:
  """Absolute differences of the losses that have to agree."""
  differences = {}
  if mode in ('dense', 'sparse'):
    differences['lm_loss'] = abs(ours['lm_loss'] - theirs['lm_loss'])
  if mode == 'sparse':
    differences['indexer_kl'] = abs(
      ours['indexer_loss'] - theirs['indexer_loss']
    )
  if mode == 'warmup':
    differences['first_layer_kl'] = abs(
      ours['indexer_kl_L'][0] - theirs['indexer_kl_L'][0]
    )
  return differences


def compare(
  size: str, mode: str, maxtext_python: str, directory: pathlib.Path
) -> dict:
  """Losses and times of one mode at one size."""
  request = {'mode': mode, **SIZES[size]}
  request['tokens'] = write_tokens(
    directory / 'tokens.npy', request['batch'], request['length']
  )
  with contextlib.ExitStack() as stack:
    workers = []
    for experts in _EXPERTS.value:
      arrays = str(directory / f'{experts}.npz')
      theirs = start(
        f'maxtext-{experts}',
        os.path.expanduser(maxtext_python),
        'maxtext_step.py',
        {**request, 'experts': experts, 'arrays': arrays},
        directory,
      )
      workers.append(stack.enter_context(contextlib.closing(theirs)))
    ours = start(
      'ours',
      sys.executable,
      'dsv32_step.py',
      {**request, 'remat': _REMAT.value, 'arrays': arrays},
      directory,
    )
    workers.append(stack.enter_context(contextlib.closing(ours)))
    alternate(workers, _ROUNDS.value, _STEPS.value)
  *rivals, ours = workers
  rival = min(rivals, key=lambda worker: statistics.median(worker.step_ms))
  record = {'size': size, 'mode': mode, 'remat': _REMAT.value}
  record |= {worker.name: timing(worker) for worker in workers}
  mine, best = timing(ours), timing(rival)
  return record | {
    'rival': rival.name,
    'min_ratio': mine['min_ms'] / best['min_ms'],
    'median_ratio': mine['median_ms'] / best['median_ms'],
    'differences': loss_differences(mode, mine, best),
  }


def crossover_point(length: int, directory: pathlib.Path) -> dict:
  """Our dense and sparse step at one length."""
  tokens = write_tokens(directory / 'tokens.npy', 1, length)
  request = {'batch': 1, 'length': length, 'index_topk': 64, 'tokens': tokens}
  with contextlib.ExitStack() as stack:
    workers = []
    for mode in ('dense', 'sparse'):
      worker = start(
        mode,
        sys.executable,
        'dsv32_step.py',
        {**request, 'mode': mode, 'remat': _REMAT.value},
        directory,
      )
      workers.append(stack.enter_context(contextlib.closing(worker)))
    # Steps of seconds need no more than one a turn.
    steps = max(1, min(_STEPS.value, 4096 // length))
    alternate(workers, _ROUNDS.value, steps)
  dense, sparse = map(timing, workers)
  return {
    'length': length,
    'remat': _REMAT.value,
    'dense': dense,
    'sparse': sparse,
    'median_ratio': sparse['median_ms'] / dense['median_ms'],
  }


def crossover_statement(records: Sequence[dict]) -> str:
  """From which measured length on sparse is the faster one throughout."""
  first = None
  for record in sorted(records, key=lambda record: -record['length']):
    if record['median_ratio'] >= 1:
      break
    first = record['length']
  longest = max(record['length'] for record in records)
  if first is None:
    return f'no crossover: dense is faster still at {longest} tokens'
  return f'the sparse step is faster from {first} tokens on (to {longest})'


def save(name: str, records: Sequence[dict]) -> None:
  """Writes the records after a line about where they were measured."""
  path = pathlib.Path(_OUTPUT.value) / f'{name}.jsonl'
  path.parent.mkdir(parents=True, exist_ok=True)
  where = {
    'command': ' '.join(['python', 'experiments/bench_maxtext.py'])
    + ''.join(f' {flag}' for flag in _flags_given()),
    'cores': os.cpu_count(),
    'load_average': os.getloadavg()[0],
    'machine': platform.machine(),
    'python': platform.python_version(),
    'rounds': _ROUNDS.value,
    'steps': _STEPS.value,
  }
  with path.open('w') as file:
    for record in (where, *records):
      print(json.dumps(record), file=file)
  print(f'written: {path}')


def _flags_given() -> list[str]:
  # Interpreters are named by paths of one machine.
  return [flag for flag in sys.argv[1:] if 'python' not in flag]


def run_crossover(directory: pathlib.Path) -> int:
  """Prints the crossover table as it grows."""
  print('length    dense ms   sparse ms  sparse / dense (medians)')
  records = []
  for length in sorted(_LENGTHS.value):
    records.append(record := crossover_point(length, directory))
    print(
      f'{length:6d} {record["dense"]["median_ms"]:11.1f}'
      f' {record["sparse"]["median_ms"]:11.1f} {record["median_ratio"]:8.2f}',
      flush=True,
    )
  print(crossover_statement(records))
  save('crossover', records)
  return 0


def run_comparison(maxtext_python: str, directory: pathlib.Path) -> int:
  """Prints the comparison as it grows; 1 if a loss differs."""
  print('size    mode    step of         min ms  median ms')
  records, wrong = [], []
  for size, mode in itertools.product(_SIZES.value, _MODES.value):
    records.append(record := compare(size, mode, maxtext_python, directory))
    for name in (*(f'maxtext-{e}' for e in _EXPERTS.value), 'ours'):
      row = record[name]
      print(
        f'{size:7s} {mode:7s} {name:14s} {row["min_ms"]:8.1f}'
        f' {row["median_ms"]:9.1f}'
      )
    ratio = record['min_ratio']
    verdict = 'met' if ratio <= TARGETS[mode] else 'MISSED'
    print(
      f'{"":16s}ours / {record["rival"]}: min {ratio:.2f}, median'
      f' {record["median_ratio"]:.2f}; at most {TARGETS[mode]}: {verdict}'
    )
    for loss, difference in record['differences'].items():
      equal = difference <= TOLERANCE
      print(
        f'{"":16s}{loss} differs by {difference:.1e}:'
        f' {"equal" if equal else "NOT EQUAL"}',
        flush=True,
      )
      if not equal:
        wrong.append((size, mode, loss))
  save('steps', records)
  return 1 if wrong else 0


def main(argv: Sequence[str]) -> int:
  """Compares with MaxText, or finds the crossover."""
  if len(argv) > 1:
    raise app.UsageError(f'got {argv[1]!r}, expected flags only')
  with tempfile.TemporaryDirectory() as name:
    directory = pathlib.Path(name)
    if _CROSSOVER.value:
      return run_crossover(directory)
    if _MAXTEXT.value is None:
      raise app.UsageError(
        'maxtext_python: got none; make an environment with\n'
        '  python3.12 -m venv ~/maxtext && ~/maxtext/bin/pip install -r'
        ' experiments/rivals/maxtext_requirements.txt\n'
        'and pass --maxtext_python=~/maxtext/bin/python'
      )
    return run_comparison(_MAXTEXT.value, directory)


if __name__ == '__main__':
  app.run(main)
