r"""Continues a prompt with a trained or a downloaded model.

  python experiments/generate.py --prompt='def main(' \
    --checkpoint=runs/quick/stages/sparse_training --max_new_tokens=64
  python experiments/generate.py --checkpoint=path/to/hf_directory \
    --prompt_ids=5,6,7 --attention=dense

The checkpoint is the directory of a stage (WORKDIR/stages/NAME) or a Hugging
Face directory (config.json and safetensors). Each new token costs one pass over
that token alone: the rest is read from the latent and indexer-key caches.

On several devices: --mesh=expert=2,tensor=2 (docs/sharding.md).
"""

import pathlib
import sys
import time
from typing import Any

from absl import flags

from dsv32_jax import DENSE, SPARSE, checkpoints, data, inference
from dsv32_jax.config.training import MeshConfig
from dsv32_jax.sharding import mesh as mesh_lib
from dsv32_jax.sharding import parallel
from dsv32_jax.sharding.planning import request
from dsv32_jax.sharding.rules import RULE_SETS
from dsv32_jax.training import flags as run_flags

_CHECKPOINT = flags.DEFINE_string(
  'checkpoint', None, 'Stage or Hugging Face directory.', required=True
)
_PROMPT = flags.DEFINE_string('prompt', None, 'Text to continue.')
_PROMPT_IDS = flags.DEFINE_list(
  'prompt_ids', None, 'Token ids to continue; needs no tokenizer.'
)
_ATTENTION = flags.DEFINE_enum(
  'attention', 'sparse', ['dense', 'sparse'], 'What attention reads.'
)
_MAX_NEW_TOKENS = flags.DEFINE_integer('max_new_tokens', 64, 'At most.')
_TEMPERATURE = flags.DEFINE_float('temperature', 0.0, '0 is greedy.')
_TOP_K = flags.DEFINE_integer('top_k', None, 'Draw from the k most likely.')
_TOP_P = flags.DEFINE_float('top_p', 1.0, 'Draw from this much probability.')
_MIN_P = flags.DEFINE_float(
  'min_p', 0.0, "Draw from tokens of this share of the best one's probability."
)
_SAMPLES = flags.DEFINE_integer('samples', 1, 'Continuations to draw.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the first continuation.')
_TOKENIZER = flags.DEFINE_string(
  'tokenizer', None, "Directory of a tokenizer.json; the checkpoint's own if "
  'not given.'
)  # fmt: skip
_MESH = flags.DEFINE_string(
  'mesh', 'data=1', 'Axes with sizes: expert=2,tensor=2.'
)
_RULES = flags.DEFINE_enum(
  'mesh_rules', 'decode_expert', sorted(RULE_SETS), 'How the mesh is used.'
)
_IGNORE_EOS = flags.DEFINE_bool('ignore_eos', False, 'Go on after the end.')


def main(argv: list[str]) -> None:
  del argv
  rules: Any = _RULES.value
  sizes: Any = {'data': 1} | request.parse_mesh(_MESH.value)
  layout = mesh_lib.make_parallel(MeshConfig(rules=rules, **sizes))
  with parallel.use(layout):
    _generate(pathlib.Path(_CHECKPOINT.value), layout)


def _generate(path: pathlib.Path, layout: parallel.Parallel | None) -> None:
  is_hf = (path / 'config.json').is_file()
  model, variables = (
    checkpoints.load_hf(path, parallel=layout)
    if is_hf
    else checkpoints.load_stage(path, layout)
  )
  home = path if is_hf else path.absolute().parents[1] / 'tokenizer'
  if (_PROMPT.value is None) == (_PROMPT_IDS.value is None):
    raise ValueError('prompt: expected --prompt or --prompt_ids, one of them')
  tokenizer = None
  if _PROMPT.value is None:
    prompt, eos = [int(item) for item in _PROMPT_IDS.value or ()], ()
  else:
    tokenizer = data.load_tokenizer(str(_TOKENIZER.value or home))
    data.check_vocab(tokenizer, model.cfg.vocab_size)
    prompt, eos = tokenizer.encode(_PROMPT.value).tolist(), (tokenizer.eos_id,)
  model, variables = inference.unroll(model, variables)
  begin = time.perf_counter()
  new = inference.generate(
    model,
    variables,
    [prompt] * _SAMPLES.value,
    max_new_tokens=_MAX_NEW_TOKENS.value,
    sampling=inference.Sampling(
      temperature=_TEMPERATURE.value,
      top_k=_TOP_K.value,
      top_p=_TOP_P.value,
      min_p=_MIN_P.value,
    ),
    seeds=range(_SEED.value, _SEED.value + _SAMPLES.value),
    eos=() if _IGNORE_EOS.value else eos,
    attention=SPARSE if _ATTENTION.value == 'sparse' else DENSE,
  )
  seconds = time.perf_counter() - begin
  for sequence in new.sequences():
    if tokenizer is None:
      print(','.join(map(str, sequence)))
    else:
      print(f'{_PROMPT.value}{tokenizer.decode(sequence)}')
  print(
    f'{int(new.num_tokens_B.sum())} tokens in {seconds:.1f} s with compilation',
    file=sys.stderr,
  )


if __name__ == '__main__':
  run_flags.run(main)
