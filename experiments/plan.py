r"""The 671B run on paper: memory, collectives, time and GPU-hours of a layout.

  python experiments/plan.py --preset=deepseek_v32_671b \
    --mesh=context=16,expert=16 --rules=fsdp_expert_context
  python experiments/plan.py --search --gpus=256
  python experiments/plan.py --mesh=fsdp=2,context=4,expert=8 --batch_size=16 \
    --compile

Shapes and an abstract mesh are all that is used: no device, no memory. With
--compile the train step itself is compiled for as many virtual CPU devices as
the mesh has, and compared with the plan. docs/plan_671b.md has the arithmetic.
"""

import json
from typing import Any

from absl import flags

from dsv32_jax.sharding.planning import (
  compiled,
  plots,
  render,
  request,
  search,
  weights,
)
from dsv32_jax.training import flags as run_flags

_PRESET = flags.DEFINE_string('preset', 'deepseek_v32_671b', 'Model.')
_MESH = flags.DEFINE_string('mesh', '', 'Axes with sizes: fsdp=32,expert=8.')
_RULES = flags.DEFINE_string('rules', 'fsdp_expert_context', 'Rule set.')
_STAGE = flags.DEFINE_string('stage', 'sparse_training', 'Stage kind.')
_LENGTH = flags.DEFINE_integer('length', request.LENGTH, 'Tokens a row.')
_BATCH = flags.DEFINE_integer('batch_size', None, "Rows a step; the paper's.")
_MICRO = flags.DEFINE_integer(
  'micro_batches', None, 'If not given, those that are fastest and fit.'
)
_PARAM = flags.DEFINE_string('param_dtype', 'float32', 'Of the parameters.')
_MOMENT = flags.DEFINE_string('moment_dtype', 'bfloat16', "Of AdamW's moments.")
_REMAT = flags.DEFINE_string('remat', 'full', 'Remat policy.')
_CHUNK = flags.DEFINE_integer('query_chunk', 4096, 'ModelConfig.query_chunk.')
_GPUS = flags.DEFINE_multi_integer(
  'gpus', [], 'H100s; the mesh must have as many. A search takes several.'
)
_SEARCH = flags.DEFINE_bool('search', False, 'Plan every mesh of --gpus.')
_TOP = flags.DEFINE_integer('top', 12, 'Plans of a search to keep.')
_JSONL = flags.DEFINE_string('jsonl', None, 'Append the plans to this file.')
_PLOT = flags.DEFINE_string('plot', None, 'Draw the plans into this PNG.')
_COMPILE = flags.DEFINE_bool('compile', False, 'Compare with a compiled step.')


def main(argv: list[str]) -> None:
  del argv
  options: dict[str, Any] = {
    'preset': _PRESET.value,
    'stage': _STAGE.value,
    'length': _LENGTH.value,
    'batch_size': _BATCH.value,
    'param_dtype': _PARAM.value,
    'moment_dtype': _MOMENT.value,
    'query_chunk': _CHUNK.value,
  }
  layout: dict[str, Any] = {
    'rules': _RULES.value,
    'sizes': request.parse_mesh(_MESH.value),
    'micro_batches': _MICRO.value,
    'remat': _REMAT.value,
  }
  if _SEARCH.value:
    plans = []
    for gpus in _GPUS.value or (None,):
      found = search.checked(gpus, options)[: _TOP.value]
      print('\n'.join(render.found(found)), flush=True)
      plans += found
  elif _COMPILE.value:
    print('\n'.join(compiled.report({**options, **layout})))
    return
  else:
    for gpus in _GPUS.value:
      request.check_gpus(layout['sizes'], gpus)
    plans = [search.best({**options, **layout})]
    asked = plans[0].request
    print(render.text(plans[0]))
    print('\n' + '\n'.join(render.lengths(asked, weights.build(asked))))
    print('\n' + '\n'.join(render.recipe(search.recipe(plans[0], options))))
  if _JSONL.value:
    with open(_JSONL.value, 'a', encoding='utf-8') as file:
      for one in plans:
        file.write(json.dumps(render.record(one)) + '\n')
  if _PLOT.value:
    plots.draw(plans, _PLOT.value)


if __name__ == '__main__':
  run_flags.run(main)
