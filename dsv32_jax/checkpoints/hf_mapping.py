"""Tensors of a Hugging Face checkpoint and their places in our tree.

Works out what the rows of `hf_table` mean for one model: every name, every
shape, and the cut and transposition between a tensor and its parameters. No
I/O, and no array is made.
"""

import dataclasses
import re
from collections.abc import Iterator

import numpy as np

from dsv32_jax.checkpoints import hf_table
from dsv32_jax.config.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class Target:
  """Where one part of a tensor goes.

  Attributes:
    path: keys of the parameter, collection first.
    index: leading indices (layer of a scanned stack, expert); may be empty.
    order: for `numpy.transpose`, from the part in the file to the parameter.
  """

  path: tuple[str, ...]
  index: tuple[int, ...]
  order: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of a checkpoint and its place in the tree.

  Attributes:
    name: full name in the file.
    shape: shape in the file.
    factored: `shape` with every product of factors apart.
    axis_of: axis of `shape` that each factor belongs to.
    cut_axis: axis of `factored` that is concatenated, and the sizes of its
      parts; -1 and () if none is.
    cut_sizes: see `cut_axis`.
    targets: one a part; none for a copy of a shared tensor.
    fp8: see `Row`.
    fp32: see `Row`.
  """

  name: str
  shape: tuple[int, ...]
  factored: tuple[int, ...]
  axis_of: tuple[int, ...]
  cut_axis: int
  cut_sizes: tuple[int, ...]
  targets: tuple[Target, ...]
  fp8: bool
  fp32: bool

  def split(self, value: np.ndarray) -> list[np.ndarray]:
    """The parameters' values, one a target, of a tensor of the file."""
    value = value.reshape(self.factored)
    parts = [value]
    if self.cut_sizes:
      parts = np.split(value, np.cumsum(self.cut_sizes)[:-1], self.cut_axis)
    return [
      part.transpose(target.order)
      for part, target in zip(parts, self.targets, strict=True)
    ]

  def join(self, values: list[np.ndarray]) -> np.ndarray:
    """The tensor of the file of the parameters' values; inverts `split`."""
    parts = [
      value.transpose(np.argsort(target.order))
      for value, target in zip(values, self.targets, strict=True)
    ]
    whole = np.concatenate(parts, self.cut_axis) if self.cut_sizes else parts[0]
    return whole.reshape(self.shape)


def tensors(
  cfg: ModelConfig, *, fused_experts: bool = False, mtp: bool = True
) -> Iterator[Tensor]:
  """Yields every tensor of a checkpoint of `cfg`, in the order of the layers.

  Args:
    cfg: the model; `scan_layers` decides which tree the targets are in.
    fused_experts: all experts of a layer in one tensor, as transformers holds
      them, in place of one tensor an expert.
    mtp: include the MTP layer, if the model has one.
  """
  routed = hf_table.ROUTED_FUSED if fused_experts else hf_table.ROUTED
  yield from _scope(cfg, hf_table.MODEL, 'model.', (), ())
  for layer in range(cfg.num_hidden_layers):
    prefix = f'model.layers.{layer}.'
    path, index = _layer_place(cfg, layer)
    rows = hf_table.ATTENTION
    if layer < cfg.first_k_dense_replace:
      rows += hf_table.DENSE_FFN
    else:
      rows += hf_table.MOE + routed
    yield from _scope(cfg, rows, prefix, path, index)
  if mtp and cfg.num_nextn_predict_layers:
    prefix = mtp_prefix(cfg)
    yield from _scope(cfg, hf_table.MTP, prefix, ('mtp',), ())
    rows = hf_table.ATTENTION + hf_table.MOE + routed
    yield from _scope(cfg, rows, prefix, ('mtp', 'block'), ())
  yield from _scope(cfg, hf_table.HEAD, '', (), ())


