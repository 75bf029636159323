"""Reads a Hugging Face checkpoint directory into a model and its variables.

Names, shapes and types are checked against the model before any weight is
read, so a wrong file is refused in seconds and with a list of what is wrong.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from dsv32_jax.checkpoints import hf_mapping, hf_table
from dsv32_jax.config import presets
from dsv32_jax.config.model import ModelConfig
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.sharding import parallel as parallel_lib
from dsv32_jax.sharding import specs
from dsv32_jax.sharding.parallel import Parallel

_DTYPES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}
_MAX_LISTED = 5


@dataclasses.dataclass(frozen=True)
class _Stored:
  """What a file's header says of one tensor."""

  file: pathlib.Path
  shape: tuple[int, ...]
  dtype: str


def load_hf(
  path: str | os.PathLike,
  *,
  scan_layers: bool = True,
  mtp: bool | None = None,
  parallel: Parallel | None = None,
) -> tuple[DeepSeekV32, dict]:
  """Loads an unquantised DeepSeek-V3.2 checkpoint.

  Experts may be stored one tensor each (the published layout) or fused, in one
  file or in shards with an index.

  Example:
    >>> from dsv32_jax import checkpoints
    >>> model, variables = checkpoints.load_hf('tests/fixtures/hf_tiny_v32')
    >>> tokens_BT = np.zeros((1, 4), np.int32)
    >>> model.apply(variables, tokens_BT).logits_BTV.shape
    (1, 4, 128)

  Args:
    path: directory with config.json and safetensors files.
    scan_layers: layout of the variables; False for decoding with a cache.
    mtp: load the multi-token prediction layer; None loads it if both the
      config and the files have one. Its tensors are skipped otherwise.
    parallel: lays the variables out; each device gets its own part of each.

  Returns:
    The model, computing in the checkpoint's dtype, and {'params': ...,
    'router_bias': ...} without partitioning boxes.

  Raises:
    FileNotFoundError: no such directory, config.json or shard.
    ValueError: quantised tensors, an unreadable file, or tensors that are
      missing, not known or of another shape than the config's (with both
      shapes).
  """
  root = pathlib.Path(path)
  raw = _read_json(root / 'config.json')
  if raw.get('quantization_config'):
    raise _quantised(root, 'config.json has a quantization_config')
  stored = _headers(root)
  cfg = _config(raw, stored, scan_layers=scan_layers, mtp=mtp)
  fused = any('.mlp.experts.gate_up_proj' in name for name in stored)
  wanted = list(hf_mapping.tensors(cfg, fused_experts=fused))
  _check(root, cfg, wanted, stored)
  model = DeepSeekV32(cfg)
  return model, _read(model, wanted, stored, parallel)


def _read_json(path: pathlib.Path) -> dict:
  if not path.is_file():
    raise FileNotFoundError(
      f'{path}: no such file; expected a Hugging Face checkpoint directory'
    )
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{path}: not JSON ({error})') from None


def _headers(root: pathlib.Path) -> dict[str, _Stored]:
  """Name, shape and dtype of every tensor of the directory."""
  index = root / 'model.safetensors.index.json'
  if index.is_file():
    names = sorted(set(_read_json(index).get('weight_map', {}).values()))
    files = [root / name for name in names]
  else:
    files = sorted(root.glob('*.safetensors'))
  if not files:
    raise FileNotFoundError(f'{root}: no safetensors file')
  stored = {}
  for file in files:
    if not file.is_file():
      raise FileNotFoundError(f'{file}: shard named in {index.name} is missing')
    with _open(file) as reader:
      for name in reader.keys():
        view = reader.get_slice(name)
        stored[name] = _Stored(file, tuple(view.get_shape()), view.get_dtype())
  return stored


@contextlib.contextmanager
def _open(file: pathlib.Path):
  try:
    with safetensors.safe_open(file, framework='numpy') as reader:
      yield reader
  except safetensors.SafetensorError as error:
    raise ValueError(f'{file}: not a whole safetensors file: {error}') from None


