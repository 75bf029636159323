"""Packing of responses and their records into rows."""

import dataclasses

import numpy as np
import pytest

from dsv32_jax.config.rl import GRPOConfig
from dsv32_jax.rl import batches, packing
from dsv32_jax.rl.types import Group, Scored
from tests.support import rl_cases, tiny_configs

CFG = tiny_configs.config(num_hidden_layers=3)
K = CFG.index_topk
GRPO = GRPOConfig(
  kl_strength=0.01, domain_kl_strength={'mathematics': 0.5}, mask_delta=0.1
)


def group(*sizes, domain='mathematics', rewards=None) -> Group:
  rewards = rewards or np.linspace(0, 1, len(sizes))
  return Group(
    problem='p', domain=domain, mode='chat',
    responses=tuple(
      Scored(
        response=rl_cases.random_response(CFG, *size, seed=n),
        reward=float(reward),
      )
      for n, (size, reward) in enumerate(zip(sizes, rewards, strict=True))
    ),
  )  # fmt: skip


GROUPS = (
  group((3, 4), (3, 9), (3, 1)),
  group((5, 2), (5, 6), (5, 5), domain='programming'),
)
SAMPLES = batches.samples(GROUPS, GRPO)


def make(samples=SAMPLES, **changes):
  options = {'model': CFG, 'grpo': GRPO, 'row_tokens': 16}
  return batches.make_batch(samples, **(options | changes))


def test_batch_unpacks_to_the_responses():
  """Everything can be read back, record by record."""
  batch = make(domains=('programming', 'mathematics'), num_responses=9)
  assert batch.num_responses == 9
  assert batch.tokens_BT.shape == (3, 16)
  seen = set()
  for row in range(3):
    for segment in range(1, batch.segment_ids_BT[row].max() + 1):
      at = (row, np.flatnonzero(batch.segment_ids_BT[row] == segment))
      place = at[1]
      assert np.all(np.diff(place) == 1)
      (number,) = set(batch.response_BT[at].tolist()) - {-1}
      seen.add(number)
      sample = SAMPLES[number]
      found = sample.response
      np.testing.assert_array_equal(batch.tokens_BT[at], found.tokens[:-1])
      np.testing.assert_array_equal(batch.targets_BT[at], found.tokens[1:])
      np.testing.assert_array_equal(
        batch.positions_BT[at], np.arange(place.size)
      )
      is_policy = found.is_policy[1:]
      np.testing.assert_array_equal(batch.response_BT[at] >= 0, is_policy)
      np.testing.assert_allclose(
        batch.weight_BT[at], is_policy / found.num_policy_tokens / 6, rtol=1e-6
      )
      np.testing.assert_allclose(
        batch.advantage_BT[at], is_policy * sample.advantage, rtol=1e-6
      )
      np.testing.assert_array_equal(
        batch.sampling_logprob_BT[at], found.sampling_logprobs[1:]
      )
      beta = 0.5 if sample.domain == 'mathematics' else 0.01
      np.testing.assert_allclose(
        batch.kl_strength_BT[at], is_policy * beta, rtol=1e-6
      )
      np.testing.assert_allclose(
        batch.temperature_BT[at], np.where(is_policy, 0.7, 1), rtol=1e-6
      )
      assert np.all(
        batch.domain_BT[at] == (1 if sample.domain == 'mathematics' else 0)
      )
      np.testing.assert_array_equal(batch.experts_BTLA[at], found.experts)
      moved = np.where(found.selected >= 0, found.selected + place[0], -1)
      np.testing.assert_array_equal(batch.selected_BTLK[at], moved)
      sets = batch.kept_BTK[at]
      assert np.all(sets[~is_policy] == -1)
      for members, ids in zip(sets[is_policy], found.kept, strict=True):
        own = members[members >= 0]
        assert own.tolist() == ([] if ids is None else ids.tolist())
  assert seen == set(range(6))
  is_padding = batch.segment_ids_BT == 0
  assert np.all(batch.experts_BTLA[is_padding] == -1)
  assert np.all(batch.selected_BTLK[is_padding] == -1)
  assert np.all(batch.response_BT[is_padding] == -1)
  assert np.all(batch.temperature_BT[is_padding] == 1)
  np.testing.assert_allclose(batch.weight_BT.sum(), 1, rtol=1e-6)
  assert {leaf.shape[:2] for leaf in _leaves(batch)} == {(3, 16)}


