r"""Trains a DeepSeek-V3.2 through the stages of a recipe and reports on it.

Stages that are done are skipped and a stage that was interrupted goes on where
it was, so the same command always continues:

    python experiments/continued_training.py --workdir=runs/quick \
      --config=experiments/configs/continued_training.py:quick

Any field can be set: --config.stages.dense_warmup.steps=200. One stage alone:
--stage=dense_warmup. The report is written to <workdir>/report.md and .html.
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from dsv32_jax.evaluation import report, results
from dsv32_jax.training import flags as run_flags
from dsv32_jax.training import recipe

_CONFIG = config_flags.DEFINE_config_file(
  'config',
  'experiments/configs/continued_training.py:quick',
  'Config file and preset, FILE.py:PRESET.',
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where everything goes; of one run.', required=True
)
_STAGE = flags.DEFINE_string('stage', None, 'Run this stage alone.')
_REPORT = flags.DEFINE_bool('report', True, 'Evaluate and report at the end.')


def main(argv: list[str]) -> None:
  del argv
  config = run_flags.resolve(_CONFIG.value)
  workdir = pathlib.Path(_WORKDIR.value)
  run = recipe.Run(config, workdir)
  run.run(only=_STAGE.value, observe=results.stage_observer(config))
  if _REPORT.value and all(run.is_done(name) for name in config.order):
    report.write(workdir, results.collect(config, workdir))


if __name__ == '__main__':
  run_flags.run(main)
