r"""Reinforcement learning by DeepSeek-V3.2's protocol, from start to report.

Without a checkpoint it makes its own start: the stages of the config (base and
cold start) run in <workdir>/start first. An interrupted run goes on where it
was, to the same numbers, so the same command always continues:

    python experiments/rl.py --workdir=runs/rl \
      --config=experiments/configs/mixed_rl.py:cpu

Any field can be set: --config.rollout.group_size=8. To start from a checkpoint
of your own: --config.init_from=PATH and --config.order="()". The report is
written to <workdir>/report.md and .html (docs/rl.md explains it).
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from dsv32_jax.config.rl import RLConfig
from dsv32_jax.evaluation import rl_report
from dsv32_jax.rl import trainer
from dsv32_jax.training import flags as run_flags

_CONFIG = config_flags.DEFINE_config_file(
  'config',
  'experiments/configs/mixed_rl.py:cpu',
  'Config file and preset, FILE.py:PRESET. Any field can be set.',
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where everything goes; of one run.', required=True
)
_REPORT = flags.DEFINE_bool('report', True, 'Write the report at the end.')


def main(argv: list[str]) -> None:
  del argv
  config = run_flags.resolve(_CONFIG.value, RLConfig)
  workdir = pathlib.Path(_WORKDIR.value)
  trainer.run(config, workdir)
  if _REPORT.value:
    rl_report.write(workdir)


if __name__ == '__main__':
  run_flags.run(main)
