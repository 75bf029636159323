"""Tokens to the devices of their experts and back, inside a `shard_map`.

`Journey` is what one device's tokens have before them: rounds of slots (see
`expert_slots`), each an all-to-all there and one back. With one device along
the axis nobody travels and there is one round.

Letters: N tokens of this device, A experts a token, P devices that share the
experts, C slots for each of them a round, R = P C received rows, X any width.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv32_jax.functional import expert_slots

_LEAST_CHUNK = 1024
"""Pairs below which a loop costs more than the memory it saves."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
  """How tokens travel. No choice here changes a result but by rounding.

  Attributes:
    devices_a_token: how many a token visits on average, see
      `expert_slots.expected_devices`; None for as many as experts.
    factor: room for imbalance. A round has slots for this many times the even
      share of each device, and a chunk of experts this many times the pairs of
      a device. More costs memory and empty slots, less costs rounds.
    capacity: slots for each device a round, instead of by `factor`.
    chunk: (row, expert) pairs that are computed at once, instead of by
      `factor`.
    kind: 'dense' sends empty slots, too; 'ragged' only filled ones (GPUs of one
      host); None takes the layout's, see `MeshConfig`.
  """

  devices_a_token: float | None = None
  factor: float = 1.25
  capacity: int | None = None
  chunk: int | None = None
  kind: Literal['dense', 'ragged'] | None = None

  def slots(self, num_tokens: int, num_choices: int, num_devices: int) -> int:
    """C of N tokens with A choices."""
    if num_devices == 1:
      return num_tokens
    if self.capacity is not None:
      return min(self.capacity, num_tokens)
    return expert_slots.capacity(
      num_tokens,
      num_devices=num_devices,
      devices_a_token=self.devices_a_token or num_choices,
      factor=self.factor,
    )

  def pairs(self, num_tokens: int, num_choices: int) -> int:
    """Pairs of a chunk, for N tokens a device."""
    even = math.ceil(self.factor * num_tokens * num_choices)
    return self.chunk or max(expert_slots.round_up(even), _LEAST_CHUNK)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
  """Who exchanges.

  Attributes:
    axis_names: mesh axes that experts are cut over; empty if none.
    count: P, devices along these.
    all_names: every mesh axis, over which the number of rounds is agreed.
    num_experts: E.
  """

  axis_names: tuple[str, ...]
  count: int
  all_names: tuple[str, ...]
  num_experts: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Journey:
  """All rounds of one device's tokens.

  Attributes:
    devices: who exchanges.
    kind: of the exchange.
    capacity: C.
    expert_index_NA: experts of each token.
    gate_NA: their weights.
    slots: the tokens' slots; None with one device.
  """

  devices: Devices
  kind: Literal['dense', 'ragged']
  capacity: int
  expert_index_NA: Int[Array, 'N A']
  gate_NA: Float[Array, 'N A']
  slots: expert_slots.Slots | None

  @classmethod
  def make(
    cls,
    devices: Devices,
    exchange: Exchange,
    expert_index_NA: Int[Array, 'N A'],
    gate_NA: Float[Array, 'N A'],
  ) -> 'Journey':
    num_tokens, num_choices = expert_index_NA.shape
    slots = None
    if devices.count > 1:
      slots = expert_slots.make_slots(
        expert_index_NA,
        num_devices=devices.count,
        num_experts=devices.num_experts,
      )
    return cls(
      devices=devices,
      kind=exchange.kind or 'dense',
      capacity=exchange.slots(num_tokens, num_choices, devices.count),
      expert_index_NA=expert_index_NA,
      gate_NA=gate_NA,
      slots=slots,
    )

  def for_each(self, one_round: Callable[['Trip', Any], Any], sums: Any) -> Any:
    """Runs as many rounds as the fullest device of the mesh needs.

    The first round stands outside of the loop: it is nearly always the only
    one, and schedulers move nothing into or out of a loop.

    Args:
      one_round: (trip, sums) -> sums.
      sums: before the first round.
    """
    sums = one_round(self._trip(0), sums)
    if self.slots is None or self.capacity >= self.expert_index_NA.shape[0]:
      return sums
    rounds = expert_slots.num_rounds(self.slots, self.capacity)
    # Over the whole mesh, as one_round may hold collectives over other axes.
    rounds = lax.pmax(rounds, self.devices.all_names)
    return lax.fori_loop(
      1, rounds, lambda number, sums: one_round(self._trip(number), sums), sums
    )

  def _trip(self, number: int | Array) -> 'Trip':
    if self.slots is None:
      return Trip(self, None, self.expert_index_NA, self.gate_NA, None)
    trip = expert_slots.take_round(self.slots, number, self.capacity)
    sent_PCX = expert_slots.spread_choices(
      self.expert_index_NA,
      self.gate_NA,
      trip,
      num_experts=self.devices.num_experts,
    )
    got_PCX = _dense(sent_PCX, self.devices)
    choice_PCA, gate_PCA = jnp.split(got_PCX, 2, axis=-1)
    choice_PCA = choice_PCA.astype(jnp.int32)
    num_local = self.devices.num_experts // self.devices.count
    # A filled slot brings at least one expert of this device.
    is_filled_PC = jnp.any(choice_PCA < num_local, axis=-1)
    size_P = jnp.sum(is_filled_PC, axis=-1, dtype=jnp.int32)
    return Trip(self, trip, _rows(choice_PCA), _rows(gate_PCA), size_P)