def _leaves(batch):
  values = (getattr(batch, f.name) for f in dataclasses.fields(batch))
  return [value for value in values if isinstance(value, np.ndarray)]


def test_batch_of_groups_of_several_sizes_weighs_groups_alike():
  groups = (group((3, 4), (3, 9)), group((3, 1), (2, 2), (4, 4), (4, 1)))
  batch = make(batches.samples(groups, GRPO))
  total = [
    batch.weight_BT[batch.response_BT == number].sum() for number in range(6)
  ]
  np.testing.assert_allclose(total, [1 / 4] * 2 + [1 / 8] * 4, rtol=1e-6)


def test_samples_divide_by_the_deviation_if_asked():
  advantages = [s.advantage for s in batches.samples(GROUPS[:1], GRPO)]
  np.testing.assert_allclose(advantages, [-0.5, 0, 0.5])
  grpo = dataclasses.replace(GRPO, divide_by_std=True)
  advantages = [s.advantage for s in batches.samples(GROUPS[:1], grpo)]
  np.testing.assert_allclose(advantages, [-1, 0, 1], rtol=1e-3)


def test_minibatches_deal_out_every_sample_once():
  found = batches.minibatches(SAMPLES, 4, seed=(3, 1))
  assert sorted(len(part) for part in found) == [1, 1, 2, 2]
  assert {id(s) for part in found for s in part} == {id(s) for s in SAMPLES}
  again = batches.minibatches(SAMPLES, 4, seed=(3, 1))
  other = batches.minibatches(SAMPLES, 4, seed=(3, 2))

  def order(parts):
    return [id(s) for part in parts for s in part]

  assert order(found) == order(again)
  assert order(found) != order(other)
  with pytest.raises(ValueError, match='minibatches: got 7 for 6 responses'):
    batches.minibatches(SAMPLES, 7, seed=0)


def test_pack_fills_rows_without_overlap():
  rng = np.random.default_rng(0)
  sizes = rng.integers(1, 40, 200).tolist()
  places = packing.pack(sizes, 64)
  used = np.zeros((places.num_rows, 64), int)
  for number in range(len(sizes)):
    used[places.of(number)] += 1
  assert used.max() == 1
  assert used.sum() == sum(sizes)
  # First fit, longest first, is within 11/9 of the least number of rows.
  assert places.num_rows <= np.ceil(11 / 9 * np.ceil(sum(sizes) / 64)) + 1


def test_rows_are_as_asked_or_as_few_as_needed():
  assert batches.rows_needed(SAMPLES, 16) == 3
  assert make(rows=5).tokens_BT.shape == (5, 16)
  assert make(row_multiple=4).tokens_BT.shape == (4, 16)
  with pytest.raises(ValueError, match='rows: got 2 of 16 tokens, expected at '
                                       'least 3'):  # fmt: skip
    make(rows=2)


def test_too_long_a_response_is_an_error():
  assert make(row_tokens=11).tokens_BT.shape[1] == 11
  message = 'got 10 for response 1 of 12 tokens, expected at least 11'
  with pytest.raises(ValueError, match=f'row_tokens: {message}'):
    make(row_tokens=10)


def test_kept_sets_have_the_cap_or_the_largest():
  assert make().kept_BTK.shape == (3, 16, 3)
  assert make(kept_cap=8).kept_BTK.shape == (3, 16, 8)
  with pytest.raises(ValueError, match='kept_cap: got 2 for a set of 3 ids'):
    make(kept_cap=2)
  grpo = dataclasses.replace(GRPO, keep_sampling_mask=False)
  assert make(grpo=grpo).kept_BTK is None
  free = with_changes(kept=lambda r: (None,) * r.num_policy_tokens)
  assert make(free).kept_BTK is None
  assert np.all(make(free, kept_cap=4).kept_BTK == -1)


