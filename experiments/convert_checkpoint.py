r"""Converts between Hugging Face checkpoints and stage directories.

  # a published checkpoint, FP8 or not, as the start of a run
  python experiments/convert_checkpoint.py --source=path/to/hf_directory \
    --target=runs/v32/stages/imported
  # DeepSeek-V3 or V3.1: with new indexers, parameters in float32
  python experiments/convert_checkpoint.py --source=path/to/v31 \
    --target=runs/v31/stages/base --indexer=init --param_dtype=float32
  # a stage for transformers, vLLM and others, in the published dtypes and FP8
  python experiments/convert_checkpoint.py \
    --source=runs/quick/stages/sparse_training --target=export \
    --dtype=published --quantize=fp8
  # from one Hugging Face directory to another: FP8 to bfloat16
  python experiments/convert_checkpoint.py --source=path/to/hf_directory \
    --target=bf16 --to=hf --dtype=bfloat16
  # names, shapes, dtypes and sizes alone, without reading a weight
  python experiments/convert_checkpoint.py --verify=path/to/hf_directory
  # all 92,425 names of the published checkpoint with narrow random weights
  python experiments/convert_checkpoint.py --synthesize=/tmp/synthetic

A command that was interrupted goes on when it is given again; nothing that is
half written has its final name. Exit status: 0 done (or done already), 1
refused or failed, with one line on stderr that names the file and the tensor.
More: docs/checkpoints.md.
"""

import json
from typing import Any

from absl import flags

from dsv32_jax import checkpoints
from dsv32_jax.checkpoints import conversion, hf_layout, synthetic
from dsv32_jax.checkpoints.transfer_progress import Display
from dsv32_jax.config import presets
from dsv32_jax.config.model import Precision
from dsv32_jax.config.training import MeshConfig
from dsv32_jax.sharding import mesh as mesh_lib
from dsv32_jax.sharding.planning import request
from dsv32_jax.sharding.rules import RULE_SETS
from dsv32_jax.training import flags as run_flags

_SOURCE = flags.DEFINE_string(
  'source', None, 'Hugging Face or stage directory to read.'
)
_TARGET = flags.DEFINE_string('target', None, 'Directory to make.')
_TO = flags.DEFINE_enum(
  'to', None, ['stage', 'hf'], 'Kind of the target; what the source is not.'
)
_VERIFY = flags.DEFINE_string(
  'verify', None, 'Hugging Face directory to check, without reading weights.'
)
_SYNTHESIZE = flags.DEFINE_string(
  'synthesize', None, 'Directory to make, with random weights.'
)
_PRESET = flags.DEFINE_string(
  'preset', None, 'Model of --synthesize; V3.2 at reduced width if not given.'
)
_SHARDS = flags.DEFINE_integer(
  'shards', synthetic.PUBLISHED_SHARDS, 'Files of --synthesize.'
)
_MTP = flags.DEFINE_bool(
  'mtp', None, 'Read the MTP layer; if config and files have one if not given.'
)
_INDEXER = flags.DEFINE_enum(
  'indexer', 'load', ['load', 'init'], 'init: new ones, for DeepSeek-V3.'
)
_SEED = flags.DEFINE_integer('seed', 0, 'Of new indexers or random weights.')
_OVERRIDES = flags.DEFINE_string(
  'overrides', None, 'JSON object of fields in place of those of config.json.'
)
_PARAM_DTYPE = flags.DEFINE_enum(
  'param_dtype', None, ['float32', 'bfloat16'], "Of parameters; the file's."
)
_COMPUTE_DTYPE = flags.DEFINE_enum(
  'compute_dtype', None, ['float32', 'bfloat16'], "Of products; the file's."
)
_DTYPE = flags.DEFINE_enum(
  'dtype', None, list(hf_layout.DTYPES), "Of an export; the parameters' own."
)
_QUANTIZE = flags.DEFINE_enum(
  'quantize', None, ['fp8'], 'Write the matrices as FP8 with block scales.'
)
_MAX_SHARD_GB = flags.DEFINE_float('max_shard_gb', 5.0, 'Of an exported file.')
_TOKENIZER = flags.DEFINE_string(
  'tokenizer', None, "Directory of files to put beside an export; the source's."
)
_MESH = flags.DEFINE_string(
  'mesh', 'data=1', 'Axes with sizes: expert=2,tensor=2.'
)
_RULES = flags.DEFINE_enum(
  'mesh_rules', 'decode_expert', sorted(RULE_SETS), 'How the mesh is used.'
)


