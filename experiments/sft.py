r"""Supervised training on conversations: loss on the assistant's tokens alone.

    python experiments/sft.py --workdir=runs/sft \
      --config=experiments/configs/sft.py:cpu

Own data, from a checkpoint of `experiments/continued_training.py`:

    python experiments/sft.py --workdir=runs/mine \
      --config=experiments/configs/sft.py:cpu \
      --init_from=runs/cpu/stages/sparse_training --conversations=chats.jsonl

A line of the JSONL is one conversation in the OpenAI format, see
docs/training.md. The same command continues a run that was interrupted.
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from dsv32_jax.config.sft import SFTRunConfig
from dsv32_jax.evaluation import results
from dsv32_jax.rl import demonstrations
from dsv32_jax.training import flags as run_flags
from dsv32_jax.training import recipe

_CONFIG = config_flags.DEFINE_config_file(
  'config',
  'experiments/configs/sft.py:smoke',
  'Config file and preset, FILE.py:PRESET. Any field can be set.',
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where everything goes; of one run.', required=True
)
_STAGE = flags.DEFINE_string('stage', None, 'Run this stage alone.')
_INIT_FROM = flags.DEFINE_string(
  'init_from', None, 'Run the last stage alone, from this checkpoint.'
)
_CONVERSATIONS = flags.DEFINE_string(
  'conversations', None, 'JSONL that the last stage reads instead.'
)


def main(argv: list[str]) -> None:
  del argv
  config = run_flags.resolve(_CONFIG.value, SFTRunConfig).with_start(
    init_from=_INIT_FROM.value, conversations=_CONVERSATIONS.value
  )
  workdir = pathlib.Path(_WORKDIR.value)
  written = workdir / recipe.DEMONSTRATIONS
  demonstrations.write_all(config.demonstrations, written, seed=config.seed)
  run_config = config.run(str(written))
  run = recipe.Run(run_config, workdir)
  run.run(only=_STAGE.value, observe=results.stage_observer(run_config))


if __name__ == '__main__':
  run_flags.run(main)