def _config(
  raw: dict, stored: dict[str, _Stored], *, scan_layers: bool, mtp: bool | None
) -> ModelConfig:
  """The model of config.json, its MTP module and dtype settled by the files."""
  if not (raw.get('dtype') or raw.get('torch_dtype')):
    embedding = stored.get('model.embed_tokens.weight')
    if embedding is not None and embedding.dtype in _DTYPES:
      raw = {**raw, 'dtype': _DTYPES[embedding.dtype]}
  cfg = presets.from_hf_json(raw)
  prefix = hf_mapping.mtp_prefix(cfg)
  has_mtp = any(name.startswith(prefix) for name in stored)
  if mtp is None:
    mtp = has_mtp and cfg.num_nextn_predict_layers > 0
  elif mtp and not has_mtp:
    raise ValueError(f'mtp: got True, but no tensor is named {prefix}*')
  return dataclasses.replace(
    cfg, scan_layers=scan_layers, num_nextn_predict_layers=int(mtp)
  )


def _check(
  root: pathlib.Path,
  cfg: ModelConfig,
  wanted: list[hf_mapping.Tensor],
  stored: dict[str, _Stored],
) -> None:
  """Refuses files that do not hold exactly this model."""
  for name, found in stored.items():
    if found.dtype.startswith('F8') or name.endswith('_scale_inv'):
      raise _quantised(root, f'{name} is {found.dtype}')
    if found.dtype not in _DTYPES:
      raise ValueError(
        f'{found.file}: {name} has dtype {found.dtype}, expected one of '
        f'{sorted(_DTYPES)}'
      )
  names = {tensor.name for tensor in wanted}
  skipped = ()
  if not cfg.num_nextn_predict_layers:
    skipped = (hf_mapping.mtp_prefix(cfg),)
  problems = [
    ('missing', sorted(names - set(stored))),
    (
      'not part of the model',
      sorted(
        name
        for name in set(stored) - names
        if not (skipped and name.startswith(skipped))
      ),
    ),
    (
      'of another shape',
      [
        f'{tensor.name} {stored[tensor.name].shape} in the file, '
        f'{tensor.shape} in the model'
        for tensor in wanted
        if tensor.name in stored and stored[tensor.name].shape != tensor.shape
      ],
    ),
  ]
  lines = [
    f'{len(items)} tensors {what}: {"; ".join(items[:_MAX_LISTED])}'
    + ('; ...' if len(items) > _MAX_LISTED else '')
    for what, items in problems
    if items
  ]
  if lines:
    raise ValueError(f'{root}: ' + '. '.join(lines))


def _read(
  model: DeepSeekV32,
  wanted: list[hf_mapping.Tensor],
  stored: dict[str, _Stored],
  parallel: Parallel | None,
) -> dict:
  """Fills the model's variables, a file at a time."""
  shapes = variable_shapes(model, parallel)
  variables = jax.tree.map(
    lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes
  )
  by_file: dict[pathlib.Path, list[hf_mapping.Tensor]] = {}
  for tensor in wanted:
    if tensor.targets:
      by_file.setdefault(stored[tensor.name].file, []).append(tensor)
  for file, tensors in by_file.items():
    with _open(file) as reader:
      for tensor in tensors:
        parts = tensor.split(reader.get_tensor(tensor.name))
        for target, part in zip(tensor.targets, parts, strict=True):
          leaf = variables
          for key in target.path:
            leaf = leaf[key]
          leaf[target.index] = part
  if parallel is None:
    return jax.tree.map(jnp.asarray, variables)
  return jax.tree.map(
    lambda leaf, shape: jax.device_put(leaf, shape.sharding), variables, shapes
  )


def variable_shapes(
  model: DeepSeekV32, parallel: Parallel | None = None
) -> dict[str, Any]:
  """Shape, dtype and sharding of every variable, without making one."""
  with parallel_lib.use(None):
    boxed = jax.eval_shape(
      model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    )
  variables = dict(specs.with_shardings(boxed, parallel))
  variables.setdefault(hf_table.ROUTER_BIAS, {})
  return variables


def _quantised(root: pathlib.Path, why: str) -> ValueError:
  return ValueError(
    f'{root}: {why}; expected an unquantised checkpoint (float32, bfloat16 or '
    'float16 tensors without scales)'
  )
