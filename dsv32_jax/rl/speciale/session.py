"""A policy and a protocol from what a command line says."""

import pathlib
from collections.abc import Mapping
from typing import Any

from dsv32_jax import checkpoints, data
from dsv32_jax.chat import Mode
from dsv32_jax.inference.engine import Engine
from dsv32_jax.inference.engine_config import EngineConfig
from dsv32_jax.inference.sampling import Sampling
from dsv32_jax.rl.speciale.endpoint import EndpointPolicy
from dsv32_jax.rl.speciale.labels import LabelConfig
from dsv32_jax.rl.speciale.policy import EnginePolicy, Policy
from dsv32_jax.rl.speciale.protocols import ProtocolConfig
from dsv32_jax.rl.speciale.refinement import RefineConfig, SearchConfig
from dsv32_jax.rl.speciale.selection import Contest

_PARTS = {
  'refine': RefineConfig,
  'search': SearchConfig,
  'contest': Contest,
  'label': LabelConfig,
}
_MOST_REQUESTS = 65536


def protocol_config(values: Mapping[str, Any]) -> ProtocolConfig:
  """A configuration from nested dicts.

  Raises:
    ValueError: naming the field that does not fit.
  """
  parts: dict[str, Any] = {
    name: kind(**values[name]) for name, kind in _PARTS.items()
  }
  return ProtocolConfig(**(dict(values) | parts))


def make_policy(
  *,
  checkpoint: str | None,
  base_url: str | None,
  model: str,
  mode: Mode,
  max_new_tokens: int,
  parallel: int,
  temperature: float,
  top_p: float,
  api_key: str | None = None,
) -> Policy:
  """A model of ours, or an endpoint.

  Args:
    checkpoint: directory of a stage or of an RL run, with a tokenizer in it or
      above it.
    base_url: of the endpoint.
    model: its name there.
    mode: of replies.
    max_new_tokens: of a reply.
    parallel: replies at a time.
    temperature: of the draws.
    top_p: of the draws.
    api_key: for the endpoint.

  Raises:
    ValueError: neither or both are given, or there is no tokenizer.
  """
  if (checkpoint is None) == (base_url is None):
    raise ValueError(
      f'checkpoint: got {checkpoint!r} and base_url {base_url!r}, expected one '
      'of them'
    )
  if base_url is not None:
    return EndpointPolicy(
      base_url,
      model,
      api_key=api_key,
      max_new_tokens=max_new_tokens,
      temperature=temperature,
      top_p=top_p,
      parallel=parallel,
    )
  path = pathlib.Path(str(checkpoint)).absolute()
  tokenizer = data.load_tokenizer(str(_tokenizer_of(path)))
  network, variables = checkpoints.load_stage(path)
  data.check_vocab(tokenizer, network.cfg.vocab_size)
  engine = Engine(
    network,
    variables,
    EngineConfig(
      max_batch=parallel,
      max_waiting=_MOST_REQUESTS,
      page_size=16,
      prefill_rows=parallel,
      prefill_chunk=64,
      decode_steps=16,
      fill_first=True,
    ),
  )
  return EnginePolicy(
    engine,
    tokenizer,
    mode=mode,
    max_new_tokens=max_new_tokens,
    sampling=Sampling(temperature=temperature, top_p=top_p),
  )


def _tokenizer_of(path: pathlib.Path) -> pathlib.Path:
  for folder in (path, *path.parents):
    if (folder / 'tokenizer').is_dir():
      return folder / 'tokenizer'
  raise ValueError(
    f'checkpoint: found no tokenizer/ in {path} or above it, expected the '
    'directory of a stage or of an RL run'
  )
