"""Checks a Hugging Face checkpoint against the model, from headers alone.

Names, shapes and types are compared before any weight is read, so a wrong file
is refused in seconds and with a list of what is wrong.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from dsv32_jax.checkpoints import hf_files, hf_mapping
from dsv32_jax.checkpoints.hf_files import Stored
from dsv32_jax.checkpoints.hf_pieces import BLOCK
from dsv32_jax.config import presets
from dsv32_jax.config.model import ModelConfig, Precision

Indexer = Literal['load', 'init']

_CONFIG = 'config.json'
_DTYPE_NAMES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}
_SCALE_DTYPES = ('F32', 'BF16', 'F8_E8M0')
_INDEXER = '.self_attn.indexer.'
# A DeepSeek-V3 file says nothing of an indexer; these are V3.2's.
_INDEXER_SIZES = {
  'index_n_heads': 64,
  'index_head_dim': 128,
  'index_topk': 2048,
}
_MAX_LISTED = 5


@dataclasses.dataclass(frozen=True)
class Plan:
  """A checkpoint that was found to hold a model.

  Attributes:
    root: its directory.
    cfg: the model.
    stored: every tensor of the files.
    wanted: the tensors that feed parameters.
    copies: (copy, original) names of tensors that the model shares and the
      files hold twice.
    new_indexers: the indexers are not in the files.
    ue8m0: config.json says that every scale is a power of two.
  """

  root: pathlib.Path
  cfg: ModelConfig
  stored: dict[str, Stored]
  wanted: tuple[hf_mapping.Tensor, ...]
  copies: tuple[tuple[str, str], ...]
  new_indexers: bool
  ue8m0: bool

  def is_fp8(self, tensor: hf_mapping.Tensor) -> bool:
    return self.stored[tensor.name].dtype == 'F8_E4M3'

  def summary(self) -> str:
    """One line on what the files hold."""
    stored = self.stored.values()
    total = sum(entry.num_bytes for entry in stored)
    quantised = sum(entry.dtype == 'F8_E4M3' for entry in stored)
    parts = [
      f'{len(self.stored):,} tensors in '
      f'{len({entry.file for entry in stored}):,} files, {total / 1e9:,.2f} GB',
      f'{quantised:,} of them FP8 with block scales' if quantised else 'no FP8',
      'with' if self.cfg.num_nextn_predict_layers else 'without',
    ]
    text = f'{parts[0]}, {parts[1]}, {parts[2]} MTP'
    return text + (', without indexers' if self.new_indexers else '')


def check(
  path: str | os.PathLike,
  *,
  scan_layers: bool = True,
  mtp: bool | None = None,
  indexer: Indexer = 'load',
  overrides: Mapping[str, Any] | None = None,
  precision: Precision | None = None,
) -> Plan:
  """Compares every name, shape and dtype of the files with the model's.

  Args:
    path: directory with config.json and safetensors files.
    scan_layers: layout of the variables.
    mtp: whether the MTP layer is wanted; None if the config and the files have
      one.
    indexer: 'init' for a checkpoint without indexers, as DeepSeek-V3's.
    overrides: fields in place of those of config.json.
    precision: in place of the file's dtype.

  Returns:
    What there is to read.

  Raises:
    FileNotFoundError: no such directory, config.json or shard.
    ValueError: naming files and tensors, if they are damaged, missing, not
      known, or of another shape or dtype than the model's.
  """
  if indexer not in ('load', 'init'):
    raise ValueError(f"indexer: got {indexer!r}, expected 'load' or 'init'")
  root = pathlib.Path(path)
  raw = hf_files.read_json(root / _CONFIG) | dict(overrides or {})
  quantisation = _quantisation(root, raw)
  stored = hf_files.scan(root)
  if indexer == 'init':
    raw = _INDEXER_SIZES | raw
  cfg = _config(
    root, raw, stored, scan_layers=scan_layers, mtp=mtp, precision=precision
  )
  fused = any('.mlp.experts.gate_up_proj' in name for name in stored)
  tensors = list(hf_mapping.tensors(cfg, fused_experts=fused))
  if indexer == 'init':
    there = next((name for name in stored if _INDEXER in name), None)
    if there is not None:
      raise ValueError(
        f"{stored[there].file}: indexer: got 'init', but {there} is there; "
        "expected a checkpoint without indexers, or 'load'"
      )
    tensors = [tensor for tensor in tensors if _INDEXER not in tensor.name]
  # Copies may be left out: what they are copies of says all.
  tensors = [t for t in tensors if t.targets or t.name in stored]
  _check_tensors(root, cfg, tensors, stored)
  return Plan(
    root=root,
    cfg=cfg,
    stored=stored,
    wanted=tuple(tensor for tensor in tensors if tensor.targets),
    copies=tuple(
      (tensor.name, hf_mapping.original_name(cfg, tensor.name))
      for tensor in tensors
      if not tensor.targets
    ),
    new_indexers=indexer == 'init',
    ue8m0=quantisation.get('scale_fmt') == 'ue8m0',
  )


def _quantisation(root: pathlib.Path, raw: Mapping) -> dict:
  """The quantization_config, if it is one that this code reads."""
  found = raw.get('quantization_config') or {}
  block = found.get('weight_block_size', [BLOCK, BLOCK])
  if found.get('quant_method', 'fp8') != 'fp8' or block != [BLOCK, BLOCK]:
    raise ValueError(
      f'{root / _CONFIG}: quantization_config is '
      f'{found.get("quant_method")!r} in blocks of {block}, expected '
      f"'fp8' in blocks of [{BLOCK}, {BLOCK}]"
    )
  return found


def _config(
  root: pathlib.Path,
  raw: dict,
  stored: dict[str, Stored],
  *,
  scan_layers: bool,
  mtp: bool | None,
  precision: Precision | None,
) -> ModelConfig:
  """The model of config.json, its MTP module and dtype settled by the files."""
  if not (raw.get('dtype') or raw.get('torch_dtype')):
    embedding = stored.get('model.embed_tokens.weight')
    if embedding is not None and embedding.dtype in _DTYPE_NAMES:
      raw = {**raw, 'dtype': _DTYPE_NAMES[embedding.dtype]}
  if raw.get('rope_interleave', True) is not True:
    raise ValueError(
      f'{root / _CONFIG}: rope_interleave: got {raw["rope_interleave"]!r}, '
      'expected true (pairs of neighbours, as in every published DeepSeek)'
    )
  try:
    cfg = presets.from_hf_json(raw)
  except ValueError as error:
    raise ValueError(f'{root}: {error}') from None
  prefix = hf_mapping.mtp_prefix(cfg)
  has_mtp = any(name.startswith(prefix) for name in stored)
  if mtp is None:
    mtp = has_mtp and cfg.num_nextn_predict_layers > 0
  elif mtp and not has_mtp:
    raise ValueError(f'mtp: got True, but no tensor is named {prefix}*')
  return dataclasses.replace(
    cfg,
    scan_layers=scan_layers,
    num_nextn_predict_layers=int(mtp),
    precision=precision or cfg.precision,
  )


def _check_tensors(
  root: pathlib.Path,
  cfg: ModelConfig,
  tensors: list[hf_mapping.Tensor],
  stored: dict[str, Stored],
) -> None:
  """Refuses files that do not hold exactly this model."""
  expected: dict[str, tuple[int, ...]] = {}
  scales: set[str] = set()
  for tensor in tensors:
    expected[tensor.name] = tensor.shape
    found = stored.get(tensor.name)
    if found is not None and found.dtype == 'F8_E4M3':
      scale = hf_mapping.scale_name(tensor)
      expected[scale] = hf_mapping.scale_shape(tensor)
      scales.add(scale)
  skipped = ()
  if not cfg.num_nextn_predict_layers:
    skipped = (hf_mapping.mtp_prefix(cfg),)
  missing = [name for name in expected if name not in stored]
  hint = ''
  if missing and all(_INDEXER in name for name in missing):
    hint = " (indexer='init' starts a model without indexers with new ones)"
  problems = (
    ('missing', [f'{root}: {name}' for name in missing], hint),
    (
      'not part of the model',
      [
        f'{entry.file}: {name}'
        for name, entry in stored.items()
        if name not in expected and not (skipped and name.startswith(skipped))
      ],
      '',
    ),
    ('of another shape', _wrong_shapes(expected, stored), ''),
    (
      'of another dtype',
      _wrong_dtypes(
        (stored[name] for name in expected if name in stored), scales
      ),
      '',
    ),
  )
  lines = [
    f'{len(items)} tensors {what}: {"; ".join(items[:_MAX_LISTED])}'
    + ('; ...' if len(items) > _MAX_LISTED else '')
    + more
    for what, items, more in problems
    if items
  ]
  if lines:
    raise ValueError('. '.join(lines))


def _wrong_shapes(
  expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, Stored]
) -> list[str]:
  return [
    f'{stored[name].file}: {name} {stored[name].shape} in the file, {shape} in '
    'the model'
    for name, shape in expected.items()
    if name in stored and stored[name].shape != shape
  ]


def _wrong_dtypes(entries: Iterable[Stored], scales: set[str]) -> list[str]:
  wrong = []
  for entry in entries:
    allowed = _SCALE_DTYPES if entry.name in scales else tuple(_DTYPE_NAMES)
    is_matrix = entry.name not in scales and len(entry.shape) == 2
    if is_matrix:
      allowed += ('F8_E4M3',)
    if entry.dtype not in allowed:
      wrong.append(
        f'{entry.file}: {entry.name} is {entry.dtype}, expected '
        + ' or '.join(allowed)
      )
  return wrong
