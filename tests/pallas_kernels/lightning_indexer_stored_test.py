"""Tests of index keys as a cache holds them: float8 with scales, in pages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
  indexed_topk,
  lightning_indexer,
  mosaic,
  physical_indices,
  quantize_index_keys,
)
from pallas_kernels.lightning_indexer import api as lightning_indexer_api
from pallas_kernels.lightning_indexer import config, quantization
from pallas_kernels.lightning_indexer import mosaic_chunks as kernels
from pallas_kernels.lightning_indexer.stored_keys import StoredKeys
from tests.pallas_kernels import lightning_indexer_cases, stored_keys_cases
from tests.pallas_kernels import topk_selector_cases as topk_cases

needs_api = pytest.mark.skipif(
  not mosaic.has_api(), reason='Mosaic GPU kernels need jax 0.11'
)
formats = pytest.mark.parametrize('scale_format', ['float32', 'ue8m0'])
implementations = pytest.mark.parametrize('name', ['xla', 'reference'])
_SHAPE = (3, 2, 768, 4, 16)


def float64_scores(q, k, w, start, end, *, scale_format):
  """The folded form of the published kernel, on the rounded values."""
  power_of_two = scale_format == 'ue8m0'
  q8, q_scale = quantization.quantize(q, power_of_two=power_of_two)
  k8, k_scale = quantization.quantize(k, power_of_two=power_of_two)
  q8, q_scale, k8, k_scale, w = (
    np.asarray(x.astype(jnp.float32)).astype(np.float64)
    for x in (q8, q_scale, k8, k_scale, w)
  )
  dots = np.maximum(np.einsum('btji,bsi->btjs', q8, k8), 0)
  scores = np.einsum('btj,btjs->bts', w * q_scale, dots) * k_scale[:, None]
  valid = lightning_indexer_cases.valid_pairs(start, end, k.shape[1])
  return np.where(valid, scores, -np.inf)


def assert_scores(actual, desired, *, limit):
  finite = np.isfinite(desired)
  np.testing.assert_array_equal(np.isneginf(actual), ~finite)
  error = np.linalg.norm(np.asarray(actual)[finite] - desired[finite])
  assert error <= limit * np.linalg.norm(desired[finite])


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'scale_format'), [('xla', 'float32'), ('reference', 'ue8m0')]
)
def test_quantised_keys_score_as_their_definition(name, scale_format):
  q, k, w = stored_keys_cases.random_index(*_SHAPE)
  ranges = stored_keys_cases.decode_ranges(*_SHAPE[:3])
  values, scale = quantize_index_keys(k, scale_format=scale_format)
  assert values.dtype == jnp.float8_e4m3fn
  assert scale.shape == k.shape[:2]
  actual = lightning_indexer(
    q,
    values,
    w,
    key_start_BT=ranges[0],
    key_end_BT=ranges[1],
    k_scale_BS=scale,
    scale_format=scale_format,
    implementation=name,
  )
  desired = float64_scores(q, k, w, *ranges, scale_format=scale_format)
  assert_scores(actual, desired, limit=1e-6)


@formats
@implementations
def test_quantised_keys_score_to_the_bit_as_if_quantised_inside(
  name, scale_format
):
  q, k, w = stored_keys_cases.random_index(*_SHAPE, seed=1)
  score = functools.partial(
    lightning_indexer, implementation=name, scale_format=scale_format
  )
  values, scale = quantize_index_keys(k, scale_format=scale_format)
  np.testing.assert_array_equal(
    score(q, values, w, k_scale_BS=scale), score(q, k, w, quantized=True)
  )


def test_quantize_index_keys_power_of_two_scales_are_the_next_above():
  k = jax.random.normal(jax.random.key(0), (2, 64, 128))
  _, plain = quantize_index_keys(k)
  _, rounded = quantize_index_keys(k, scale_format='ue8m0')
  np.testing.assert_array_equal(
    rounded, 2.0 ** np.ceil(np.log2(np.asarray(plain)))
  )


@pytest.fixture
def few_keys_a_chunk(monkeypatch):
  """A window of keys is made in several chunks, at shapes of these tests."""
  monkeypatch.setattr(config, '_CPU_KEY_ELEMENTS', 1)
  monkeypatch.setattr(config, '_ACCELERATOR_KEY_ELEMENTS', 1)


@pytest.mark.parametrize(
  ('name', 'stored'),
  [('xla', 'bfloat16'), ('xla', 'float8'), ('reference', 'float8')],
)
def test_paged_keys_score_as_keys_in_one_piece(name, stored, few_keys_a_chunk):
  shape = (3, 2, 864, 4, 16)
  q, k, w = stored_keys_cases.random_index(*shape, seed=2)
  ranges = stored_keys_cases.decode_ranges(*shape[:3])
  score = functools.partial(
    lightning_indexer, key_start_BT=ranges[0], key_end_BT=ranges[1]
  )
  if stored == 'float8':
    values, scale = quantize_index_keys(k)
    pages, pool, pool_scale = stored_keys_cases.to_pages(values, scale, page=32)
    desired = score(q, k, w, quantized=True, implementation=name)
  else:
    q, k = q.astype(jnp.bfloat16), k.astype(jnp.bfloat16)
    pages, pool = stored_keys_cases.to_pages(k, page=32)
    pool_scale = None
    desired = score(q, k, w, implementation=name)
  actual = score(
    q, pool, w, k_scale_BS=pool_scale, pages_BN=pages, implementation=name
  )
  # Not to the bit: XLA's products depend on the number of keys in one.
  assert_scores(actual, np.asarray(desired), limit=1e-6)


@pytest.mark.parametrize(
  'queries', [1, pytest.param(5, marks=pytest.mark.slow)]
)
def test_paged_selection_is_that_of_keys_in_one_piece(
  queries, few_keys_a_chunk
):
  shape = (3, queries, 768, 4, 16)
  q, k, w = stored_keys_cases.random_index(*shape, seed=3)
  start, end = stored_keys_cases.decode_ranges(*shape[:3], seed=3)
  ranges = {'key_start_BT': start, 'key_end_BT': end}
  values, scale = quantize_index_keys(k)
  pages, *pools = stored_keys_cases.to_pages(values, scale, page=64)
  # What is named beyond every range has no influence.
  last = np.max(end, axis=1, keepdims=True)
  beyond = np.arange(768 // 64)[None] * 64 >= last
  pages = jnp.where(beyond, 10**6, pages)
  for count in (40,) if queries == 1 else (700,):
    chosen = [
      indexed_topk(
        q,
        pools[0],
        w,
        k=count,
        k_scale_BS=pools[1],
        pages_BN=pages,
        implementation=name,
        **ranges,
      ).indices_BTK
      for name in ('xla', 'reference')
    ]
    desired = indexed_topk(
      q, values, w, k=count, k_scale_BS=scale, implementation='xla', **ranges
    ).indices_BTK
    for actual in chosen:
      np.testing.assert_array_equal(actual, desired)


def test_physical_indices_name_the_rows_that_the_logical_ones_did():
  rows = jax.random.normal(jax.random.key(4), (2, 24, 5))
  pages, pool = stored_keys_cases.to_pages(rows, page=4)
  indices = jnp.asarray(
    [[[0, 5, 23, -1], [7, -1, -1, -1]], [[3, 4, 11, 12], [1, 2, 20, 23]]]
  )
  physical = physical_indices(indices, pages, page=4)
  np.testing.assert_array_equal(physical == -1, indices == -1)
  flat, indices = np.asarray(pool).reshape(-1, 5), np.asarray(indices)
  rows, physical = np.asarray(rows), np.asarray(physical)
  for b, t, j in np.argwhere(indices >= 0):
    np.testing.assert_array_equal(
      flat[physical[b, t, j]], rows[b, indices[b, t, j]]
    )


def test_physical_indices_of_empty_pages_are_refused():
  indices, pages = jnp.zeros((2, 1, 4), jnp.int32), jnp.zeros((2, 2), jnp.int32)
  with pytest.raises(ValueError, match='page=0 must be positive'):
    physical_indices(indices, pages, page=0)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'k_scale_BS': jnp.ones((2, 4))}, r'k_scale_BS is float32\[2, 4\]'),
    ({'k_scale_BS': None}, 'k_index_BSI has dtype float8_e4m3fn'),
    ({'pages_BN': jnp.zeros((3, 1), jnp.int32)}, r'pages_BN is int32\[3, 1\]'),
    ({'scale_format': 'e8m0'}, "scale_format='e8m0'"),
  ],
)
def test_stored_keys_that_do_not_fit_are_refused(change, message):
  q, k, w = stored_keys_cases.random_index(2, 1, 8, 4, 16)
  values, scale = quantize_index_keys(k)
  arguments = {'k_scale_BS': scale, **change}
  with pytest.raises(ValueError, match=message):
    lightning_indexer_api.check_arguments(q, values, w, **arguments)


def test_stored_keys_to_be_quantised_again_are_refused():
  q, k, w = stored_keys_cases.random_index(2, 1, 8, 4, 16)
  values, scale = quantize_index_keys(k)
  with pytest.raises(ValueError, match='quantized=True with k_scale_BS'):
    lightning_indexer(q, values, w, k_scale_BS=scale, quantized=True)


def test_stored_keys_have_no_gradients():
  q, k, w = stored_keys_cases.random_index(2, 1, 8, 4, 16)
  values, scale = quantize_index_keys(k)

  def total(q):
    return jnp.sum(lightning_indexer(q, values, w, k_scale_BS=scale))

  with pytest.raises(NotImplementedError, match='no gradients'):
    jax.grad(total)(q)


# The Hopper kernel: interpreted, lowered, on a GPU.


def _stored(k, *, quantized, page):
  values, scale = quantize_index_keys(k) if quantized else (k, None)
  if not page:
    return StoredKeys(values, scale)
  arrays = (values,) if scale is None else (values, scale)
  pages, *pools = stored_keys_cases.to_pages(*arrays, page=page)
  return StoredKeys(pools[0], pools[1] if quantized else None, pages)


# One query a row, as in decoding, has a table of its own.
@needs_api
@pytest.mark.parametrize(
  ('queries', 'quantized'),
  [pytest.param(3, False, marks=pytest.mark.slow), (1, True)],
)
def test_paged_kernel_interpreted_matches_numpy(queries, quantized):
  q, k, w, _ = lightning_indexer_cases.make(3, queries, 256, 16, 64)
  start, end = stored_keys_cases.decode_ranges(3, queries, 256)
  actual = kernels.score_stored(
    q,
    _stored(k, quantized=quantized, page=128),
    w,
    start,
    end,
    target=mosaic.Target.INTERPRET,
  )
  desired = lightning_indexer_cases.numpy_scores(
    q, k, w, start, end, quantized=quantized
  )
  assert_scores(actual, desired, limit=1e-5)


@needs_api
def test_kernel_without_fill_interpreted_is_right_inside_the_ranges():
  q, k, w, _ = lightning_indexer_cases.make(2, 1, 256, 16, 64, seed=1)
  start, end = stored_keys_cases.decode_ranges(2, 1, 256, seed=1)
  actual = kernels.score_stored(
    q,
    _stored(k, quantized=True, page=64),
    w,
    start,
    end,
    fill=False,
    target=mosaic.Target.INTERPRET_RACES,
  )
  desired = lightning_indexer_cases.numpy_scores(
    q, k, w, start, end, quantized=True
  )
  inside = np.isfinite(desired)
  assert np.any(inside)
  assert not np.all(inside)
  np.testing.assert_allclose(
    np.asarray(actual)[inside], desired[inside], rtol=1e-4, atol=1e-3
  )


@needs_api
@pytest.mark.parametrize('queries', [1, 4096])
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float8_e4m3fn])
def test_paged_kernel_lowers_for_cuda(dtype, queries):
  def run(q, pool, scale, pages, w, start, end):
    keys = StoredKeys(pool, None if dtype == jnp.bfloat16 else scale, pages)
    return kernels.score_stored(
      q, keys, w, start, end, target=mosaic.Target.LOWER
    )

  shapes = (
    ((1, queries, 64, 128), jnp.bfloat16),
    ((640, 64, 128), dtype),
    ((640, 64), jnp.float32),
    ((1, 512), jnp.int32),
    ((1, queries, 64), jnp.float32),
    ((1, queries), jnp.int32),
    ((1, queries), jnp.int32),
  )
  traced = jax.jit(run).trace(*(jax.ShapeDtypeStruct(*x) for x in shapes))
  text = traced.lower(lowering_platforms=('cuda',)).as_text()
  assert 'mosaic_gpu' in text


@needs_api
def test_kernel_refuses_pages_that_no_tile_divides():
  q, k, w = stored_keys_cases.random_index(1, 1, 96, 16, 64)
  q, k = q.astype(jnp.bfloat16), k.astype(jnp.bfloat16)
  keys = _stored(k, quantized=False, page=32)
  start, end = stored_keys_cases.decode_ranges(1, 1, 96)
  with pytest.raises(NotImplementedError, match='pages of 32 keys'):
    kernels.score_stored(q, keys, w, start, end, target=mosaic.Target.LOWER)


@pytest.mark.gpu
@needs_api
@pytest.mark.parametrize('quantized', [False, True])
@pytest.mark.parametrize('page', [0, 64, 256])
@pytest.mark.parametrize('queries', [1, 70])
def test_stored_kernel_on_gpu_matches_numpy(queries, page, quantized):
  q, k, w, _ = lightning_indexer_cases.make(3, queries, 2048, 64, 128, seed=5)
  start, end = stored_keys_cases.decode_ranges(3, queries, 2048)
  keys = _stored(k, quantized=quantized, page=page)

  @jax.jit
  def run(q, w, start, end, values, scale, pages):
    return kernels.score_stored(
      q, StoredKeys(values, scale, pages), w, start, end
    )

  lightning_indexer_cases.poison()
  actual = run(q, w, start, end, keys.values, keys.scale, keys.pages_BN)
  desired = lightning_indexer_cases.numpy_scores(
    q, k, w, start, end, quantized=quantized
  )
  assert_scores(actual, desired, limit=1e-3 if quantized else 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize('name', topk_cases.KERNELS)
@pytest.mark.parametrize('page', [64, 24])
def test_stored_selection_on_gpu_is_that_of_its_own_scores(name, page):
  """At pages of 24 keys too, which the scores' kernel doesn't take."""
  batch, num_keys, count = 3, 9216, 2048
  q, k, w, _ = lightning_indexer_cases.make(batch, 1, num_keys, 64, 128, seed=6)
  start, end = stored_keys_cases.decode_ranges(batch, 1, num_keys)
  keys = _stored(k, quantized=True, page=page)
  arguments = {
    'k_scale_BS': keys.scale,
    'pages_BN': keys.pages_BN,
    'key_start_BT': start,
    'key_end_BT': end,
  }

  @jax.jit
  def run(q, w, values, arguments):
    selected = indexed_topk(
      q, values, w, k=count, implementation=name, **arguments
    )
    scores = lightning_indexer(q, values, w, **arguments)
    return selected.indices_BTK, scores

  indices, scores = topk_cases.or_skip(run)(q, w, keys.values, arguments)
  np.testing.assert_array_equal(
    np.asarray(indices)[:, 0],
    topk_cases.select(np.asarray(scores)[:, 0], count),
  )