@dataclasses.dataclass(frozen=True)
class Trip:
  """One round.

  Attributes:
    journey: what it is a part of.
    round: the slots that go out; None with one device.
    choice_RA: what each received row needs, in 0..E/P-1; E / P for nothing.
    gate_RA: weights of these experts.
    size_P: received rows from each device; None with one device.
  """

  journey: Journey
  round: expert_slots.Round | None
  choice_RA: Int[Array, 'R A']
  gate_RA: Float[Array, 'R A']
  size_P: Any

  def send(self, x_NX: Float[Array, 'N X']) -> Float[Array, 'R X']:
    """Rows from all devices whose tokens have an expert here."""
    if self.round is None:
      return x_NX
    rows_PCX = expert_slots.spread(x_NX, self.round)
    return _rows(self._exchange(rows_PCX, self.round.size_P, self.size_P))

  def send_back(
    self, rows_RX: Float[Array, 'R X'], dtype: Any
  ) -> Float[Array, 'N X']:
    """The sum of what the devices made of each token, at least float32.

    Args:
      rows_RX: one for each received row.
      dtype: the type in which rows travel.
    """
    if self.round is None:
      return rows_RX
    rows_PCX = _slots(rows_RX.astype(dtype), self.journey.devices)
    rows_PCX = self._exchange(rows_PCX, self.size_P, self.round.size_P)
    return expert_slots.collect(rows_PCX, self.round)

  def send_back_choices(
    self, rows_RA: Float[Array, 'R A']
  ) -> Float[Array, 'N A']:
    """Likewise for a few numbers a token, in the type that they have."""
    if self.round is None:
      return rows_RA
    devices = self.journey.devices
    rows_PCA = _dense(_slots(rows_RA, devices), devices)
    return expert_slots.collect(rows_PCA, self.round)

  def _exchange(self, rows_PCX: Array, sent_P: Array, got_P: Array) -> Array:
    devices = self.journey.devices
    if self.journey.kind == 'ragged':
      return _ragged(rows_PCX, sent_P, got_P, devices)
    return _dense(rows_PCX, devices)


def _dense(rows_PCX: Array, devices: Devices) -> Array:
  """Block p goes to device p, whole."""
  return lax.all_to_all(rows_PCX, devices.axis_names, 0, 0, tiled=True)


def _ragged(
  rows_PCX: Array, sent_P: Array, got_P: Array, devices: Devices
) -> Array:
  """Likewise, the filled rows of each block only; the others are 0."""
  rows_RX = _rows(rows_PCX)
  capacity = rows_PCX.shape[1]
  first_P = capacity * jnp.arange(devices.count, dtype=jnp.int32)
  own = capacity * lax.axis_index(devices.axis_names).astype(jnp.int32)
  got_RX = lax.ragged_all_to_all(
    rows_RX,
    jnp.zeros_like(rows_RX),
    first_P,
    sent_P,
    jnp.full_like(first_P, own),
    got_P,
    axis_name=devices.axis_names,
  )
  return _slots(got_RX, devices)


def _rows(x_PCX: Array) -> Array:
  return x_PCX.reshape(-1, x_PCX.shape[-1])


def _slots(x_RX: Array, devices: Devices) -> Array:
  return x_RX.reshape(devices.count, -1, x_RX.shape[-1])
