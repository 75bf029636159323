"""What the routed experts of one layer send between devices, by arithmetic.

The collectives of `expert_parallel`, from a config and a mesh alone: nothing is
traced. Tests hold these numbers against compiled programs.

Letters: N tokens of a device, A experts a token, P devices along `expert`, C
slots for each of them a round, D hidden_size, F expert width.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax.numpy as jnp

from dsv32_jax.config.model import ModelConfig
from dsv32_jax.functional.expert_exchange import Exchange
from dsv32_jax.sharding import axes, expert_parallel
from dsv32_jax.sharding.parallel import Parallel

Kind = Literal['all-to-all', 'all-gather', 'reduce-scatter', 'all-reduce']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
  """One collective, as one device sees it.

  Attributes:
    what: travels.
    kind: HLO's name.
    axis_names: mesh axes that it runs over.
    group: devices that take part.
    bytes: of its larger side: operand of an all-to-all, reduce-scatter or
      all-reduce, result of an all-gather.
    count: how many there are.
    filled: share of an all-to-all's rows that travel; below 1 if ragged.
  """

  what: str
  kind: Kind
  axis_names: tuple[str, ...]
  group: int
  bytes: int
  count: int = 1
  filled: float = 1.0

  @property
  def sent(self) -> float:
    """Bytes that leave a device, with rings for everything but all-to-all."""
    steps = 2 if self.kind == 'all-reduce' else 1
    others = (self.group - 1) / self.group
    return self.count * steps * others * self.filled * self.bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
  """Messages of one layer.

  Attributes:
    forward: of the forward pass; remat repeats none of them but all-gathers,
      if its policy does.
    backward: of the backward pass.
  """

  forward: tuple[Message, ...]
  backward: tuple[Message, ...]


def layer_traffic(
  cfg: ModelConfig,
  parallel: Parallel,
  *,
  batch_size: int,
  seq_len: int,
  exchange: Exchange | None = None,
  rounds: int = 1,
) -> Traffic:
  """The messages of one MoE layer's routed experts.

  Args:
    cfg: the model.
    parallel: mesh (an abstract one will do) and rules.
    batch_size: rows of the whole (micro-)batch.
    seq_len: tokens a row.
    exchange: as the layer has it; None for its default. With kind 'ragged'
      the rows are those of balanced experts.
    rounds: of the exchange; more than 1 only with imbalance.

  Returns:
    Messages between more than one device, larger than a few numbers.
  """
  exchange = expert_parallel.sized(exchange or Exchange(), cfg, parallel)
  num_tokens = _tokens(parallel, batch_size, seq_len)
  row, gates = _row_bytes(cfg)
  trips = functools.partial(_trips, cfg, parallel, exchange, num_tokens, rounds)
  parts = functools.partial(_sum_of_parts, parallel, num_tokens)
  forward = [
    _whole_weights(cfg, parallel),
    *trips(is_backward=False),
    parts('outputs', row),
  ]
  backward = [
    _whole_weights(cfg, parallel),
    *trips(is_backward=True),
    parts('gradients of tokens', row),
    parts('gradients of gates', gates),
    *_weight_gradients(cfg, parallel),
  ]
  return Traffic(
    forward=tuple(message for message in forward if message.group > 1),
    backward=tuple(message for message in backward if message.group > 1),
  )


def _tokens(parallel: Parallel, batch_size: int, seq_len: int) -> int:
  """N: shards are whole, rows and tokens are filled up to them."""
  return math.prod(
    -(-size // parallel.shards(name))
    for size, name in ((batch_size, axes.BATCH), (seq_len, axes.SEQUENCE))
  )


def _row_bytes(cfg: ModelConfig) -> tuple[int, int]:
  """Of a token, and of its gates: float32, or wider with everything else."""
  size = jnp.dtype(cfg.precision.compute).itemsize
  return cfg.hidden_size * size, cfg.num_experts_per_tok * max(4, size)


def _trips(
  cfg: ModelConfig,
  parallel: Parallel,
  exchange: Exchange,
  num_tokens: int,
  rounds: int,
  *,
  is_backward: bool,
) -> list[Message]:
  """There and back, in every round."""
  over = parallel.axes_of(axes.EXPERTS)
  group = parallel.size(*over)
  choices = cfg.num_experts_per_tok
  rows = group * exchange.slots(num_tokens, choices, group)
  filled = 1.0
  if exchange.kind == 'ragged':
    visits = exchange.devices_a_token or choices
    filled = min(1.0, num_tokens * visits / (rows * rounds))

  def trip(what: str, row: int, times: int, filled: float = 1.0) -> Message:
    return Message(
      what=what,
      kind='all-to-all',
      axis_names=over,
      group=group,
      bytes=rows * row,
      count=times * rounds,
      filled=filled,
    )

  row, gates = _row_bytes(cfg)
  there = trip('choices and gates', 2 * gates, 1)
  if not is_backward:
    return [trip('tokens and outputs', row, 2, filled), there]
  return [
    trip('tokens, gradients of outputs and of tokens', row, 3, filled),
    there,
    trip('gradients of gates', gates, 1),
  ]


def _sum_of_parts(
  parallel: Parallel, num_tokens: int, what: str, row: int
) -> Message:
  """Sums over the devices that hold parts of F."""
  over = parallel.axes_of(axes.EXPERT_MLP)
  return Message(
    what=what,
    kind='all-reduce',
    axis_names=over,
    group=parallel.size(*over),
    bytes=num_tokens * row,
  )


def _gathered_axes(parallel: Parallel) -> tuple[str, ...]:
  """Axes that cut the model width of an expert's matrices."""
  taken = parallel.axes_of(axes.EXPERTS) + parallel.axes_of(axes.EXPERT_MLP)
  return tuple(
    name for name in parallel.axes_of(axes.EMBED) if name not in taken
  )


def _matrix_bytes(cfg: ModelConfig, parallel: Parallel) -> int:
  """One matrix of the experts of a device, as it is multiplied with."""
  matrix = cfg.n_routed_experts * cfg.hidden_size * cfg.moe_intermediate_size
  cut = parallel.shards(axes.EXPERTS) * parallel.shards(axes.EXPERT_MLP)
  return matrix // cut * jnp.dtype(cfg.precision.compute).itemsize


def _whole_weights(cfg: ModelConfig, parallel: Parallel) -> Message:
  over = _gathered_axes(parallel)
  return Message(
    what='experts',
    kind='all-gather',
    axis_names=over,
    group=parallel.size(*over),
    bytes=_matrix_bytes(cfg, parallel),
    count=3,
  )


def _weight_gradients(cfg: ModelConfig, parallel: Parallel) -> list[Message]:
  cut = _gathered_axes(parallel)
  tokens = parallel.axes_of(axes.BATCH) + parallel.axes_of(axes.SEQUENCE)
  rest = tuple(
    name
    for name in tokens
    if name not in cut and name not in parallel.axes_of(axes.EXPERTS)
  )
  whole = _matrix_bytes(cfg, parallel)
  return [
    Message(
      what='gradients of experts',
      kind='reduce-scatter',
      axis_names=cut,
      group=parallel.size(*cut),
      bytes=whole,
      count=3,
    ),
    Message(
      what='gradients of experts',
      kind='all-reduce',
      axis_names=rest,
      group=parallel.size(*rest),
      bytes=whole // parallel.size(*cut),
      count=3,
    ),
  ]
