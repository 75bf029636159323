"""Tests of the lightning indexer, every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels import lightning_indexer
from pallas_kernels.lightning_indexer import IMPLEMENTATIONS, api, arg_specs
from tests.support import tolerances

SPECS = arg_specs.TEST_SPECS


# The kernels take none of the small shapes here; theirs are in
# `lightning_indexer_mosaic_test`.
@pytest.fixture(params=[x for x in IMPLEMENTATIONS if x != 'mosaic_gpu'])
def indexer(request):
  """The op with one implementation."""
  return functools.partial(lightning_indexer, implementation=request.param)


def oracle(q, k, w, start=None, end=None):
  """Eq. 1 in float64 numpy."""
  q, k, w = (np.asarray(x).astype(np.float64) for x in (q, k, w))
  T, S = q.shape[1], k.shape[1]
  if start is None:
    end = np.arange(T)[None] + 1 + S - T
    start = np.zeros_like(end)
  scores = np.zeros((q.shape[0], T, S))
  for j in range(q.shape[2]):
    dots = np.matmul(q[:, :, j], np.swapaxes(k, 1, 2))
    scores += w[:, :, j, None] * np.maximum(dots, 0.0)
  s = np.arange(S)
  valid = (s >= np.asarray(start)[..., None]) & (s < np.asarray(end)[..., None])
  return np.where(valid, scores, -np.inf)


def packed_ranges(lengths, num_tokens):
  """Ranges of packed documents of these lengths, then padding queries."""
  start = np.zeros((1, num_tokens), np.int32)
  end = np.zeros((1, num_tokens), np.int32)
  first = 0
  for length in lengths:
    start[0, first : first + length] = first
    end[0, first : first + length] = np.arange(first, first + length) + 1
    first += length
  start[0, first:] = end[0, first:] = first
  return jnp.asarray(start), jnp.asarray(end)


@pytest.mark.parametrize('name', SPECS)
def test_indexer_causal_matches_float64(indexer, name):
  q, k, w = SPECS[name].make(seed=1)
  scores = indexer(q, k, w)
  assert scores.dtype == jnp.float32
  tolerances.assert_close(scores, oracle(q, k, w))


@pytest.mark.parametrize('name', ['one_block', 'several_windows'])
def test_indexer_bfloat16_accumulates_in_float32(indexer, name):
  q, k, w = SPECS[name].make(seed=2, dtype=jnp.bfloat16)
  # The oracle gets the rounded inputs, and products of bfloat16 are exact in
  # float32: only the accumulation is left, at float32's tolerance.
  tolerances.assert_close(indexer(q, k, w), oracle(q, k, w))


def test_indexer_packed_segments_and_padding_match_float64(indexer):
  spec = arg_specs.ArgSpec(batch=1, queries=700, keys=700, heads=2, dim=4)
  q, k, w = spec.make(seed=3)
  start, end = packed_ranges([1, 300, 257, 90], 700)
  scores = indexer(q, k, w, key_start_BT=start, key_end_BT=end)
  tolerances.assert_close(scores, oracle(q, k, w, start, end))
  assert np.all(np.isneginf(scores[:, 648:]))


def test_indexer_ranges_that_differ_between_rows_match_float64(indexer):
  spec = arg_specs.ArgSpec(batch=3, queries=5, keys=1100, heads=2, dim=4)
  q, k, w = spec.make(seed=4)
  rng = np.random.default_rng(4)
  start = rng.integers(0, 1100, size=(3, 5)).astype(np.int32)
  end = np.minimum(start + rng.integers(0, 300, size=(3, 5)), 1100)
  start, end = jnp.asarray(start), jnp.asarray(end.astype(np.int32))
  scores = indexer(q, k, w, key_start_BT=start, key_end_BT=end)
  tolerances.assert_close(scores, oracle(q, k, w, start, end))


@pytest.mark.parametrize('heads', [1, 2])
def test_indexer_negative_weight_of_zero_gives_positive_zero(indexer, heads):
  q = jnp.ones((1, 3, heads, 4))
  k = -jnp.ones((1, 3, 4))  # every dot is negative: all ReLUs are 0
  scores = np.asarray(indexer(q, k, -jnp.ones((1, 3, heads))))
  lower = np.tril(np.ones((3, 3), bool))
  assert np.all(scores[0][lower] == 0)
  assert not np.any(np.signbit(scores[0][lower]))


def test_indexer_score_is_not_zero_beyond_128k_keys(indexer):
  num_keys = 200_000
  spec = arg_specs.ArgSpec(batch=1, queries=1, keys=num_keys, heads=2, dim=4)
  q, k, w = spec.make(seed=5)
  scores = indexer(q, k, w)
  assert np.mean(np.asarray(scores)[0, 0, 131_072:] != 0) > 0.5
  tolerances.assert_close(scores, oracle(q, k, w))


def test_indexer_scores_ignore_batch_composition_and_length():
  # Whole numbers, so that the order of sums is no excuse.
  spec = arg_specs.ArgSpec(batch=3, queries=6, keys=520, heads=2, dim=4)
  q, k, w = spec.make(seed=6, integers=True)
  end = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32)[None] + 50, (3, 6))
  start = jnp.zeros_like(end)
  whole = lightning_indexer(q, k, w, key_start_BT=start, key_end_BT=end)
  alone = lightning_indexer(
    q[1:2],
    k[1:2, :60],
    w[1:2],
    key_start_BT=start[1:2],
    key_end_BT=end[1:2],
  )
  np.testing.assert_array_equal(whole[1:2, :, :60], alone)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('name', SPECS)
def test_indexer_gradients_match_float64(name, dtype):
  spec = SPECS[name]
  q, k, w = spec.make(seed=7, dtype=dtype)
  g = np.random.default_rng(8).normal(
    size=(spec.batch, spec.queries, spec.keys)
  )
  cotangent = jnp.asarray(g, jnp.float32)

  def total(q, k, w):
    scores = lightning_indexer(q, k, w, implementation='xla')
    return jnp.sum(jnp.where(jnp.isfinite(scores), scores, 0) * cotangent)

  grads = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, w)
  assert all(a.dtype == dtype for a in grads)
  q, k, w = (np.asarray(x).astype(np.float64) for x in (q, k, w))
  T, S = g.shape[1:]
  valid = np.arange(S) < (np.arange(T)[:, None] + 1 + S - T)
  g = np.where(valid, np.asarray(cotangent, np.float64), 0.0)
  dots = np.einsum('btji,bsi->btjs', q, k)
  ddots = g[:, :, None] * w[..., None] * (dots > 0)
  desired = (
    np.einsum('btjs,bsi->btji', ddots, k),
    np.einsum('btjs,btji->bsi', ddots, q),
    np.einsum('bts,btjs->btj', g, np.maximum(dots, 0)),
  )
  tolerances.assert_close(grads, desired, dtype=dtype, gradient=True)
  if dtype == jnp.float32:  # no reason to be a thousand times worse
    tolerances.assert_close(grads[2], desired[2])


def test_indexer_gradients_match_the_reference_on_packed_segments():
  spec = arg_specs.ArgSpec(batch=1, queries=650, keys=650, heads=2, dim=4)
  q, k, w = spec.make(seed=9)
  start, end = packed_ranges([3, 350, 200], 650)

  def total(q, k, w, implementation):
    scores = lightning_indexer(
      q,
      k,
      w,
      key_start_BT=start,
      key_end_BT=end,
      implementation=implementation,
    )
    return jnp.sum(jax.nn.softplus(scores))

  actual, desired = (
    jax.grad(total, argnums=(0, 1, 2))(q, k, w, name)
    for name in ('xla', 'reference')
  )
  tolerances.assert_close(actual, desired, gradient=True)
  # Padding queries and keys no query sees get exactly nothing.
  assert not np.any(actual[0][:, 553:])
  assert not np.any(actual[1][:, 553:])


def test_indexer_gradient_of_a_product_of_exactly_zero_is_zero(indexer):
  _, k, w = SPECS['one_block'].make(seed=12)

  def total(q):
    scores = indexer(q, k, w)
    return jnp.sum(jnp.where(jnp.isfinite(scores), scores, 0))

  dq = jax.grad(total)(jnp.zeros((2, 9, 3, 5)))
  assert not np.any(dq)


def test_indexer_cotangent_outside_the_range_is_ignored():
  q, k, w = SPECS['one_block'].make(seed=10)
  scores, vjp = jax.vjp(
    lambda *a: lightning_indexer(*a, implementation='xla'), q, k, w
  )
  clean = jnp.where(jnp.isfinite(scores), 1.0, 0.0)
  dirty = jnp.where(jnp.isfinite(scores), 1.0, jnp.nan)
  for a, b in zip(vjp(clean), vjp(dirty), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.multidevice
def test_indexer_on_8_devices_equals_one_device(data_mesh):
  spec = arg_specs.ArgSpec(batch=8, queries=40, keys=700, heads=2, dim=4)
  args = spec.make(seed=11, integers=True)

  def loss(q, k, w):
    scores = lightning_indexer(q, k, w)
    return jnp.sum(jnp.where(jnp.isfinite(scores), scores, 0)), scores

  run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
  sharding = jax.sharding.NamedSharding(data_mesh, jax.P('data'))
  sharded = run(*(jax.device_put(x, sharding) for x in args))
  assert len(sharded[0][1].sharding.device_set) == 8
  assert sharded[0][1].addressable_shards[0].data.shape[0] == 1
  jax.tree.map(np.testing.assert_array_equal, sharded, run(*args))


def test_indexer_holds_no_tensor_of_all_heads():
  spec = arg_specs.ArgSpec(batch=1, queries=2048, keys=2048, heads=16, dim=4)
  args = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in spec.make(seed=0)]

  def loss(q, k, w):
    return jnp.sum(lax.exp(lightning_indexer(q, k, w)))

  compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*args).compile()
  scores = 4 * 2048**2  # bytes of [T, S]; all heads would be 16 of them
  assert compiled.memory_analysis().temp_size_in_bytes < 6 * scores


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'k': (2, 9, 4)}, r'k_index_BSI has shape \(2, 9, 4\)'),
    ({'w': (2, 9, 2)}, r'w_index_BTJ has shape \(2, 9, 2\)'),
    ({'dtype': jnp.bfloat16}, 'k_index_BSI has dtype bfloat16'),
  ],
)
def test_indexer_arguments_that_do_not_fit_are_refused(change, message):
  q, k, w = SPECS['one_block'].make(seed=0)
  k = jnp.zeros(change.get('k', k.shape), change.get('dtype', k.dtype))
  w = jnp.zeros(change.get('w', w.shape), w.dtype)
  with pytest.raises(ValueError, match=message):
    api.check_arguments(q, k, w)


def test_indexer_one_range_without_the_other_is_refused():
  q, k, w = SPECS['one_block'].make(seed=0)
  with pytest.raises(ValueError, match='key_end_BT is None'):
    lightning_indexer(q, k, w, key_start_BT=jnp.zeros((2, 9), jnp.int32))
