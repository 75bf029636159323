r"""Synthesises agent tasks: databases, typed tools, tasks, verifiers.

    python experiments/synthesize_tasks.py --workdir=runs/tasks \
      --config=experiments/configs/task_synthesis.py:sample

WORKDIR then holds tasks.jsonl, held_out.jsonl, a SQLite file for each
environment in databases/, and the report. A run that was ended goes on with the
same command and comes to the same bytes. Any field can be set:
--config.families.general.tasks=400. The authors are procedural, no model
(docs/synthesis.md).
"""

import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from dsv32_jax.agents.synthesis import pipeline
from dsv32_jax.agents.synthesis.general.family import GeneralFamily
from dsv32_jax.training import flags as run_flags

_CONFIG = config_flags.DEFINE_config_file(
  'config',
  'experiments/configs/task_synthesis.py:sample',
  'Config file and preset, FILE.py:PRESET. Any field can be set.',
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where everything goes; of one task set.', required=True
)


def main(argv: list[str]) -> None:
  del argv
  config = run_flags.resolve(_CONFIG.value, pipeline.PipelineConfig)
  made = pipeline.run(
    config,
    {'general': GeneralFamily()},
    pathlib.Path(_WORKDIR.value),
    _show,
  )
  print(made.table(), end='')


def _show(line: str) -> None:
  # One line that is written over, or lines where nobody is watching.
  if sys.stderr.isatty():
    print(f'\r{line}\033[K', end='', file=sys.stderr, flush=True)
  else:
    print(line, file=sys.stderr, flush=True)


if __name__ == '__main__':
  run_flags.run(main)