def main(argv: list[str]) -> None:
  del argv
  given = (_VERIFY.value, _SYNTHESIZE.value, _SOURCE.value)
  if sum(value is not None for value in given) != 1:
    raise ValueError(
      'expected --source with --target, --verify or --synthesize, one of them'
    )
  reading: dict[str, Any] = {
    'mtp': _MTP.value,
    'indexer': _INDEXER.value,
    'overrides': _overrides(),
  }
  if _VERIFY.value is not None:
    plan = checkpoints.check_hf(_VERIFY.value, **reading)
    print(
      f'{_VERIFY.value}: {plan.summary()}: every name, shape and dtype fits'
    )
  elif _SYNTHESIZE.value is not None:
    cfg = None if _PRESET.value is None else presets.get(_PRESET.value)
    with Display('synthesize') as display:
      synthetic.synthesize(
        _SYNTHESIZE.value,
        cfg,
        num_shards=_SHARDS.value,
        seed=_SEED.value,
        progress=display,
      )
  else:
    _convert(reading)


def _convert(reading: dict[str, Any]) -> None:
  source, target = _SOURCE.value, _TARGET.value
  assert source is not None
  if target is None:
    raise ValueError('target: expected --target beside --source')
  rules: Any = _RULES.value
  sizes: Any = {'data': 1} | request.parse_mesh(_MESH.value)
  parallel = mesh_lib.make_parallel(MeshConfig(rules=rules, **sizes))
  from_hf = conversion.is_hf(source)
  to = _TO.value or ('stage' if from_hf else 'hf')
  writing: dict[str, Any] = {
    'dtype': _DTYPE.value,
    'quantize': _QUANTIZE.value,
    'max_shard_bytes': int(_MAX_SHARD_GB.value * 1e9),
    'tokenizer': _TOKENIZER.value,
  }
  reading |= {'seed': _SEED.value, 'precision': _precision(source, from_hf)}
  with Display(to) as display:
    common: Any = {'parallel': parallel, 'progress': display}
    if from_hf and to == 'stage':
      conversion.hf_to_stage(source, target, **reading, **common)
    elif from_hf:
      conversion.hf_to_hf(source, target, **reading, **writing, **common)
    elif to == 'hf':
      conversion.stage_to_hf(source, target, **writing, **common)
    else:
      raise ValueError(
        f'source: {source} is no Hugging Face directory (no config.json), '
        'expected one for --to=stage'
      )


def _precision(source: str, from_hf: bool) -> Precision | None:
  if not from_hf or (_PARAM_DTYPE.value or _COMPUTE_DTYPE.value) is None:
    return None
  indexer: Any = _INDEXER.value
  plan = checkpoints.check_hf(source, indexer=indexer, overrides=_overrides())
  own = plan.cfg.precision
  return Precision(
    param=_PARAM_DTYPE.value or own.param,
    compute=_COMPUTE_DTYPE.value or own.compute,
    logits=own.logits,
  )


def _overrides() -> dict:
  if _OVERRIDES.value is None:
    return {}
  try:
    found = json.loads(_OVERRIDES.value)
  except ValueError as error:
    raise ValueError(f'overrides: not JSON ({error})') from None
  if not isinstance(found, dict):
    raise ValueError(f'overrides: got {found!r}, expected a JSON object')
  return found


if __name__ == '__main__':
  run_flags.run(main)
