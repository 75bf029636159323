r"""Mean and spread of finished runs that differ in their seed.

    python experiments/summarise_seeds.py \
      --workdirs=runs/cpu-0,runs/cpu-1,runs/cpu-2

Reads each run's report/results.json and prints a Markdown table.
"""

import json
import pathlib

from absl import flags

from dsv32_jax.evaluation import seeds
from dsv32_jax.training import flags as run_flags

_WORKDIRS = flags.DEFINE_list(
  'workdirs', None, 'Work directories of the runs.', required=True
)


def main(argv: list[str]) -> None:
  del argv
  found = []
  for name in _WORKDIRS.value or ():
    path = pathlib.Path(name) / 'report' / 'results.json'
    if not path.exists():
      raise ValueError(f'workdirs: {name} has no report yet (no {path})')
    found.append(json.loads(path.read_text(encoding='utf-8')))
  print(seeds.table(found))


if __name__ == '__main__':
  run_flags.run(main)
