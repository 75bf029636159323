"""What attention of one layer sends between devices, by arithmetic.

The collectives of `attention_region`, from a config and a mesh alone: nothing
is traced. Tests hold these numbers against compiled programs. The gathers of
the matrices themselves are those of any parameter and not counted here.

Letters: N tokens of a device, S tokens of the rows that they are from, D
hidden_size, Q query latent, X latent row, J indexer heads, I their width, K
selected keys.
"""

from collections.abc import Iterator

import jax.numpy as jnp

from dsv32_jax.config.model import AttentionMode, ModelConfig
from dsv32_jax.sharding.attention_region import Layout
from dsv32_jax.sharding.expert_traffic import Kind, Message, Traffic
from dsv32_jax.sharding.parallel import Parallel


def layer_traffic(
  cfg: ModelConfig,
  parallel: Parallel,
  *,
  mode: AttentionMode,
  batch_size: int,
  seq_len: int,
  trains_main: bool = True,
) -> Traffic:
  """The messages of one layer's attention.

  Args:
    cfg: the model.
    parallel: mesh (an abstract one will do) and rules.
    mode: selector and indexer loss.
    batch_size: rows of the whole (micro-)batch.
    seq_len: tokens a row.
    trains_main: whether more than the indexer has gradients.

  Returns:
    Messages between more than one device, larger than a few numbers. What
    `cfg.remat` makes the backward pass do again is part of that.
  """
  layout = Layout.of(
    parallel,
    batch=batch_size,
    length=seq_len,
    num_heads=cfg.num_attention_heads,
  )
  rows = batch_size // parallel.size(*layout.rows)
  tokens = rows * seq_len // parallel.size(*layout.sequence)
  size = jnp.dtype(cfg.precision.compute).itemsize
  has_kl = mode.indexer_kl != 'none'

  def over_context(kind: Kind, what: str, width: int) -> Message:
    return Message(
      what=what,
      kind=kind,
      axis_names=layout.sequence,
      group=parallel.size(*layout.sequence),
      bytes=rows * seq_len * width * size,
    )

  def over_heads(what: str, row: int) -> Message:
    return Message(
      what=what,
      kind='all-reduce',
      axis_names=layout.heads,
      group=parallel.size(*layout.heads),
      bytes=tokens * row,
    )

  latents = over_context('all-gather', 'latents', cfg.latent_dim)
  index_keys = over_context('all-gather', 'indexer keys', cfg.index_head_dim)
  outputs = over_heads('outputs', cfg.hidden_size * size)
  target = over_heads('target', _target_row(cfg, mode, seq_len))

  def forward() -> Iterator[Message]:
    yield latents
    if has_kl or mode.selector == 'indexer':
      yield index_keys
    yield outputs
    if has_kl:
      yield target

  def again() -> Iterator[Message]:
    # No policy keeps gathered keys, and all keep selections. The indexer's
    # gradients are kept by all but 'full': without them the loss is made again,
    # and the attention for it.
    loss_again = has_kl and cfg.remat == 'full'
    if trains_main or loss_again:
      yield latents
    if loss_again:
      yield index_keys
      yield target
    if cfg.remat != 'none' and trains_main:
      yield outputs

  def backward() -> Iterator[Message]:
    # Beside what is cut over heads, every member has a share of the gradient.
    if trains_main:
      yield over_context('reduce-scatter', 'latents', cfg.latent_dim)
      width = cfg.latent_dim + (cfg.q_lora_rank or cfg.hidden_size)
      yield over_heads('gradients of latents', width * size)
    if has_kl:
      J, I = cfg.index_n_heads, cfg.index_head_dim
      yield over_context('reduce-scatter', 'indexer keys', I)
      row = (J + 1) * I * size + J * max(4, size)
      yield over_heads('gradients of the indexer', row)

  def between(messages: Iterator[Message]) -> tuple[Message, ...]:
    return tuple(message for message in messages if message.group > 1)

  return Traffic(
    forward=between(forward()),
    backward=(*between(again()), *between(backward())),
  )


def _target_row(cfg: ModelConfig, mode: AttentionMode, seq_len: int) -> int:
  """The target of one query: float32 for each key that it is compared over.

  Without a selection that is at most every key of the row: blocks of keys that
  no query of a block sees are skipped.
  """
  keys = min(cfg.index_topk, seq_len) if mode.is_sparse else seq_len
  return keys * max(4, jnp.dtype(cfg.precision.compute).itemsize)
