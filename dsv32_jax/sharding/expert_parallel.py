"""Routed experts over the mesh axis `expert`: tokens travel, weights stay.

One `shard_map` over the whole mesh. A device sorts its tokens by the devices
that hold their experts and sends each token once to each of these (all-to-all);
there the rows are sorted by expert and multiplied, a token's local experts are
summed with their gates, and one row comes back. Every token is served whatever
the imbalance, see `functional.expert_slots` for the rounds that make this so
with static shapes. Experts' weights are gathered over the axes that cut their
model width (fsdp), never over `expert`.

Forward and backward are two regions of their own, joined by a `custom_vjp` that
keeps the inputs only: rows are sent again in the backward pass and experts
computed again. Remat around it therefore costs no second forward exchange.

Sums over axes. Tokens are cut over BATCH's and SEQUENCE's axes, so a weight's
gradient is summed over these but for `expert`, where each token reaches the
weight's owner. Where the experts' width F is cut (`tensor`), its members get
the same tokens and each computes a part of the sum over F: parts are summed
once, where the tokens came from.

Overlap. Nothing orders the exchange and the shared experts, which the caller
computes beside this. The first round stands outside of the loop: schedulers
move nothing across a `while`, and usually there is no second round. XLA then
needs asynchronous collectives and its latency hiding scheduler, on GPUs
--xla_gpu_enable_latency_hiding_scheduler=true.

Letters: B batch, T tokens, D width, E experts, A experts a token, P devices
along `expert`; on one device N tokens, C slots for each device a round, R = P C
received rows.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from dsv32_jax.config.model import ModelConfig
from dsv32_jax.functional import expert_chunks, expert_slots, precision
from dsv32_jax.functional.expert_exchange import Devices, Exchange, Journey
from dsv32_jax.sharding import axes
from dsv32_jax.sharding.parallel import Parallel


def routed_experts(
  parallel: Parallel,
  experts: expert_chunks.Experts,
  weights: Sequence[Array],
  weight_axes: Sequence[tuple[str, ...]],
  x_BTD: Float[Array, 'B T D'],
  expert_index_BTA: Int[Array, 'B T A'],
  gate_BTA: Float[Array, 'B T A'],
  *,
  exchange: Exchange,
) -> Float[Array, 'B T D']:
  """The gated sum over each token's experts, wherever these are.

  Args:
    parallel: mesh and rules.
    experts: (x_MD, weights, group_sizes_E) -> y_MD, differentiable in both; its
      result is linear in what the dim EXPERT_MLP is summed over.
    weights: [E, ...] arrays.
    weight_axes: logical axes of each; EXPERTS comes first.
    x_BTD: tokens, cut as BATCH and SEQUENCE; filled up to whole shards if they
      cannot be cut (one token of a decoding step, say).
    expert_index_BTA: distinct experts of each token.
    gate_BTA: weights of these experts.
    exchange: how tokens travel.

  Returns:
    At least float32. Differentiable in tokens, gates and weights.

  Raises:
    ValueError: the rules cut experts over an axis that tokens are not cut over,
      or one that does not divide the experts.
  """
  B, T, _ = x_BTD.shape
  region = _Region.make(parallel, weights, weight_axes, experts, exchange)

  @jax.custom_vjp
  def apply(x_BTD, expert_index_BTA, gate_BTA, weights):
    return region.forward(x_BTD, expert_index_BTA, gate_BTA, weights)

  def forward(*inputs):
    return apply(*inputs), inputs

  def backward(inputs, dy_BTD):
    dx_BTD, dgate_BTA, dweights = region.backward(*inputs, dy_BTD)
    return dx_BTD, None, dgate_BTA, dweights

  apply.defvjp(forward, backward)

  pad = (
    (0, -B % parallel.shards(axes.BATCH)),
    (0, -T % parallel.shards(axes.SEQUENCE)),
    (0, 0),
  )
  is_padded = any(after for _, after in pad)
  if is_padded:
    x_BTD = jnp.pad(x_BTD, pad)
    gate_BTA = jnp.pad(gate_BTA, pad)
    expert_index_BTA = jnp.pad(
      expert_index_BTA, pad, constant_values=region.num_experts
    )
  y_BTD = apply(x_BTD, expert_index_BTA, gate_BTA, tuple(weights))
  return y_BTD[:B, :T] if is_padded else y_BTD


def sized(exchange: Exchange, cfg: ModelConfig, parallel: Parallel) -> Exchange:
  """The layout's exchange, sized for the devices that a token visits."""
  exchange = dataclasses.replace(
    exchange, kind=exchange.kind or parallel.exchange
  )
  if exchange.devices_a_token is not None:
    return exchange
  has_groups = cfg.topk_method != 'greedy'
  return dataclasses.replace(
    exchange,
    devices_a_token=expert_slots.expected_devices(
      parallel.shards(axes.EXPERTS),
      num_experts=cfg.n_routed_experts,
      num_experts_per_tok=cfg.num_experts_per_tok,
      n_group=cfg.n_group if has_groups else 1,
      topk_group=cfg.topk_group if has_groups else 1,
    ),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Region:
  """The two shard_maps and what is static in them.

  Attributes:
    parallel: mesh and rules.
    experts: computes sorted rows.
    exchange: how tokens travel.
    num_experts: E.
    expert_axes: mesh axes that experts are cut over; none or `expert`.
    token_axes: mesh axes that tokens are cut over.
    partial_axes: mesh axes that F is cut over.
    weight_axes: logical axes of each weight.
  """

  parallel: Parallel
  experts: expert_chunks.Experts
  exchange: Exchange
  num_experts: int
  expert_axes: tuple[str, ...]
  token_axes: tuple[str, ...]
  partial_axes: tuple[str, ...]
  weight_axes: tuple[tuple[str, ...], ...]

  @classmethod
  def make(
    cls,
    parallel: Parallel,
    weights: Sequence[Array],
    weight_axes: Sequence[tuple[str, ...]],
    experts: expert_chunks.Experts,
    exchange: Exchange,
  ) -> '_Region':
    region = cls(
      parallel=parallel,
      experts=experts,
      exchange=exchange,
      num_experts=weights[0].shape[0],
      expert_axes=parallel.axes_of(axes.EXPERTS),
      token_axes=parallel.axes_of(axes.BATCH) + parallel.axes_of(axes.SEQUENCE),
      partial_axes=parallel.axes_of(axes.EXPERT_MLP),
      weight_axes=tuple(weight_axes),
    )
    region.check()
    return region

  def check(self) -> None:
    """Refuses rules under which sums would go wrong.

    Raises:
      ValueError: naming the rules, the mesh axes and what was expected.
    """
    name, tokens = self.parallel.rules.name, set(self.token_axes)
    gathered = {
      axis
      for names in self.weight_axes
      for _, over in self._gathered_dims(names)
      for axis in over
    }
    if not {*self.expert_axes, *gathered} <= tokens:
      raise ValueError(
        f'rules {name!r} cut experts over {self.expert_axes} and their other '
        f'dims over {tuple(gathered)}; expected only axes that tokens are cut '
        f'over, too: {self.token_axes}'
      )
    if tokens & set(self.partial_axes):
      raise ValueError(
        f'rules {name!r} cut the width of experts over {self.partial_axes}; '
        f'expected only axes that tokens are not cut over: {self.token_axes}'
      )
    num_devices = self.parallel.size(*self.expert_axes)
    if self.num_experts % num_devices:
      raise ValueError(
        f'n_routed_experts: got {self.num_experts}, expected a multiple of the '
        f'{num_devices} devices of mesh axes {self.expert_axes}'
      )

  @property
  def token_spec(self) -> PartitionSpec:
    return self.parallel.spec(axes.BATCH, axes.SEQUENCE, None)

  @property
  def weight_specs(self) -> tuple[PartitionSpec, ...]:
    return tuple(self.parallel.spec(*names) for names in self.weight_axes)

  def forward(self, *inputs):
    tokens = self.token_spec
    return jax.shard_map(
      self._forward,
      mesh=self.parallel.mesh,
      in_specs=(tokens, tokens, tokens, self.weight_specs),
      out_specs=tokens,
      check_vma=False,
    )(*inputs)

  def backward(self, *inputs):
    tokens = self.token_spec
    return jax.shard_map(
      self._backward,
      mesh=self.parallel.mesh,
      in_specs=(tokens, tokens, tokens, self.weight_specs, tokens),
      out_specs=(tokens, tokens, self.weight_specs),
      check_vma=False,
    )(*inputs)

  def _forward(self, x_BTD, expert_index_BTA, gate_BTA, weights):
    x_ND = _flat(x_BTD)
    weights = self._gather_weights(weights)
    journey, chunk = self._journey(expert_index_BTA, gate_BTA)

    def one_round(trip, y_ND):
      y_RD = expert_chunks.apply(
        self.experts,
        weights,
        trip.send(x_ND),
        trip.choice_RA,
        trip.gate_RA,
        chunk=chunk,
      )
      return y_ND + trip.send_back(y_RD, x_ND.dtype)

    y_ND = jnp.zeros(x_ND.shape, precision.accumulator(x_ND.dtype))
    y_ND = journey.for_each(one_round, y_ND)
    return self._sum_parts(y_ND, x_ND.dtype).reshape(x_BTD.shape)

  def _backward(self, x_BTD, expert_index_BTA, gate_BTA, weights, dy_BTD):
    x_ND = _flat(x_BTD)
    # The layer's output has the type of its input, so nothing is lost here.
    dy_ND = _flat(dy_BTD).astype(x_ND.dtype)
    whole = self._gather_weights(weights)
    journey, chunk = self._journey(expert_index_BTA, gate_BTA)

    def one_round(trip, sums):
      dx_ND, dgate_NA, dweights = sums
      dx_RD, dgate_RA, dweights = expert_chunks.gradients(
        self.experts,
        whole,
        trip.send(x_ND),
        trip.choice_RA,
        trip.gate_RA,
        trip.send(dy_ND),
        dweights,
        chunk=chunk,
      )
      return (
        dx_ND + trip.send_back(dx_RD, x_ND.dtype),
        dgate_NA + trip.send_back_choices(dgate_RA),
        dweights,
      )

    wide = precision.accumulator(x_ND.dtype)
    sums = (
      jnp.zeros(x_ND.shape, wide),
      jnp.zeros(journey.gate_NA.shape, wide),
      expert_chunks.zeros_like(whole),
    )
    dx_ND, dgate_NA, dweights = journey.for_each(one_round, sums)
    dx_ND = self._sum_parts(dx_ND, x_ND.dtype).astype(x_ND.dtype)
    dgate_NA = self._sum_parts(dgate_NA, wide).astype(gate_BTA.dtype)
    return (
      dx_ND.reshape(x_BTD.shape),
      dgate_NA.reshape(gate_BTA.shape),
      self._scatter_weights(dweights, weights),
    )

  def _journey(
    self, expert_index_BTA: Array, gate_BTA: Array
  ) -> tuple[Journey, int]:
    """The tokens' rounds, and the pairs of a chunk."""
    devices = Devices(
      axis_names=self.expert_axes,
      count=self.parallel.size(*self.expert_axes),
      all_names=self.parallel.mesh.axis_names,
      num_experts=self.num_experts,
    )
    index_NA = _flat(expert_index_BTA)
    num_tokens, num_choices = index_NA.shape
    journey = Journey.make(devices, self.exchange, index_NA, _flat(gate_BTA))
    return journey, self.exchange.pairs(num_tokens, num_choices)

  def _sum_parts(self, x: Array, dtype: Any) -> Array:
    """Sums over the devices that hold parts of F.

    In the type of activations, as with every other product whose contracted
    dim is cut.
    """
    if not self.partial_axes:
      return x
    return lax.psum(x.astype(dtype), self.partial_axes).astype(x.dtype)

  def _gathered_dims(self, names: tuple[str, ...]):
    """Dims of a weight that are cut, but not as experts or their width."""
    spec = self.parallel.spec(*names)
    for dim, (name, cut) in enumerate(zip(names, spec, strict=True)):
      cut = (cut,) if isinstance(cut, str) else (cut or ())
      over = tuple(axis for axis in cut if self.parallel.size(axis) > 1)
      if over and name not in (axes.EXPERTS, axes.EXPERT_MLP):
        yield dim, over

  def _gather_weights(self, weights: Sequence[Array]) -> tuple[Array, ...]:
    whole = []
    for weight, names in zip(weights, self.weight_axes, strict=True):
      for dim, over in self._gathered_dims(names):
        weight = lax.all_gather(weight, over, axis=dim, tiled=True)
      whole.append(weight)
    return tuple(whole)

  def _scatter_weights(
    self, dweights: Sequence[Array], weights: Sequence[Array]
  ) -> tuple[Array, ...]:
    """Sums gradients over all tokens and cuts them as the weights are cut."""
    cut = []
    for dweight, weight, names in zip(
      dweights, weights, self.weight_axes, strict=True
    ):
      # In the weights' own type, as with every other weight.
      dweight = dweight.astype(weight.dtype)
      rest = set(self.token_axes) - set(self.expert_axes)
      for dim, over in self._gathered_dims(names):
        dweight = lax.psum_scatter(
          dweight, over, scatter_dimension=dim, tiled=True
        )
        rest -= set(over)
      if rest:
        over = tuple(name for name in self.token_axes if name in rest)
        dweight = lax.psum(dweight, over)
      cut.append(dweight)
    return tuple(cut)


def _flat(x_BTX: Array) -> Array:
  """Tokens of this device end to end; a local merge, nothing moves."""
  return x_BTX.reshape(-1, x_BTX.shape[-1])
