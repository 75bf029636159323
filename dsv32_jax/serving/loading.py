"""A model with its tokenizer, from wherever it may come."""

import dataclasses
import pathlib
from typing import Literal

import jax
import jax.numpy as jnp

from dsv32_jax import checkpoints, data
from dsv32_jax.config import presets
from dsv32_jax.data.tokenizer import ByteTokenizer, Tokenizer
from dsv32_jax.inference.engine import Engine
from dsv32_jax.inference.fp8_weights import prepare_fp8
from dsv32_jax.inference.requests import Request
from dsv32_jax.inference.unroll import unroll
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.sharding import parallel

Weights = Literal['compute', 'fp8']


@dataclasses.dataclass(frozen=True)
class Loaded:
  """What an engine needs.

  Attributes:
    model: the model.
    variables: its variables.
    tokenizer: its tokenizer.
  """

  model: DeepSeekV32
  variables: dict
  tokenizer: Tokenizer


def load(
  *,
  checkpoint: str | None = None,
  preset: str | None = None,
  tokenizer: str | None = None,
  weights: Weights = 'compute',
  seed: int = 0,
) -> Loaded:
  """Loads a checkpoint, or makes a preset with random weights.

  Args:
    checkpoint: the directory of a stage (WORKDIR/stages/NAME) or of a Hugging
      Face model (config.json and safetensors).
    preset: name of a preset, for trying the server out.
    tokenizer: directory of a tokenizer.json; None takes the checkpoint's own,
      and bytes for a preset.
    weights: 'fp8' keeps the float8 matrices of a Hugging Face checkpoint and
      multiplies in FP8 (`inference.prepare_fp8`); 'compute' takes the compute
      precision.
    seed: of random weights.

  Raises:
    ValueError: neither or both are given, the tokenizer has more ids than the
      model, or there are no float8 matrices to keep.
  """
  if (checkpoint is None) == (preset is None):
    raise ValueError(
      f'checkpoint: got {checkpoint!r} and preset {preset!r}, expected one of '
      'them'
    )
  path = None if checkpoint is None else pathlib.Path(checkpoint)
  is_hf = path is not None and (path / 'config.json').is_file()
  if weights == 'fp8' and not is_hf:
    raise ValueError(
      f"weights: got 'fp8' for {checkpoint or preset}, expected it with a "
      'Hugging Face checkpoint only'
    )
  # Before the weights, which may take minutes.
  folder = tokenizer
  if folder is None and path is not None:
    home = path if is_hf else path.absolute().parents[1] / 'tokenizer'
    folder = str(home)
  found: Tokenizer = ByteTokenizer()
  if folder is not None:
    found = data.load_tokenizer(folder)
  if path is None:
    model = DeepSeekV32(presets.get(str(preset)))
    init = jax.jit(model.init)
    variables = init(jax.random.key(seed), jnp.zeros((1, 8), jnp.int32))
  elif is_hf:
    model, variables = _load_hf(path, weights)
  else:
    model, variables = checkpoints.load_stage(path, parallel.active())
  data.check_vocab(found, model.cfg.vocab_size)
  return Loaded(model, variables, found)


def _load_hf(path: pathlib.Path, weights: Weights) -> tuple[DeepSeekV32, dict]:
  layout = parallel.active()
  if weights == 'compute':
    return checkpoints.load_hf(path, parallel=layout)
  model, variables = unroll(
    *checkpoints.load_hf(path, parallel=layout, quantized='keep')
  )
  dtype = jnp.dtype(model.cfg.precision.compute)
  return model, prepare_fp8(variables, dtype=dtype)


def warm_up(engine: Engine) -> None:
  """Runs a short and a longer prompt, so that no client waits for compilation.

  Programs for other widths of prompts and caches, and for the likeliest tokens,
  are still compiled when they are first needed.
  """
  new = min(engine.config.decode_steps + 2, engine.max_tokens - 1)
  longer = min(engine.config.prefill_chunk, engine.max_tokens - new)
  for size in sorted({1, longer}):
    # One after the other: the queue may be as short as it likes.
    engine.submit(Request(prompt=(0,) * size, max_new_tokens=new))
    engine.run()
