r"""Trains a DeepSeek-V3.2 through the stages of a recipe and reports on it.

Stages that are done are skipped and a stage that was interrupted goes on where
it was, so the same command always continues:

    python experiments/continued_training.py --workdir=runs/quick \
      --config=experiments/configs/continued_training.py:quick

Any field can be set: --config.stages.dense_warmup.steps=200. One stage alone:
--stage=dense_warmup. The report is written to <workdir>/report.md and .html.
On several devices --config.mesh says how many along each axis and by which
rules, for example 8 devices as 2 x 2 x 2:

    --config.mesh.rules=fsdp_expert_context --config.mesh.fsdp=2 \
      --config.mesh.expert=2 --config.mesh.context=2

The same run may go on with another mesh (docs/sharding.md). On several hosts,
or in several processes of one: docs/sharding.md, "Hosts".
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from dsv32_jax.evaluation import report, results
from dsv32_jax.sharding.hosts import agreement
from dsv32_jax.training import flags as run_flags
from dsv32_jax.training import recipe

_CONFIG = config_flags.DEFINE_config_file(
  'config',
  'experiments/configs/continued_training.py:quick',
  'Config file and preset, FILE.py:PRESET. Any field can be set; of the mesh: '
  '--config.mesh.rules=NAME and --config.mesh.AXIS=DEVICES, AXIS being data '
  '(-1: what the others leave), fsdp, expert, context or tensor.',
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where everything goes; of one run.', required=True
)
_STAGE = flags.DEFINE_string('stage', None, 'Run this stage alone.')
_REPORT = flags.DEFINE_bool('report', True, 'Evaluate and report at the end.')
_HOSTS = run_flags.define_hosts()


def main(argv: list[str]) -> None:
  del argv
  config = run_flags.resolve(_CONFIG.value)
  workdir = pathlib.Path(_WORKDIR.value)
  run = recipe.Run(config, workdir)
  run.run(only=_STAGE.value, observe=results.stage_observer(config))
  if _REPORT.value and all(run.is_done(name) for name in config.order):
    found = results.collect(config, workdir)
    if agreement.is_main():
      report.write(workdir, found)


if __name__ == '__main__':
  run_flags.run(main, hosts=_HOSTS)