def shared(cfg: ModelConfig) -> tuple[Tensor, ...]:
  """The embedding, and the head where it has its own matrix."""
  rows = tuple(row for row in hf_table.MODEL if row.name.startswith('embed'))
  return (
    *_scope(cfg, rows, 'model.', (), ()),
    *_scope(cfg, hf_table.HEAD, '', (), ()),
  )


def original_name(cfg: ModelConfig, copy: str) -> str:
  """The tensor that one of the MTP layer without targets is a copy of."""
  if copy.endswith('.shared_head.head.weight') and not cfg.tie_word_embeddings:
    return 'lm_head.weight'
  return 'model.embed_tokens.weight'


def mtp_prefix(cfg: ModelConfig) -> str:
  """Prefix of the MTP module's names: the layer after the last."""
  return f'model.layers.{cfg.num_hidden_layers}.'


def scale_name(tensor: Tensor) -> str:
  """Name of the block scales that accompany a float8 tensor."""
  return f'{tensor.name}_scale_inv'


def scale_shape(tensor: Tensor, *, block: int = 128) -> tuple[int, ...]:
  """Shape of those scales: one a block of 128 x 128, ends rounded up."""
  return tuple(-(-size // block) for size in tensor.shape)


def _layer_place(
  cfg: ModelConfig, layer: int
) -> tuple[tuple[str, ...], tuple[int, ...]]:
  stack, index = 'dense_layers', layer
  if layer >= cfg.first_k_dense_replace:
    stack, index = 'moe_layers', layer - cfg.first_k_dense_replace
  if cfg.scan_layers:
    return (stack, 'layers'), (index,)
  return (stack, f'layer_{index}'), ()


def _scope(
  cfg: ModelConfig,
  rows: tuple[hf_table.Row, ...],
  prefix: str,
  path: tuple[str, ...],
  index: tuple[int, ...],
) -> Iterator[Tensor]:
  """The tensors of some rows under one prefix of names and of paths."""
  sizes = hf_table.sizes(cfg)
  for row in rows:
    if not row.when(cfg):
      continue
    per_expert = '{expert}' in row.name
    for expert in range(cfg.n_routed_experts if per_expert else 1):
      yield _tensor(
        row,
        sizes,
        name=prefix + row.name.format(expert=expert),
        path=path,
        index=(*index, expert) if per_expert else index,
      )


def _tensor(
  row: hf_table.Row,
  sizes: dict[str, int],
  *,
  name: str,
  path: tuple[str, ...],
  index: tuple[int, ...],
) -> Tensor:
  axes = row.layout.split()
  factors = re.split(r'[ .]', row.layout)
  size_of = {
    factor: sum(sizes[letter] for letter in factor.split('+'))
    for factor in factors
  }
  shape = tuple(
    int(np.prod([size_of[factor] for factor in axis.split('.')]))
    for axis in axes
  )
  cut_axis, cut_sizes = -1, ()
  for axis, factor in enumerate(factors):
    if '+' in factor:
      cut_axis = axis
      cut_sizes = tuple(sizes[letter] for letter in factor.split('+'))
  targets = []
  for part, (subpath, layout) in enumerate(row.parts):
    own = [
      factor.split('+')[part] if '+' in factor else factor for factor in factors
    ]
    # An expert's tensor lacks the leading E of the parameter it goes into.
    wanted = [letter for letter in layout.split() if letter in own]
    targets.append(
      Target(
        path=(row.collection, *path, *subpath.split('/')),
        index=index,
        order=tuple(own.index(letter) for letter in wanted),
      )
    )
  return Tensor(
    name=name,
    shape=shape,
    factored=tuple(size_of[factor] for factor in factors),
    axis_of=tuple(
      number for number, axis in enumerate(axes) for _ in axis.split('.')
    ),
    cut_axis=cut_axis,
    cut_sizes=cut_sizes,
    targets=tuple(targets),
    fp8=row.fp8,
    fp32=row.fp32,
  )
