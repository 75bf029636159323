"""One table between Hugging Face tensor names and this model's parameters.

A row of the table gives a tensor's name, the layout of its axes in the file
and, for each parameter it feeds, the path in our tree and the layout there.
Both directions and all shapes follow from the row.

Layouts are letters (`_sizes` says what they measure). Axes are separated by
spaces; within an axis of the file '.' multiplies, the slower factor first, and
'+' concatenates: 'H.N+R Q' is [H * (N + R), Q], each head's N rows above its
R rows. A concatenated factor is cut into one parameter a part, in order.

Sources: spec sections 7 and 8.4; weights there are [out, in], as in torch.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dsv32_jax.config.model import ModelConfig

PARAMS = 'params'
ROUTER_BIAS = 'router_bias'


@dataclasses.dataclass(frozen=True)
class Row:
  """One kind of tensor.

  Attributes:
    name: what follows the scope's prefix; '{expert}' stands for an index.
    layout: axes in the file.
    parts: (path, layout) of each parameter; none for a copy of a tensor that
      the model shares. With '{expert}' the parameter has a leading 'E' which
      the file's layout lacks.
    collection: flax collection of the parameters.
    when: whether a model has this tensor.
    fp8: stored as float8 with block scales in the published checkpoint.
    fp32: stored as float32 in the published checkpoint, else bfloat16.
  """

  name: str
  layout: str
  parts: tuple[tuple[str, str], ...]
  collection: str = PARAMS
  when: Callable[[ModelConfig], bool] = lambda cfg: True
  fp8: bool = False
  fp32: bool = False


def _row(name: str, layout: str, *parts: str, **options: Any) -> Row:
  """Parts are written 'path: layout'."""
  pairs = tuple(tuple(part.split(': ')) for part in parts)
  return Row(name=name, layout=layout, parts=pairs, **options)  # pyrefly: ignore


def _has_q_latent(cfg: ModelConfig) -> bool:
  return cfg.q_lora_rank is not None


def _has_shared(cfg: ModelConfig) -> bool:
  return cfg.n_shared_experts > 0


_MODEL = (
  _row('embed_tokens.weight', 'V D', 'embedding: V D'),
  _row('norm.weight', 'D', 'final_norm/scale: D', fp32=True),
)
_HEAD = (
  _row(
    'lm_head.weight',
    'V D',
    'lm_head: D V',
    when=lambda cfg: not cfg.tie_word_embeddings,
  ),
)
_ATTENTION = (
  _row('input_layernorm.weight', 'D', 'attention_norm/scale: D', fp32=True),
  _row('post_attention_layernorm.weight', 'D', 'ffn_norm/scale: D', fp32=True),
  _row(
    'self_attn.q_proj.weight',
    'H.N+R D',
    'attention/mla/w_uq: D H N',
    'attention/mla/w_qr: D H R',
    when=lambda cfg: not _has_q_latent(cfg),
    fp8=True,
  ),
  _row(
    'self_attn.q_a_proj.weight',
    'Q D',
    'attention/mla/w_dq: D Q',
    when=_has_q_latent,
    fp8=True,
  ),
  _row(
    'self_attn.q_a_layernorm.weight',
    'Q',
    'attention/mla/q_norm/scale: Q',
    when=_has_q_latent,
    fp32=True,
  ),
  _row(
    'self_attn.q_b_proj.weight',
    'H.N+R Q',
    'attention/mla/w_uq: Q H N',
    'attention/mla/w_qr: Q H R',
    when=_has_q_latent,
    fp8=True,
  ),
  _row(
    'self_attn.kv_a_proj_with_mqa.weight',
    'C+R D',
    'attention/mla/w_dkv: D C',
    'attention/mla/w_kr: D R',
    fp8=True,
  ),
  _row(
    'self_attn.kv_a_layernorm.weight',
    'C',
    'attention/mla/kv_norm/scale: C',
    fp32=True,
  ),
  _row(
    'self_attn.kv_b_proj.weight',
    'H.N+U C',
    'attention/mla/w_uk: C H N',
    'attention/mla/w_uv: C H U',
    fp8=True,
  ),
  _row(
    'self_attn.o_proj.weight', 'D H.U', 'attention/mla/w_o: H U D', fp8=True
  ),
  # The rotated channels come first in an indexer head (spec 3.4), in the file
  # as here, so its rows stay in order.
  _row(
    'self_attn.indexer.wq_b.weight',
    'J.I Q',
    'attention/indexer/w_iq: Q J I',
    when=_has_q_latent,
    fp8=True,
  ),
  _row(
    'self_attn.indexer.wk.weight',
    'I D',
    'attention/indexer/w_ik: D I',
    when=_has_q_latent,
    fp8=True,
  ),
  _row(
    'self_attn.indexer.k_norm.weight',
    'I',
    'attention/indexer/k_norm/scale: I',
    when=_has_q_latent,
    fp32=True,
  ),
  _row(
    'self_attn.indexer.k_norm.bias',
    'I',
    'attention/indexer/k_norm/bias: I',
    when=_has_q_latent,
    fp32=True,
  ),
  _row(
    'self_attn.indexer.weights_proj.weight',
    'J D',
    'attention/indexer/w_iw: D J',
    when=_has_q_latent,
  ),
)
_DENSE_FFN = (
  _row('mlp.gate_proj.weight', 'W D', 'ffn/w_gate: D W', fp8=True),
  _row('mlp.up_proj.weight', 'W D', 'ffn/w_up: D W', fp8=True),
  _row('mlp.down_proj.weight', 'D W', 'ffn/w_down: W D', fp8=True),
)
_ROUTED = (
  _row(
    'mlp.experts.{expert}.gate_proj.weight',
    'F D',
    'moe/experts/w_gate: E D F',
    fp8=True,
  ),
  _row(
    'mlp.experts.{expert}.up_proj.weight',
    'F D',
    'moe/experts/w_up: E D F',
    fp8=True,
  ),
  _row(
    'mlp.experts.{expert}.down_proj.weight',
    'D F',
    'moe/experts/w_down: E F D',
    fp8=True,
  ),
)
# What transformers 5 holds in memory; `save_pretrained` writes the form above.
_ROUTED_FUSED = (
  _row(
    'mlp.experts.gate_up_proj',
    'E F+F D',
    'moe/experts/w_gate: E D F',
    'moe/experts/w_up: E D F',
  ),
  _row('mlp.experts.down_proj', 'E D F', 'moe/experts/w_down: E F D'),
)
_MOE = (
  _row('mlp.gate.weight', 'E D', 'moe/router/w_router: D E'),
  _row(
    'mlp.gate.e_score_correction_bias',
    'E',
    'moe/router/e_score_correction_bias: E',
    collection=ROUTER_BIAS,
    when=lambda cfg: cfg.has_router_bias,
    fp32=True,
  ),
  *(
    _row(
      f'mlp.shared_experts.{ours}_proj.weight',
      'D G' if ours == 'down' else 'G D',
      f'moe/shared/w_{ours}: ' + ('G D' if ours == 'down' else 'D G'),
      when=_has_shared,
      fp8=True,
    )
    for ours in ('gate', 'up', 'down')
  ),
)
_MTP = (
  _row('enorm.weight', 'D', 'embedding_norm/scale: D', fp32=True),
  _row('hnorm.weight', 'D', 'hidden_norm/scale: D', fp32=True),
  # Columns are [embedding ; hidden], the order in which `mtp.py` joins them.
  _row('eh_proj.weight', 'D M', 'w_eh: M D'),
  _row('shared_head.norm.weight', 'D', 'head_norm/scale: D', fp32=True),
  _row('embed_tokens.weight', 'V D'),
  _row('shared_head.head.weight', 'V D'),
)


def _sizes(cfg: ModelConfig) -> dict[str, int]:
  return {
    'V': cfg.vocab_size,
    'D': cfg.hidden_size,
    'H': cfg.num_attention_heads,
    'Q': cfg.q_lora_rank or 0,
    'C': cfg.kv_lora_rank,
    'N': cfg.qk_nope_head_dim,
    'R': cfg.qk_rope_head_dim,
    'U': cfg.v_head_dim,
    'J': cfg.index_n_heads,
    'I': cfg.index_head_dim,
    'W': cfg.intermediate_size,
    'E': cfg.n_routed_experts,
    'F': cfg.moe_intermediate_size,
    'G': cfg.n_shared_experts * cfg.moe_intermediate_size,
    'M': 2 * cfg.hidden_size,
  }


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
  routed = _ROUTED_FUSED if fused_experts else _ROUTED
  yield from _scope(cfg, _MODEL, 'model.', (), ())
  for layer in range(cfg.num_hidden_layers):
    prefix = f'model.layers.{layer}.'
    path, index = _layer_place(cfg, layer)
    rows = _ATTENTION
    if layer < cfg.first_k_dense_replace:
      rows += _DENSE_FFN
    else:
      rows += _MOE + routed
    yield from _scope(cfg, rows, prefix, path, index)
  if mtp and cfg.num_nextn_predict_layers:
    prefix = mtp_prefix(cfg)
    yield from _scope(cfg, _MTP, prefix, ('mtp',), ())
    rows = _ATTENTION + _MOE + routed
    yield from _scope(cfg, rows, prefix, ('mtp', 'block'), ())
  yield from _scope(cfg, _HEAD, '', (), ())


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
  rows: tuple[Row, ...],
  prefix: str,
  path: tuple[str, ...],
  index: tuple[int, ...],
) -> Iterator[Tensor]:
  """The tensors of some rows under one prefix of names and of paths."""
  sizes = _sizes(cfg)
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
  row: Row,
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
      factor.split('+')[part] if '+' in factor else factor
      for factor in factors
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
    cut_axis=cut_axis,
    cut_sizes=cut_sizes,
    targets=tuple(targets),
    fp8=row.fp8,
    fp32=row.fp32,
  )
