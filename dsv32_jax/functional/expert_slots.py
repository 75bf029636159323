"""Which tokens one device sends to which, a bounded number at a time.

A token travels once to each device that holds at least one of its experts: a
slot is such a (token, device) pair. Slots go out in rounds of at most C for
each device, in the order of the tokens; as many rounds are made as the fullest
device needs, so C bounds the memory and never drops anything.

The experts of a device are consecutive, as those of a group are: a token visits
the devices of its `topk_group` groups only, hence at most so many devices, or
nodes, if each holds whole groups (node-limited routing, arXiv:2412.19437,
section 2.1.2).

Letters: N tokens of this device, A experts a token, P devices that share the
experts, C slots a device and round, M = N A (token, expert) pairs, X any width.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv32_jax.functional import expert_dispatch, precision

_MULTIPLE = 8
"""Capacities are rounded up to this many rows."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
  """Slots of this device's tokens, sorted by where they go.

  Attributes:
    token_M: int32, the token of each sorted slot; there are sum(count_P).
    row_NA: int32, the sorted slot of a pair that is the first of its token on
      its device; -1 for the others, which share that slot.
    device_NA: int32, where the expert of each pair lives; P for none.
    start_P: int32, the first sorted slot of each device.
    count_P: int32, slots of each device.
  """

  token_M: Any
  row_NA: Any
  device_NA: Any
  start_P: Any
  count_P: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Round:
  """The slots that travel together.

  Attributes:
    token_PC: int32, the token in each slot; any token in an empty one.
    size_P: int32, slots that are filled, the first ones.
    place_NA: int32, where in P * C slots a pair's slot is; -1 if it has none in
      this round, or shares one with an earlier pair.
  """

  token_PC: Any
  size_P: Any
  place_NA: Any


