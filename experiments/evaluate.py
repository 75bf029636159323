"""Evaluates the stages of a work directory again and rewrites its report.

    python experiments/evaluate.py --workdir=runs/quick

Reads the configuration that the run was started with. With other settings of
the evaluation: --rows=64 --recall_rows=64 --seq_lens=256,512. On other devices
than the run was on: --mesh=data=1, or --mesh=expert=2,fsdp=2
--mesh_rules=fsdp_expert.
"""

import dataclasses
import json
import pathlib
from typing import Any

from absl import flags

from dsv32_jax.config import convert
from dsv32_jax.config.training import MeshConfig, RunConfig
from dsv32_jax.evaluation import report, results
from dsv32_jax.sharding.planning import request
from dsv32_jax.sharding.rules import RULE_SETS
from dsv32_jax.training import flags as run_flags

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Work directory of a finished run.', required=True
)
_ROWS = flags.DEFINE_integer('rows', None, 'Text rows a length.')
_RECALL_ROWS = flags.DEFINE_integer('recall_rows', None, 'Rows a distance.')
_SEQ_LENS = flags.DEFINE_list('seq_lens', None, 'Lengths of the text rows.')
_MESH = flags.DEFINE_string(
  'mesh', None, "Axes with sizes, fsdp=4,expert=2; the run's own if not given."
)
_RULES = flags.DEFINE_enum(
  'mesh_rules', 'fsdp', sorted(RULE_SETS), 'Rule set, with --mesh.'
)
_DISTANCES = flags.DEFINE_list('distances', None, 'Recall distances, tokens.')


def main(argv: list[str]) -> None:
  del argv
  workdir = pathlib.Path(_WORKDIR.value)
  path = workdir / 'config.json'
  if not path.exists():
    raise ValueError(f'workdir: {workdir} holds no run (no config.json there)')
  saved = json.loads(path.read_text(encoding='utf-8'))['config']
  config = convert.from_dict(RunConfig, saved)
  changes: dict = {'rows': _ROWS.value, 'recall_rows': _RECALL_ROWS.value}
  for name, value in (
    ('seq_lens', _SEQ_LENS.value),
    ('recall_distances', _DISTANCES.value),
  ):
    changes[name] = value and tuple(int(item) for item in value)
  config = dataclasses.replace(
    config,
    evaluation=dataclasses.replace(
      config.evaluation,
      **{name: value for name, value in changes.items() if value},
    ),
  )
  if _MESH.value is not None:
    sizes: Any = {'data': 1} | request.parse_mesh(_MESH.value)
    rules: Any = _RULES.value
    mesh = MeshConfig(rules=rules, **sizes)
    config = dataclasses.replace(config, mesh=mesh)
  report.write(workdir, results.collect(config, workdir))


if __name__ == '__main__':
  run_flags.run(main)
