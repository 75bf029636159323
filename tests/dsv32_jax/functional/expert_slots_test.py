"""Slots and rounds, against plain Python."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.functional import expert_slots, routing
from tests.support import tolerances

N, A, E, P = 29, 3, 12, 4


def _choices(seed=0, skewed=False):
  """Distinct experts; every fifth token has two only, every seventh none."""
  rng = np.random.default_rng(seed)
  index = np.stack([rng.permutation(E)[:A] for _ in range(N)])
  if skewed:
    index = np.where(rng.random(N)[:, None] < 0.7, [[3, 5, 4]], index)
  index[::5, 1] = E
  index[::7] = E
  return index


def _destinations(index):
  """Tokens that go to each device, in order."""
  local = E // P
  return [
    [n for n in range(N) if d in (index[n] // local).tolist()] for d in range(P)
  ]


@functools.partial(jax.jit, static_argnums=(3,))
def _round(index_NA, gate_NA, number, capacity):
  slots = expert_slots.make_slots(index_NA, num_devices=P, num_experts=E)
  trip = expert_slots.take_round(slots, number, capacity)
  sent = expert_slots.spread_choices(index_NA, gate_NA, trip, num_experts=E)
  token = jnp.arange(N, dtype=jnp.float32)[:, None]
  rows = expert_slots.spread(token, trip)
  # What comes back: the slot's number, so that places can be told apart.
  number_PC1 = jnp.arange(P * capacity, dtype=jnp.float32) + 1.0
  back = expert_slots.collect(number_PC1.reshape(P, capacity, 1), trip)
  rounds = expert_slots.num_rounds(slots, capacity)
  return trip.size_P, rows[..., 0], sent, back[:, 0], rounds


@pytest.mark.parametrize('capacity', [1, 4, N])
@pytest.mark.parametrize('skewed', [False, True])
def test_rounds_carry_every_token_to_each_device_of_its_experts_once(
  capacity, skewed
):
  index = _choices(skewed=skewed)
  gate = np.random.default_rng(1).random((N, A)).astype(np.float32)
  desired = _destinations(index)
  fullest = max(len(tokens) for tokens in desired)
  found = [[] for _ in range(P)]
  rounds = -(-fullest // capacity)
  for number in range(rounds + 1):
    sizes, rows, sent, back, needed = _round(index, gate, number, capacity)
    assert needed == rounds
    expected_back = np.zeros(N)
    for d in range(P):
      tokens = rows[d, : sizes[d]].astype(int).tolist()
      found[d] += tokens
      for column, n in enumerate(tokens):
        expected_back[n] += d * capacity + column + 1
        mine = index[n] // (E // P) == d
        choice = np.where(mine, index[n] - d * (E // P), E // P)
        np.testing.assert_array_equal(sent[d, column, :A], choice)
        np.testing.assert_array_equal(sent[d, column, A:], gate[n])
      # Nobody works for an empty slot.
      assert (sent[d, sizes[d] :, :A] == E // P).all()
    np.testing.assert_array_equal(back, expected_back)
    if number == rounds:
      assert not np.any(sizes)
  assert found == desired


def test_gather_sum_skips_negative_places_whatever_is_there(key):
  rows = jax.random.normal(key, (5, 3)).at[0].set(jnp.nan)
  place = jnp.array([[1, -1], [4, 2], [-1, -1]], jnp.int32)
  weight = jnp.array([[2.0, 3.0], [0.5, -1.0], [1.0, 1.0]])
  actual = expert_slots.gather_sum(rows, place, weight)
  desired = np.stack([2 * rows[1], 0.5 * rows[4] - rows[2], np.zeros(3)])
  tolerances.assert_close(actual, desired)
  assert expert_slots.gather_sum(rows.astype('bfloat16'), place).dtype == 'f4'


def _visits(index, num_devices):
  device = np.asarray(index) // (16 // num_devices)
  return (device[..., None] == np.arange(num_devices)).any(axis=1).sum(axis=1)


@pytest.mark.parametrize('num_devices', [2, 4, 8])
@pytest.mark.parametrize('n_group', [4, 1])
def test_expected_devices_is_the_mean_over_random_choices(num_devices, n_group):
  topk_group = max(n_group // 2, 1)
  rng = np.random.default_rng(0)
  group = np.argsort(rng.random((20_000, n_group)))[:, :topk_group]
  is_kept = (group[..., None] == np.arange(16) // (16 // n_group)).any(axis=1)
  index = np.argsort(rng.random((20_000, 16)) - is_kept)[:, :3]
  expected = expert_slots.expected_devices(
    num_devices,
    num_experts=16,
    num_experts_per_tok=3,
    n_group=n_group,
    topk_group=topk_group,
  )
  assert _visits(index, num_devices).mean() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize('num_devices', [2, 4])
def test_tokens_visit_at_most_as_many_devices_as_groups(key, num_devices):
  """Node-limited routing: a device, or a node, with whole groups."""
  logits = jax.random.normal(key, (2000, 16))
  route = jax.jit(
    lambda logits: routing.route(
      logits, None, num_experts_per_tok=4, n_group=4, topk_group=2
    )
  )
  assert _visits(route(logits).expert_index, num_devices).max() == 2


def test_expected_devices_counts_groups_that_cut_across_devices_as_none():
  sizes = {'num_experts': 24, 'num_experts_per_tok': 2}
  across = expert_slots.expected_devices(3, **sizes, n_group=4, topk_group=2)
  assert across == expert_slots.expected_devices(3, **sizes)


@pytest.mark.parametrize(
  ('arguments', 'desired'),
  [
    # 1.25 * 2 / 8 of the tokens, up to a multiple of 8.
    ({'num_tokens': 1000, 'num_devices': 8, 'devices_a_token': 2}, 320),
    ({'num_tokens': 1000, 'num_devices': 2, 'devices_a_token': 2}, 1000),
    ({'num_tokens': 3, 'num_devices': 8, 'devices_a_token': 2}, 3),
    ({'num_tokens': 100, 'num_devices': 64, 'devices_a_token': 1}, 8),
  ],
)
def test_capacity_is_the_even_share_with_room(arguments, desired):
  assert expert_slots.capacity(**arguments, factor=1.25) == desired
