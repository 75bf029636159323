r"""Distils specialists into one model, as DeepSeek-V3.2 does, and reports.

From one base checkpoint: a specialist for each domain and mode (SFT cold start
and RL), training data that the specialists write, a student trained on all of
it, one mixed RL stage, and an evaluation of every model on the same problems.

    python experiments/distill_specialists.py --workdir=runs/distill \
      --config=experiments/configs/distill_specialists.py:cpu --workers=2

Steps that are done are skipped and one that was interrupted goes on where it
was, so the same command always continues. One step alone:
--step=specialist.mathematics-chat. --workers says how many steps run at a time,
each in a process with its share of the cores. The report is written to
<workdir>/report.md and .html.
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from dsv32_jax.config.distillation import DistillationConfig
from dsv32_jax.evaluation import distillation, distillation_report
from dsv32_jax.rl import specialists, steps
from dsv32_jax.training import flags as run_flags

_CONFIG = config_flags.DEFINE_config_file(
  'config',
  'experiments/configs/distill_specialists.py:smoke',
  'Config file and preset, FILE.py:PRESET. Any field can be set.',
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where everything goes; of one chain.', required=True
)
_STEP = flags.DEFINE_string('step', None, 'Run this step alone.')
_WORKERS = flags.DEFINE_integer(
  'workers', 1, 'Steps that run at a time.', lower_bound=1
)


def main(argv: list[str]) -> None:
  del argv
  config = run_flags.resolve(_CONFIG.value, DistillationConfig)
  workdir = pathlib.Path(_WORKDIR.value)
  chain = specialists.Distillation(config, workdir)
  chain.run(
    only=_STEP.value,
    workers=_WORKERS.value,
    command=steps.command_of_this_program(),
  )
  if chain.is_done and _STEP.value is None:
    found = distillation.collect(workdir)
    print(f'report: {distillation_report.write(workdir, found)}', flush=True)


if __name__ == '__main__':
  run_flags.run(main)
