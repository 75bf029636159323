r"""Serves a model over the OpenAI API.

  python experiments/serve.py --checkpoint=runs/quick/stages/sparse_training
  python experiments/serve.py --checkpoint=path/to/hf_directory --port=8000
  python experiments/serve.py --preset=tiny --port=0

The checkpoint is the directory of a stage (WORKDIR/stages/NAME) or a Hugging
Face directory; a preset has random weights and is for trying the server out.
The address is printed when requests are taken. docs/serving.md has the fields,
limits and metrics; on several devices: --mesh=expert=2,tensor=2.
"""

import os
import pathlib
from typing import Any

from absl import flags

from dsv32_jax import DENSE, SPARSE, inference, serving
from dsv32_jax.config.training import MeshConfig
from dsv32_jax.serving import server
from dsv32_jax.sharding import mesh as mesh_lib
from dsv32_jax.sharding import parallel
from dsv32_jax.sharding.planning import request
from dsv32_jax.sharding.rules import RULE_SETS
from dsv32_jax.training import flags as run_flags

_CHECKPOINT = flags.DEFINE_string(
  'checkpoint', None, 'Stage or Hugging Face directory.'
)
_PRESET = flags.DEFINE_string('preset', None, 'Random weights of this preset.')
_TOKENIZER = flags.DEFINE_string(
  'tokenizer', None, "Directory of a tokenizer.json; the checkpoint's own if "
  'not given, bytes for a preset.'
)  # fmt: skip
_HOST = flags.DEFINE_string('host', '127.0.0.1', 'Address to listen at.')
_PORT = flags.DEFINE_integer('port', 8000, 'Port to listen at; 0 is any.')
_API_KEY = flags.DEFINE_string(
  'api_key', None, 'Key that clients must bring; better in the environment '
  'variable DSV32_API_KEY, as others can read a command line.'
)  # fmt: skip
_NAME = flags.DEFINE_string(
  'model_name', None, "In the API; the directory's or preset's if not given."
)
_MAX_BATCH = flags.DEFINE_integer('max_batch', 8, 'Requests that run together.')
_MAX_WAITING = flags.DEFINE_integer('max_waiting', 256, 'Requests that wait.')
_MAX_TOKENS = flags.DEFINE_integer(
  'max_tokens', None, "Longest prompt and answer; the model's if not given."
)
_DEFAULT_MAX_TOKENS = flags.DEFINE_integer(
  'default_max_tokens', 4096, 'Longest answer if the request does not say.'
)
_PAGE_SIZE = flags.DEFINE_integer('page_size', 64, 'Tokens a cache page holds.')
_NUM_PAGES = flags.DEFINE_integer(
  'num_pages', None, 'Cache pages; enough for max_batch of the longest '
  'requests if not given.'
)  # fmt: skip
_PREFILL_CHUNK = flags.DEFINE_integer(
  'prefill_chunk', 512, 'Tokens of a prompt that run at a time.'
)
_DECODE_STEPS = flags.DEFINE_integer(
  'decode_steps', 4, 'Decode steps between two looks at the queue.'
)
_LATENT_FORMAT = flags.DEFINE_enum(
  'latent_format', 'compute', ['compute', 'fp8'], 'Of cached latent rows.'
)
_INDEX_FORMAT = flags.DEFINE_enum(
  'index_format', 'compute', ['compute', 'fp8'], 'Of cached indexer keys.'
)
_WEIGHTS = flags.DEFINE_enum(
  'weights', 'compute', ['compute', 'fp8'], 'Whether to keep and multiply the '
  'float8 matrices of a Hugging Face checkpoint as they are.'
)  # fmt: skip
_MASKED_PREFILL = flags.DEFINE_integer(
  'masked_prefill', 0, 'Prompts up to this length run in MHA mode.'
)
_SPECULATIVE = flags.DEFINE_bool('speculative', False, 'Draft with MTP.')
_ATTENTION = flags.DEFINE_enum(
  'attention', 'sparse', ['dense', 'sparse'], 'What attention reads.'
)
_SHUTDOWN_SECONDS = flags.DEFINE_float(
  'shutdown_seconds', 30.0, 'How long requests may go on after a signal.'
)
_WARM_UP = flags.DEFINE_bool(
  'warm_up', True, 'Compile before requests are taken.'
)
_MESH = flags.DEFINE_string(
  'mesh', 'data=1', 'Axes with sizes: expert=2,tensor=2.'
)
_RULES = flags.DEFINE_enum(
  'mesh_rules', 'decode_expert', sorted(RULE_SETS), 'How the mesh is used.'
)


def main(argv: list[str]) -> None:
  del argv
  # Before anything is loaded: what can't be is said at once.
  config, settings = _engine_config(), _settings()
  listener = server.bind(_HOST.value, _PORT.value)
  rules: Any = _RULES.value
  weights: Any = _WEIGHTS.value
  sizes: Any = {'data': 1} | request.parse_mesh(_MESH.value)
  with parallel.use(mesh_lib.make_parallel(MeshConfig(rules=rules, **sizes))):
    loaded = serving.load(
      checkpoint=_CHECKPOINT.value,
      preset=_PRESET.value,
      tokenizer=_TOKENIZER.value,
      weights=weights,
    )
    engine = inference.Engine(
      loaded.model, loaded.variables, config, tokenizer=loaded.tokenizer
    )
  if _WARM_UP.value:
    serving.warm_up(engine)
  with inference.EngineThread(engine) as running:
    service = serving.Service(running, loaded.tokenizer, settings)
    line = f'{settings.model}: {server.address(listener)}/v1'
    serving.serve(service, listener, on_ready=lambda: print(line, flush=True))


def _settings() -> serving.Settings:
  source = (
    _PRESET.value or pathlib.Path(_CHECKPOINT.value or '').absolute().name
  )
  return serving.Settings(
    model=_NAME.value or source,
    api_key=_API_KEY.value or os.environ.get('DSV32_API_KEY') or None,
    default_max_tokens=_DEFAULT_MAX_TOKENS.value,
    shutdown_seconds=_SHUTDOWN_SECONDS.value,
  )


def _engine_config() -> inference.EngineConfig:
  return inference.EngineConfig(
    max_batch=_MAX_BATCH.value,
    max_waiting=_MAX_WAITING.value,
    page_size=_PAGE_SIZE.value,
    num_pages=_NUM_PAGES.value,
    max_tokens=_MAX_TOKENS.value,
    prefill_chunk=_PREFILL_CHUNK.value,
    decode_steps=_DECODE_STEPS.value,
    latent_format=_LATENT_FORMAT.value,
    index_format=_INDEX_FORMAT.value,
    speculative=_SPECULATIVE.value,
    masked_prefill=_MASKED_PREFILL.value,
    attention=SPARSE if _ATTENTION.value == 'sparse' else DENSE,
  )


if __name__ == '__main__':
  run_flags.run(main)
