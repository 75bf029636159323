r"""Switches the stabilisers of RL on and off, in regimes that need them or not.

    python experiments/rl_ablations.py --results=runs/ablations --workers=8 \
      --config=experiments/configs/rl_ablations.py:cpu

Each cell (regime, variant, seed) is a short run; cells that are done are not
run again, so the same command always continues. Processes get equal shares of
the cores that this one may use. At the end, and with --report_only at once,
figures and tables of what is there are written beside the results
(docs/rl_ablations.md).
"""

import os
import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from dsv32_jax.config.rl import RLConfig
from dsv32_jax.evaluation import rl_ablations
from dsv32_jax.rl import ablation_runner, ablations
from dsv32_jax.training import flags as run_flags

_CONFIG = config_flags.DEFINE_config_file(
  'config',
  'experiments/configs/rl_ablations.py:cpu',
  'What all cells share. Any field can be set.',
)
_RESULTS = flags.DEFINE_string(
  'results', None, 'Where rows, figures and tables go.', required=True
)
_STARTS = flags.DEFINE_string(
  'starts', None, 'Where starting points are made; RESULTS/starts if not given.'
)
_REGIMES = flags.DEFINE_list(
  'regimes', list(ablations.REGIMES), 'Regimes to run.'
)
_SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds to run.')
_WORKERS = flags.DEFINE_integer('workers', 1, 'Processes.')
_WORKER = flags.DEFINE_integer(
  'worker', None, 'Run as this process; for the program itself.'
)
_CORES = flags.DEFINE_list('cores', [], 'Of this process; likewise.')
_REPORT_ONLY = flags.DEFINE_bool('report_only', False, 'Run nothing.')


def main(argv: list[str]) -> None:
  del argv
  config = run_flags.resolve(_CONFIG.value, RLConfig)
  results = pathlib.Path(_RESULTS.value)
  cells = ablations.cells(_REGIMES.value, [int(s) for s in _SEEDS.value])
  if _WORKER.value is not None:
    # Before the first computation makes its threads.
    os.sched_setaffinity(0, [int(core) for core in _CORES.value])
    starts = pathlib.Path(_STARTS.value or results / 'starts')
    lab = ablations.Lab(config, starts, report=lambda line: None)
    ablation_runner.work(lab.run, cells, results, worker=_WORKER.value)
    return
  codes = []
  if not _REPORT_ONLY.value:
    codes = ablation_runner.run_all(
      sys.argv,
      results,
      workers=_WORKERS.value,
      cores=sorted(os.sched_getaffinity(0)),
    )
  rl_ablations.write(results, ablation_runner.read(results))
  if any(codes):
    sys.exit(f'processes ended with {codes}; run the same command again')


if __name__ == '__main__':
  run_flags.run(main)
