"""What an exported checkpoint looks like: its shards, its index, its config."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

from dsv32_jax.checkpoints import hf_files, hf_mapping
from dsv32_jax.checkpoints.hf_pieces import BLOCK
from dsv32_jax.config.model import ModelConfig

Quantize = Literal['fp8']

_NAMES = {'float32': 'F32', 'bfloat16': 'BF16', 'float16': 'F16'}
DTYPES = (*_NAMES, 'published')
# Fields of ours that transformers does not know: written only if they matter.
_OWN = ('index_hadamard', 'indexer_rope_interleave', 'balance_loss_alpha')
_NOT_WRITTEN = ('precision', 'scan_layers', 'remat', 'query_chunk')


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
  """One tensor of the export.

  Attributes:
    name: in the file.
    shape: in the file.
    dtype: in the format's spelling.
    tensor: of the mapping, whose parameters it is made of.
    is_scale: its block scales, not its values.
  """

  name: str
  shape: tuple[int, ...]
  dtype: str
  tensor: hf_mapping.Tensor
  is_scale: bool = False

  @property
  def num_bytes(self) -> int:
    return math.prod(self.shape) * hf_files.item_bytes(self.dtype)


@dataclasses.dataclass(frozen=True)
class Shard:
  """One file of the export.

  Attributes:
    name: of the file.
    entries: weights in the order of the layers, each followed by its scales.
    offsets: of each entry's first byte in the file.
    header: what stands before the first byte.
  """

  name: str
  entries: tuple[Entry, ...]
  offsets: tuple[int, ...]
  header: bytes

  @property
  def num_bytes(self) -> int:
    return len(self.header) + sum(entry.num_bytes for entry in self.entries)


def shards(
  cfg: ModelConfig,
  own_dtypes: Mapping[tuple[str, ...], np.dtype],
  *,
  dtype: str | None,
  quantize: Quantize | None,
  max_shard_bytes: int,
) -> list[Shard]:
  """Lays the tensors of a model out over files.

  Args:
    cfg: the model.
    own_dtypes: of the parameters, by path.
    dtype: see `save_hf`.
    quantize: see `save_hf`.
    max_shard_bytes: of a file, unless one tensor alone is larger.

  Returns:
    The files, their tensors in the order of the layers.
  """
  groups: list[list[Entry]] = [[]]
  size = 0
  for group in entries(cfg, own_dtypes, dtype, quantize):
    count = sum(entry.num_bytes for entry in group)
    if groups[-1] and size + count > max_shard_bytes:
      groups.append([])
      size = 0
    groups[-1] += group
    size += count
  names = ['model.safetensors']
  if len(groups) > 1:
    names = [
      f'model-{number:05d}-of-{len(groups):06d}.safetensors'
      for number in range(1, len(groups) + 1)
    ]
  return [shard(name, group) for name, group in zip(names, groups, strict=True)]


def shard(name: str, content: list[Entry]) -> Shard:
  """A file of these tensors; wide types first, so that all are aligned."""
  order = sorted(content, key=lambda entry: -hf_files.item_bytes(entry.dtype))
  described: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  begin = {}
  position = 0
  for entry in order:
    begin[entry.name] = position
    described[entry.name] = {
      'dtype': entry.dtype,
      'shape': list(entry.shape),
      'data_offsets': [position, position + entry.num_bytes],
    }
    position += entry.num_bytes
  text = json.dumps(described, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  header = len(text).to_bytes(8, 'little') + text
  return Shard(
    name=name,
    entries=tuple(content),
    offsets=tuple(len(header) + begin[entry.name] for entry in content),
    header=header,
  )


def entries(
  cfg: ModelConfig,
  own_dtypes: Mapping[tuple[str, ...], np.dtype],
  dtype: str | None,
  quantize: Quantize | None,
) -> Iterator[list[Entry]]:
  """Every tensor, with its scales if it has any."""
  for tensor in hf_mapping.tensors(cfg):
    if quantize and tensor.fp8:
      scale = hf_mapping.scale_name(tensor)
      yield [
        Entry(tensor.name, tensor.shape, 'F8_E4M3', tensor),
        Entry(scale, hf_mapping.scale_shape(tensor), 'F32', tensor, True),
      ]
      continue
    if dtype == 'published':
      found = 'F32' if tensor.fp32 else 'BF16'
    elif dtype is not None:
      found = _NAMES[dtype]
    else:
      source = original(cfg, tensor)
      found = _NAMES[own_dtypes[source.targets[0].path].name]
    yield [Entry(tensor.name, tensor.shape, found, tensor)]


def original(cfg: ModelConfig, tensor: hf_mapping.Tensor) -> hf_mapping.Tensor:
  """The tensor itself, or the one that it is a copy of."""
  if tensor.targets:
    return tensor
  name = hf_mapping.original_name(cfg, tensor.name)
  return next(t for t in hf_mapping.shared(cfg) if t.name == name)


def index(files: list[Shard]) -> dict:
  """The content of model.safetensors.index.json."""
  return {
    'metadata': {
      'total_size': sum(e.num_bytes for file in files for e in file.entries)
    },
    'weight_map': {
      entry.name: file.name for file in files for entry in file.entries
    },
  }


def config_json(
  cfg: ModelConfig, *, dtype: str, quantize: Quantize | None
) -> dict:
  """The content of config.json, in the spelling of the published file.

  Args:
    cfg: the model.
    dtype: what it computes in.
    quantize: whether matrices are FP8.
  """
  has_indexer = cfg.q_lora_rank is not None
  kind = ('DeepseekV32', 'deepseek_v32')
  if not has_indexer:
    kind = ('DeepseekV3', 'deepseek_v3')
  raw: dict[str, Any] = {
    'architectures': [f'{kind[0]}ForCausalLM'],
    'model_type': kind[1],
    'attention_bias': False,
    'hidden_act': 'silu',
    'moe_layer_freq': 1,
    'ep_size': 1,
    'num_key_value_heads': cfg.num_attention_heads,
    'torch_dtype': dtype,
  }
  defaults = {
    field.name: field.default for field in dataclasses.fields(ModelConfig)
  }
  for name in defaults:
    value = getattr(cfg, name)
    if name in _NOT_WRITTEN or (name in _OWN and value == defaults[name]):
      continue
    if name == 'rope_scaling' and value is not None:
      value = {
        'type' if key == 'rope_type' else key: item
        for key, item in dataclasses.asdict(value).items()
      }
    raw[name] = value
  if quantize:
    raw['quantization_config'] = {
      'activation_scheme': 'dynamic',
      'fmt': 'e4m3',
      'quant_method': 'fp8',
      'scale_fmt': 'ue8m0',
      'weight_block_size': [BLOCK, BLOCK],
    }
  return raw