def with_changes(**changes):
  """All samples, their responses with other values of some fields."""

  def changed(found):
    return dataclasses.replace(
      found, **{name: make(found) for name, make in changes.items()}
    )

  return [dataclasses.replace(s, response=changed(s.response)) for s in SAMPLES]


@pytest.mark.parametrize(
  ('switch', 'name', 'field'),
  [
    ('keep_routing', 'experts', 'experts_BTLA'),
    ('keep_selection', 'selected', 'selected_BTLK'),
  ],
)
def test_records_are_needed_to_replay_and_kept_to_compare(switch, name, field):
  missing = [
    dataclasses.replace(s, response=rl_cases.without(s.response, name))
    for s in SAMPLES[:1]
  ] + SAMPLES[1:]
  message = rf'{name}: got none recorded for response 0.*with {switch}'
  with pytest.raises(ValueError, match=message):
    make(missing)
  grpo = dataclasses.replace(GRPO, **{switch: False})
  assert getattr(make(missing, grpo=grpo), field) is None
  np.testing.assert_array_equal(
    getattr(make(grpo=grpo), field), getattr(make(), field)
  )


def test_kept_sets_are_needed_to_replay_unless_nothing_was_truncated():
  none = with_changes(kept=lambda r: None)
  assert make(none).kept_BTK is None
  with pytest.raises(
    ValueError, match='kept: got none recorded for response 0'
  ):
    make(none, kept_cap=5)
  with pytest.raises(
    ValueError, match='kept: got none recorded for response 1'
  ):
    make([SAMPLES[0], *none[1:]])


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'experts': lambda r: r.experts[:, :1]},
      'experts: got a record of 1 layers with 2 experts a token for response '
      '0, expected 2 and 2',
    ),
    (
      {'experts': lambda r: r.experts + 1},
      'experts: got ids from 1 to 8 in response 0, expected 0 to 7',
    ),
    (
      {'experts': lambda r: np.where(r.experts == 7, -1, r.experts)},
      'experts: got ids from -1 to',
    ),
    (
      {'selected': lambda r: r.selected[:, :2]},
      'selected: got a record of 2 layers for response 0, expected 3',
    ),
    (
      {'selected': lambda r: r.selected + 1},
      'selected: got a key after its query',
    ),
    (
      {'selected': lambda r: np.full_like(r.selected, -1)},
      'selected: got no key for a token of response 0',
    ),
    (
      {'selected': lambda r: np.concatenate([r.selected] * 2, axis=-1)},
      'selected: got more than 6 keys of a token in response 0',
    ),
    (
      {
        'kept': lambda r: tuple(
          np.append(t, 99) for t in r.policy_tokens
        )
      },
      'kept: got ids from .* to 99 in response 0, expected 0 to 31',
    ),
  ],
)  # fmt: skip
def test_records_that_do_not_fit_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    make(with_changes(**changes))


def test_selections_of_wider_tables_are_cut_to_their_members():
  """An engine may select from more places than a row has."""

  def widened(r):
    wide = np.full((*r.selected.shape[:2], K + 5), -1)
    wide[..., 5:] = r.selected
    return wide

  found = make(with_changes(selected=widened))
  np.testing.assert_array_equal(found.selected_BTLK, make().selected_BTLK)


def test_batch_refuses_an_unlisted_domain_and_too_few_responses():
  message = r"domains: got \['mathematics'\] without \['programming'\]"
  with pytest.raises(ValueError, match=message):
    make(domains=('mathematics',))
  with pytest.raises(ValueError, match='num_responses: got 5 for 6 responses'):
    make(num_responses=5)
  with pytest.raises(ValueError, match='samples: got none'):
    make([])
