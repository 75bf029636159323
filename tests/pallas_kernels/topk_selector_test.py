"""Tests of the token selection, every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
  Selection,
  indexed_topk,
  indices_to_mask,
  lightning_indexer,
  select_topk,
  selection_mask,
)
from pallas_kernels.lightning_indexer import arg_specs as indexer_specs
from pallas_kernels.topk_selector import (
  INDEXED_TOPK_IMPLEMENTATIONS,
  SELECT_TOPK_IMPLEMENTATIONS,
  arg_specs,
)
from tests.pallas_kernels import topk_selector_cases as cases

SPECS = arg_specs.TEST_SPECS


# Kernels only where there is a GPU; the others everywhere.
implementations = ['xla', 'reference', *cases.KERNELS]


def _with(op, implementation):
  run = functools.partial(op, implementation=implementation)
  on_cpu = implementation in ('xla', 'reference')
  return run if on_cpu else cases.or_skip(run)


@pytest.fixture(params=implementations)
def select(request):
  return _with(select_topk, request.param)


@pytest.fixture(params=implementations)
def index_and_select(request):
  return _with(indexed_topk, request.param)


def test_every_implementation_is_tested():
  tested = {getattr(x, 'values', (x,))[0] for x in implementations}
  assert tested == {*SELECT_TOPK_IMPLEMENTATIONS}
  assert tested == {*INDEXED_TOPK_IMPLEMENTATIONS}


def oracle(scores, k):
  """Mask of the selected keys by a Python sort of (-score, index)."""
  scores = np.asarray(scores).astype(np.float64)
  mask = np.zeros(scores.shape, bool)
  for row in np.ndindex(scores.shape[:-1]):
    order = sorted(
      (-score, s) for s, score in enumerate(scores[row]) if score > -np.inf
    )
    mask[row][[s for _, s in order[:k]]] = True
  return mask


def as_mask(selection, num_keys):
  """Checks the form of a selection, and gives it as a mask."""
  indices = np.asarray(selection.indices_BTK)
  assert indices.dtype == np.int32
  assert np.all((indices >= -1) & (indices < num_keys))
  valid = np.asarray(selection.valid_BTK)
  np.testing.assert_array_equal(valid, indices >= 0)
  mask = np.zeros((*indices.shape[:2], num_keys), bool)
  for row in np.ndindex(indices.shape[:2]):
    chosen = indices[row][valid[row]]
    assert len(set(chosen.tolist())) == len(chosen)
    mask[row][chosen] = True
  return mask


def check(select, scores, k):
  selection = select(jnp.asarray(scores), k=k)
  assert selection.indices_BTK.shape == (*scores.shape[:2], k)
  desired = oracle(scores, k)
  np.testing.assert_array_equal(as_mask(selection, scores.shape[2]), desired)
  np.testing.assert_array_equal(
    selection_mask(jnp.asarray(scores), k=k), desired
  )


def causal(scores):
  T, S = scores.shape[1:]
  valid = np.arange(S) < np.arange(T)[:, None] + 1 + S - T
  return np.where(valid, scores, -np.inf).astype(np.float32)


SHAPES = [
  (2, 9, 9, 4),
  (1, 5, 1, 3),
  pytest.param(1, 700, 90, 17, marks=pytest.mark.slow),
  pytest.param(1, 3, 1025, 512, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(('B', 'T', 'S', 'k'), SHAPES)
def test_select_random_scores_match_a_sort(select, B, T, S, k):
  rng = np.random.default_rng(B + T + S)
  # Twelve decades, both signs.
  scores = rng.normal(size=(B, T, S)) * 10.0 ** rng.uniform(-6, 6, (B, T, S))
  check(select, causal(scores), k)


@pytest.mark.parametrize(('B', 'T', 'S', 'k'), SHAPES)
def test_select_ties_take_the_lowest_index(select, B, T, S, k):
  rng = np.random.default_rng(B + T + S)
  scores = np.round(rng.normal(size=(B, T, S)))
  check(select, causal(scores), k)


def test_select_zero_plateau_with_signed_zeros_takes_the_lowest(select):
  scores = np.zeros((1, 2, 200), np.float32)
  scores[:, :, ::2] = -0.0
  scores[:, :, 150] = 1.0
  scores[:, :, :3] = -1.0
  check(select, scores, 10)
  indices = np.asarray(select(jnp.asarray(scores), k=10).indices_BTK)
  assert set(indices[0, 0].tolist()) == {*range(3, 12), 150}


def test_select_never_takes_nan_or_minus_infinity(select):
  rng = np.random.default_rng(0)
  scores = rng.normal(size=(2, 40, 70)).astype(np.float32)
  scores[rng.random(scores.shape) < 0.4] = np.nan
  scores[rng.random(scores.shape) < 0.4] = -np.inf
  scores[0, 0] = np.nan
  scores[0, 1] = -np.inf
  scores[0, 2, 5] = -np.nan
  scores[0, 3, 7] = np.inf
  check(select, scores, 20)
  indices = select(jnp.asarray(scores), k=20).indices_BTK
  assert np.all(np.asarray(indices)[0, :2] == -1)


def test_select_extreme_floats_are_ordered(select):
  tiny = np.finfo(np.float32).tiny
  high = np.finfo(np.float32).max
  values = [np.inf, high, 1.0, tiny, 0.0, -tiny, -1.0, -high]
  neighbours = [np.nextafter(np.float32(1), np.float32(d)) for d in (0, 2)]
  values = np.asarray([*values, *neighbours], np.float32)
  rng = np.random.default_rng(1)
  scores = np.stack([rng.permutation(values) for _ in range(10)])[None]
  for k in (3, 7):
    check(select, scores, k)


def test_select_bfloat16_scores_match_a_sort(select):
  rng = np.random.default_rng(2)
  scores = jnp.asarray(rng.normal(size=(1, 20, 300)), jnp.bfloat16)
  mask = as_mask(select(scores, k=50), 300)
  np.testing.assert_array_equal(mask, oracle(scores.astype(jnp.float32), 50))


def test_select_xla_indices_ascend_and_padding_comes_last():
  scores = causal(np.random.default_rng(3).normal(size=(1, 60, 60)))
  indices = np.asarray(
    select_topk(jnp.asarray(scores), k=16, implementation='xla').indices_BTK
  )
  for t, row in enumerate(indices[0]):
    count = min(t + 1, 16)
    assert np.all(np.diff(row[:count]) > 0)
    assert np.all(row[count:] == -1)


def test_select_all_keys_when_k_reaches_the_valid_ones(select):
  scores = causal(np.random.default_rng(4).normal(size=(1, 40, 40)))
  mask = as_mask(select(jnp.asarray(scores), k=25), 40)
  np.testing.assert_array_equal(mask[:, :25], scores[:, :25] > -np.inf)


def test_select_row_ignores_batch_composition_and_length(select):
  rng = np.random.default_rng(5)
  scores = np.round(2 * rng.normal(size=(3, 50, 400))).astype(np.float32)
  scores[..., 130:] = -np.inf
  whole = select(jnp.asarray(scores), k=30).indices_BTK
  alone = select(jnp.asarray(scores[1:2, 7:9, :130]), k=30).indices_BTK
  np.testing.assert_array_equal(whole[1:2, 7:9], alone)


def test_select_gives_no_gradient():
  scores = jnp.asarray(np.random.default_rng(6).normal(size=(1, 4, 9)))

  def total(scores):
    chosen = select_topk(scores, k=3).indices_BTK
    return jnp.sum(jnp.take_along_axis(scores, chosen, axis=-1))

  grad = jax.grad(total)(scores.astype(jnp.float32))
  np.testing.assert_array_equal(grad, oracle(scores, 3))


def test_indices_to_mask_ignores_padding_and_order():
  indices = jnp.asarray([[[4, -1, 0], [-1, -1, -1]]], jnp.int32)
  mask = indices_to_mask(indices, 5)
  np.testing.assert_array_equal(
    mask, [[[True, False, False, False, True], [False] * 5]]
  )


@pytest.mark.parametrize('name', SPECS)
def test_indexed_selection_matches_the_oracle_on_whole_numbers(
  index_and_select, name
):
  spec = SPECS[name]
  q, k, w = spec.indexer.make(seed=7, integers=True)
  scores = lightning_indexer(q, k, w, implementation='reference')
  rows = np.asarray(scores)[np.isfinite(scores)]
  assert np.mean(rows == 0) > 0.1  # the plateau that this test is about
  mask = as_mask(index_and_select(q, k, w, k=spec.k), spec.indexer.keys)
  np.testing.assert_array_equal(mask, oracle(scores, spec.k))


def test_indexed_selection_of_zero_heads_takes_the_lowest(index_and_select):
  q = jnp.ones((1, 40, 2, 4))
  w = -jnp.ones((1, 40, 2))
  selection = index_and_select(q, -jnp.ones((1, 40, 4)), w, k=6)
  mask = as_mask(selection, 40)
  t, s = np.mgrid[:40, :40]
  np.testing.assert_array_equal(mask[0], (s <= t) & (s < 6))


def test_indexed_selection_keeps_to_packed_segments(index_and_select):
  lengths = [1, 300, 260, 80]
  start = np.zeros((1, 700), np.int32)
  end = np.zeros((1, 700), np.int32)
  first = 0
  for n in lengths:
    start[0, first : first + n] = first
    end[0, first : first + n] = np.arange(first, first + n) + 1
    first += n
  spec = indexer_specs.ArgSpec(batch=1, queries=700, keys=700, heads=2, dim=4)
  q, k, w = spec.make(seed=8, integers=True)
  ranges = {
    'key_start_BT': jnp.asarray(start),
    'key_end_BT': jnp.asarray(end),
  }
  mask = as_mask(index_and_select(q, k, w, k=24, **ranges), 700)
  s = np.arange(700)
  allowed = (s >= start[..., None]) & (s < end[..., None])
  assert not np.any(mask & ~allowed)
  np.testing.assert_array_equal(mask.sum(-1), np.minimum(allowed.sum(-1), 24))
  scores = lightning_indexer(q, k, w, implementation='reference', **ranges)
  np.testing.assert_array_equal(mask, oracle(scores, 24))


def test_indexed_selection_of_a_cached_decode_equals_the_prefill_row():
  spec = indexer_specs.ArgSpec(batch=2, queries=90, keys=90, heads=2, dim=4)
  q, k, w = spec.make(seed=9, integers=True)
  prefill = indexed_topk(q, k, w, k=16).indices_BTK
  cache = jnp.pad(k, ((0, 0), (0, 1000), (0, 0)), constant_values=9.0)
  for t in (0, 15, 16, 89):
    step = indexed_topk(
      q[:, t : t + 1],
      cache,
      w[:, t : t + 1],
      k=16,
      key_start_BT=jnp.zeros((2, 1), jnp.int32),
      key_end_BT=jnp.full((2, 1), t + 1, jnp.int32),
    )
    np.testing.assert_array_equal(step.indices_BTK, prefill[:, t : t + 1])


@pytest.mark.parametrize(('keys', 'k'), [(4999, 16), (4992, 1), (600, 4)])
def test_indexed_selection_of_one_query_over_many_keys_takes_the_lowest(
  index_and_select, keys, k
):
  """Large tie plateaus, keys before and after the range, NaN keys."""
  rng = np.random.default_rng(12)
  q, w = np.ones((3, 1, 1, 1), np.float32), np.ones((3, 1, 1), np.float32)
  key = rng.integers(0, 5, (3, keys, 1)).astype(np.float32)
  # Above every other score, in the first and the last valid block and at both
  # sides of a border of blocks; row 2 has a lone best key and few others.
  key[0, [7, 63, 64, keys - 12]] = 9
  key[1, rng.permutation(keys)[: keys // 2]] = np.nan
  key[2] = 0
  key[2, keys // 2] = 1
  start = np.array([[5], [0], [0]])
  end = np.array([[keys - 10], [keys], [keys // 2 + 1]])
  selection = index_and_select(
    jnp.asarray(q),
    jnp.asarray(key),
    jnp.asarray(w),
    k=k,
    key_start_BT=jnp.asarray(start, jnp.int32),
    key_end_BT=jnp.asarray(end, jnp.int32),
  )
  position = np.arange(keys)
  valid = (position >= start[..., None]) & (position < end[..., None])
  valid &= ~np.isnan(key[:, None, :, 0])
  scores = np.where(valid, np.nan_to_num(key[:, None, :, 0]), -np.inf)
  np.testing.assert_array_equal(as_mask(selection, keys), oracle(scores, k))


def test_indexed_selection_differs_from_float64_only_at_the_boundary():
  spec = indexer_specs.ArgSpec(batch=2, queries=300, keys=300, heads=4, dim=8)
  q, k, w = spec.make(seed=10)
  scores = np.asarray(lightning_indexer(q, k, w))
  exact = np.zeros(scores.shape)
  for j in range(4):
    dots = np.einsum(
      'bti,bsi->bts',
      np.asarray(q[:, :, j], np.float64),
      np.asarray(k, np.float64),
    )
    exact += np.asarray(w[:, :, j, None], np.float64) * np.maximum(dots, 0)
  exact = np.where(np.isfinite(scores), exact, -np.inf)
  finite = np.isfinite(scores)
  error = np.max(np.abs(scores[finite] - exact[finite]))
  mask = as_mask(indexed_topk(q, k, w, k=40), 300)
  desired = oracle(exact, 40)
  for row in zip(*np.nonzero(np.any(mask != desired, -1)), strict=True):
    kth = np.sort(exact[row])[-40]
    different = exact[row][mask[row] != desired[row]]
    assert np.all(np.abs(different - kth) <= 4 * error)
  assert np.mean(mask == desired) > 0.999


@pytest.mark.multidevice
def test_indexed_selection_on_8_devices_equals_one_device(data_mesh):
  spec = indexer_specs.ArgSpec(batch=8, queries=40, keys=600, heads=2, dim=4)
  args = spec.make(seed=11, integers=True)

  @jax.jit
  def run(q, k, w):
    scores = lightning_indexer(q, k, w)
    return (
      indexed_topk(q, k, w, k=24),
      select_topk(scores, k=24),
      selection_mask(scores, k=24),
    )

  sharding = jax.sharding.NamedSharding(data_mesh, jax.P('data'))
  sharded = run(*(jax.device_put(x, sharding) for x in args))
  assert sharded[0].indices_BTK.addressable_shards[0].data.shape[0] == 1
  one = run(*args)
  jax.tree.map(np.testing.assert_array_equal, sharded, one)
  np.testing.assert_array_equal(one[0].indices_BTK, one[1].indices_BTK)


@pytest.mark.slow
def test_indexed_selection_of_xla_grows_linearly_in_memory():
  def temporary_bytes(num_tokens):
    spec = indexer_specs.ArgSpec(
      batch=1, queries=num_tokens, keys=num_tokens, heads=2, dim=4
    )
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in spec.make(seed=0)]
    run = jax.jit(
      lambda q, k, w: indexed_topk(q, k, w, k=32, implementation='xla')
    )
    compiled = run.lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  small, large = temporary_bytes(4096), temporary_bytes(8192)
  assert large < 8192**2 / 4  # one byte a score would be four times this
  assert large <= 2.2 * small


def test_selection_is_a_pytree_of_one_array():
  selection = Selection(indices_BTK=jnp.zeros((1, 2, 3), jnp.int32))
  assert len(jax.tree.leaves(selection)) == 1
  shapes = jax.eval_shape(lambda: selection)
  assert shapes.indices_BTK.shape == (1, 2, 3)
  mapped = jax.tree.map(lambda _: None, selection)
  assert mapped.indices_BTK is None


@pytest.mark.parametrize('k', [0, -3])
def test_select_k_below_one_is_refused(k):
  with pytest.raises(ValueError, match=f'k is {k}; expected at least 1'):
    select_topk(jnp.zeros((1, 2, 3)), k=k)
