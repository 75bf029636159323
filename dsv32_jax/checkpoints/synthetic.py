"""Checkpoints of the published layout with random weights of any width.

For tests, rehearsals and measurements of everything that reads a checkpoint:
every name of the published one, its dtypes, its shards (spec section 7), and
what is awkward about it: block scales in another shard than their weight, edge
blocks, the MTP layer with its copies at the end.
"""

import dataclasses
import json
import os
import pathlib
import shutil

import numpy as np

from dsv32_jax.checkpoints import hf_files, hf_layout, hf_mapping, integrity
from dsv32_jax.checkpoints.hf_layout import Entry, Quantize, Shard
from dsv32_jax.checkpoints.transfer_progress import Progress
from dsv32_jax.config import presets
from dsv32_jax.config.model import ModelConfig

PUBLISHED_SHARDS = 163
_MTP_SHARDS = 3


def reduced() -> ModelConfig:
  """V3.2 with all its layers and experts, and narrow.

  Few dims are multiples of 128, so most matrices end in edge blocks.
  """
  return dataclasses.replace(
    presets.deepseek_v32_671b(),
    vocab_size=300,
    hidden_size=136,
    num_attention_heads=4,
    q_lora_rank=72,
    kv_lora_rank=40,
    qk_nope_head_dim=24,
    qk_rope_head_dim=8,
    v_head_dim=40,
    intermediate_size=144,
    moe_intermediate_size=24,
    index_n_heads=4,
    index_head_dim=32,
    index_topk=32,
  )


def synthesize(
  path: str | os.PathLike,
  cfg: ModelConfig | None = None,
  *,
  num_shards: int = PUBLISHED_SHARDS,
  quantize: Quantize | None = 'fp8',
  seed: int = 0,
  progress: Progress | None = None,
) -> None:
  """Writes a checkpoint with random weights.

  Example:
    >>> import tempfile
    >>> from dsv32_jax.checkpoints import check_hf
    >>> path = pathlib.Path(tempfile.mkdtemp()) / 'tiny'
    >>> synthesize(path, presets.tiny(), num_shards=5)
    >>> len(check_hf(path).stored)
    242

  Args:
    path: directory to make.
    cfg: the model; None for `reduced`.
    num_shards: files.
    quantize: 'fp8' for the published dtypes, None for bfloat16 matrices.
    seed: of the weights.
    progress: called with bytes done, bytes in all, and the shard.

  Raises:
    ValueError: the path exists, or there are too few tensors for the shards.
  """
  target = pathlib.Path(path).absolute()
  cfg = reduced() if cfg is None else cfg
  if target.exists():
    raise ValueError(f'{target}: exists, expected the path of a new directory')
  groups = _groups(cfg, num_shards, quantize)
  shards = [
    hf_layout.shard(
      f'model-{number:05d}-of-{num_shards:06d}.safetensors', entries
    )
    for number, entries in enumerate(groups, start=1)
  ]
  total = sum(shard.num_bytes for shard in shards)
  partial = target.with_name(f'{target.name}.partial')
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  rng = np.random.default_rng(seed)
  originals: dict[str, np.ndarray] = {}
  done = 0
  for shard in shards:
    data = _random(cfg, shard, rng, originals)
    with open(partial / shard.name, 'wb') as file:
      file.write(shard.header)
      file.write(data)
    done += shard.num_bytes
    if progress is not None:
      progress(done, total, shard.name)
  config = hf_layout.config_json(cfg, dtype='bfloat16', quantize=quantize)
  for name, content in (
    (hf_files.INDEX, hf_layout.index(shards)),
    ('config.json', config),
  ):
    integrity.write_atomically(partial / name, json.dumps(content, indent=1))
  os.rename(partial, target)


def _groups(
  cfg: ModelConfig, num_shards: int, quantize: Quantize | None
) -> list[list[Entry]]:
  """The tensors of every shard, as the published files have them."""
  prefix = hf_mapping.mtp_prefix(cfg)
  body: list[Entry] = []
  last: list[Entry] = []
  mtp: list[Entry] = []
  extras: list[Entry] = []
  for group in hf_layout.entries(cfg, {}, 'published', quantize):
    name = group[0].name
    if name in ('lm_head.weight', 'model.norm.weight'):
      last += group
    elif not name.startswith(prefix):
      body += group
    elif name.removeprefix(prefix).startswith(
      ('enorm', 'hnorm', 'eh_proj', 'shared_head', 'embed_tokens')
    ):
      extras += group
    else:
      mtp += group
  count = sum(map(len, (body, mtp, extras, last)))
  if not 1 <= num_shards <= count // 2:
    raise ValueError(
      f'num_shards: got {num_shards} for {count} tensors, expected 1 to '
      f'{count // 2}'
    )
  own = _MTP_SHARDS if mtp and num_shards > _MTP_SHARDS else 0
  if not own:
    return _cut(body + mtp + extras + last, num_shards)
  groups = _cut(body, num_shards - own)
  groups[-1] += last
  groups += _cut(mtp, own)
  groups[-1] += extras
  return groups


def _cut(entries: list[Entry], count: int) -> list[list[Entry]]:
  """Parts of about equal size; each cut parts a weight from its scales."""
  total = sum(entry.num_bytes for entry in entries)
  has_scales = any(entry.is_scale for entry in entries)
  parts: list[list[Entry]] = [[]]
  size = 0
  for position, entry in enumerate(entries):
    left = len(entries) - position
    due = size >= total * len(parts) / count
    may_cut = entry.is_scale or not has_scales
    must = left == count - len(parts)
    if parts[-1] and len(parts) < count and ((due and may_cut) or must):
      parts.append([])
    parts[-1].append(entry)
    size += entry.num_bytes
  return parts


def _random(
  cfg: ModelConfig,
  shard: Shard,
  rng: np.random.Generator,
  originals: dict[str, np.ndarray],
) -> np.ndarray:
  """The bytes of a shard's tensors: small finite numbers."""
  size = shard.num_bytes - len(shard.header)
  data = np.frombuffer(bytearray(rng.bytes(size)), np.uint8)
  # Wide types come first: three stretches of one type each.
  ends = {'F32': 0, 'BF16': 0, 'F8_E4M3': 0}
  for entry in shard.entries:
    ends[entry.dtype] += entry.num_bytes
  float_end = ends['F32']
  bfloat_end = float_end + ends['BF16']
  bits = data[:float_end].view(np.uint32)
  # Powers of two from 2^-6 to 2^-3.
  bits[:] = (121 + (bits & 3)) << 23
  bits = data[float_end:bfloat_end].view(np.uint16)
  # Any sign and mantissa, exponent -6.
  bits[:] = (bits & 0x807F) | (121 << 7)
  # Below 2: neither NaN nor saturated.
  data[bfloat_end:] &= 0xBF
  for entry, offset in zip(shard.entries, shard.offsets, strict=True):
    begin = offset - len(shard.header)
    own = data[begin : begin + entry.num_bytes]
    if entry.dtype == 'F32' and not entry.is_scale:
      center = 0.0 if entry.name.endswith('bias') else 1.0
      noise = rng.normal(center, 0.1, entry.shape).astype(np.float32)
      own[:] = noise.view(np.uint8)
    if not entry.tensor.targets:
      own[:] = originals[hf_mapping.original_name(cfg, entry.name)]
    elif entry.name in ('model.embed_tokens.weight', 'lm_head.weight'):
      originals[entry.name] = own.copy()
  return data