def expected_devices(
  num_devices: int,
  *,
  num_experts: int,
  num_experts_per_tok: int,
  n_group: int = 1,
  topk_group: int = 1,
) -> float:
  """Devices that a token visits on average, if all choices are equally likely.

  Choices are A experts out of `topk_group` groups. At most A devices are
  visited, and at most `topk_group` if a device holds one whole group or more.

  Args:
    num_devices: P, a divisor of the experts.
    num_experts: E.
    num_experts_per_tok: A.
    n_group: groups of consecutive experts; 1 where the router has none.
    topk_group: groups that a token may choose from.
  """
  local, group = num_experts // num_devices, num_experts // n_group
  if local % group and group % local:
    # Devices and groups cut across each other: as if there were no groups.
    n_group, topk_group, group = 1, 1, num_experts
  allowed, choices = topk_group * group, num_experts_per_tok
  groups_here, of_a_group = max(local // group, 1), min(local, group)
  nobody = 0.0
  # Of the groups on a device, `chosen` are among the token's.
  for chosen in range(min(groups_here, topk_group) + 1):
    ways = math.comb(groups_here, chosen) * math.comb(
      n_group - groups_here, topk_group - chosen
    )
    elsewhere = math.comb(allowed - chosen * of_a_group, choices)
    nobody += ways * elsewhere
  nobody /= math.comb(n_group, topk_group) * math.comb(allowed, choices)
  return num_devices * (1 - nobody)


def capacity(
  num_tokens: int,
  *,
  num_devices: int,
  devices_a_token: int | float,
  factor: int | float,
) -> int:
  """Slots for each device in a round, at most one a token.

  Args:
    num_tokens: N.
    num_devices: P.
    devices_a_token: how many a token visits on average.
    factor: room above the even share of N `devices_a_token` / P.
  """
  share = min(1.0, factor * devices_a_token / num_devices)
  return min(num_tokens, round_up(math.ceil(share * num_tokens)))


def round_up(size: int) -> int:
  """The next multiple of 8, which kernels like."""
  return -(-max(size, 1) // _MULTIPLE) * _MULTIPLE


def make_slots(
  expert_index_NA: Int[Array, 'N A'], *, num_devices: int, num_experts: int
) -> Slots:
  """Sorts the slots of this device's tokens by destination.

  Args:
    expert_index_NA: distinct experts of each token; E for a pair that goes
      nowhere.
    num_devices: P, each with E / P consecutive experts.
    num_experts: E.
  """
  num_choices = expert_index_NA.shape[1]
  device_NA = expert_index_NA.astype(jnp.int32) // (num_experts // num_devices)
  earlier_AA = jnp.tril(jnp.ones((num_choices, num_choices), jnp.bool_), k=-1)
  is_same_NAA = device_NA[:, :, None] == device_NA[:, None, :]
  is_first_NA = ~jnp.any(is_same_NAA & earlier_AA[None], axis=-1)
  is_slot_NA = is_first_NA & (device_NA < num_devices)
  order = expert_dispatch.sort_by_expert(
    jnp.where(is_slot_NA, device_NA, num_devices), num_experts=num_devices
  )
  count_P = order.group_sizes_E
  return Slots(
    token_M=order.pair_M // num_choices,
    row_NA=jnp.where(is_slot_NA, order.row_NA, -1),
    device_NA=device_NA,
    start_P=jnp.cumsum(count_P, dtype=jnp.int32) - count_P,
    count_P=count_P,
  )


def num_rounds(slots: Slots, capacity: int) -> Int[Array, '']:
  """Rounds that this device's tokens need; the others may need more."""
  return (jnp.max(slots.count_P) + capacity - 1) // capacity


def take_round(
  slots: Slots, number: int | Int[Array, ''], capacity: int
) -> Round:
  """The slots of a round, from 0; empty past the last round.

  Args:
    slots: from `make_slots`.
    number: of the round.
    capacity: C.
  """
  num_devices = slots.count_P.shape[0]
  first_P = slots.start_P + number * capacity
  column_C = jnp.arange(capacity, dtype=jnp.int32)
  row_PC = first_P[:, None] + column_C[None, :]
  row_PC = jnp.minimum(row_PC, slots.token_M.shape[0] - 1)
  device_NA = jnp.minimum(slots.device_NA, num_devices - 1)
  column_NA = slots.row_NA - _rows(first_P, device_NA)
  is_here_NA = (slots.row_NA >= 0) & (column_NA >= 0) & (column_NA < capacity)
  return Round(
    token_PC=_rows(slots.token_M, row_PC),
    size_P=jnp.clip(slots.count_P - number * capacity, 0, capacity),
    place_NA=jnp.where(is_here_NA, device_NA * capacity + column_NA, -1),
  )


def spread(x_NX: Float[Array, 'N X'], trip: Round) -> Float[Array, 'P C X']:
  """The row of the token in each slot; some token's where a slot is empty."""
  return _rows(x_NX, trip.token_PC)


def spread_choices(
  expert_index_NA: Int[Array, 'N A'],
  gate_NA: Float[Array, 'N A'],
  trip: Round,
  *,
  num_experts: int,
) -> Float[Array, 'P C 2*A']:
  """What a device must know of the experts of each slot, in one array.

  Args:
    expert_index_NA: experts of each token, E for none.
    gate_NA: their weights.
    trip: the round.
    num_experts: E.

  Returns:
    A numbers of experts, counted on the device they go to, E / P for an expert
    of another device or no slot; and A gates. All in the gates' type, in which
    these integers are exact.
  """
  num_devices, capacity = trip.token_PC.shape
  num_local = num_experts // num_devices
  expert_PCA = _rows(expert_index_NA.astype(jnp.int32), trip.token_PC)
  first_P = num_local * jnp.arange(num_devices, dtype=jnp.int32)
  choice_PCA = expert_PCA - first_P[:, None, None]
  column_C = jnp.arange(capacity, dtype=jnp.int32)
  is_filled_PC = column_C[None, :] < trip.size_P[:, None]
  is_mine_PCA = (choice_PCA >= 0) & (choice_PCA < num_local)
  choice_PCA = jnp.where(
    is_filled_PC[:, :, None] & is_mine_PCA, choice_PCA, num_local
  )
  gate_PCA = _rows(gate_NA, trip.token_PC)
  return jnp.concatenate([choice_PCA.astype(gate_PCA.dtype), gate_PCA], axis=-1)


def collect(
  rows_PCX: Float[Array, 'P C X'], trip: Round
) -> Float[Array, 'N X']:
  """Sums what came back in the slots of each token, at least in float32."""
  rows_SX = rows_PCX.reshape(-1, rows_PCX.shape[-1])
  return gather_sum(rows_SX, trip.place_NA)


def gather_sum(
  rows_SX: Float[Array, 'S X'],
  place_NA: Int[Array, 'N A'],
  weight_NA: Float[Array, 'N A'] | None = None,
) -> Float[Array, 'N X']:
  """out[n] = sum over a of weight[n, a] rows[place[n, a]], place >= 0.

  Args:
    rows_SX: any rows; what nobody points at may be anything.
    place_NA: rows to add; negative for none.
    weight_NA: their weights; None for 1.

  Returns:
    At least float32.
  """
  wide = precision.accumulator(rows_SX.dtype)
  out_NX = jnp.zeros((place_NA.shape[0], rows_SX.shape[1]), wide)
  # A terms in a loop: one fused pass without [N, A, X]. All places that point
  # nowhere read the same row, which stays in a cache.
  for a in range(place_NA.shape[1]):
    place_N = place_NA[:, a]
    row_NX = _rows(rows_SX, jnp.maximum(place_N, 0)).astype(wide)
    if weight_NA is not None:
      row_NX = row_NX * weight_NA[:, a : a + 1].astype(wide)
    out_NX += jnp.where((place_N >= 0)[:, None], row_NX, 0)
  return out_NX


def _rows(x: Array, index: Array) -> Array:
  return x.at[index].get(mode='promise_in_bounds')
