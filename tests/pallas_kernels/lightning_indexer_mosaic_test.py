"""Tests of the indexer's Hopper kernels: interpreted, lowered, on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import lightning_indexer, mosaic
from pallas_kernels.lightning_indexer import pallas_mosaic_gpu as kernels
from pallas_kernels.lightning_indexer import quantization, reference
from tests.pallas_kernels import lightning_indexer_cases as cases

needs_api = pytest.mark.skipif(
  not mosaic.has_api(), reason='Mosaic GPU kernels need jax 0.11'
)


@functools.partial(jax.jit, static_argnames=('quantized',))
def expected_scores(q, k, w, start, end, *, quantized=False):
  return reference.lightning_indexer(
    q, k, w, key_start_BT=start, key_end_BT=end, quantized=quantized
  )


@functools.partial(jax.jit, static_argnames=('quantized',))
def expected_gradients(q, k, w, g, start, end, *, quantized=False):
  def total(q, k, w):
    scores = expected_scores(q, k, w, start, end, quantized=quantized)
    finite = jnp.isfinite(scores)
    return jnp.sum(jnp.where(finite, scores, 0) * jnp.where(finite, g, 0))

  args = (x.astype(jnp.float32) for x in (q, k, w))
  return jax.grad(total, argnums=(0, 1, 2))(*args)


def assert_scores(actual, desired, *, limit=4e-3):
  """-inf in the same places, and the rest within a relative norm."""
  actual = np.asarray(actual, np.float32)
  desired = np.asarray(desired)
  finite = np.isfinite(desired)
  np.testing.assert_array_equal(np.isneginf(actual), ~finite)
  assert not np.any(np.isnan(actual))
  assert not np.any(np.signbit(actual[actual == 0]))
  assert_norm(actual[finite], desired[finite], limit=limit)


def assert_norm(actual, desired, *, limit):
  actual = np.asarray(actual, np.float32)
  desired = np.asarray(desired, np.float32)
  assert np.all(np.isfinite(actual))
  error = np.linalg.norm(actual - desired)
  assert error <= limit * np.linalg.norm(desired), error


def run_scores(q, k, w, start, end, *, quantized=False, **kwargs):
  """`score_chunk`, of bfloat16 or of quantised q and k."""
  scale = None
  if quantized:
    q, q_scale = quantization.quantize(q)
    k, scale = quantization.quantize(k)
    w = w * q_scale
  return kernels.score_chunk(q, k, w, start, end, k_scale_BS=scale, **kwargs)


# Interpreted.


@needs_api
@pytest.mark.parametrize(
  'quantized', [pytest.param(False, marks=pytest.mark.slow), True]
)
def test_kernel_interpreted_matches_reference(quantized):
  q, k, w, _ = cases.make(1, 17, 130, 16, 64)
  start, end = cases.ragged_ranges(1, 17, 130)
  scores = run_scores(
    q,
    k,
    w,
    start,
    end,
    quantized=quantized,
    target=mosaic.Target.INTERPRET,
  )
  desired = expected_scores(q, k, w, start, end, quantized=quantized)
  assert_scores(scores, desired, limit=1e-5)


@pytest.mark.slow
@needs_api
def test_kernel_interpreted_has_no_races():
  q, k, w, _ = cases.make(1, 3, 130, 16, 64, seed=2)
  start, end = cases.causal_ranges(1, 3, 130)
  scores = run_scores(q, k, w, start, end, target=mosaic.Target.INTERPRET_RACES)
  assert_scores(scores, expected_scores(q, k, w, start, end), limit=1e-5)


@needs_api
@pytest.mark.slow
@pytest.mark.parametrize('quantized', [False, True])
def test_gradients_interpreted_match_reference(quantized):
  q, k, w, g = cases.make(1, 9, 130, 16, 64, seed=3)
  start, end = cases.ragged_ranges(1, 9, 130)
  desired = expected_gradients(q, k, w, g, start, end, quantized=quantized)
  valid = np.isfinite(expected_scores(q, k, w, start, end))
  g = jnp.where(valid, g, jnp.nan)  # nothing outside the ranges is read
  _, vjp = jax.vjp(
    lambda *args: kernels.differentiable_scores(
      *args, start, end, quantized, mosaic.Target.INTERPRET
    ),
    q,
    k,
    w,
  )
  for actual, x in zip(vjp(g), desired, strict=True):
    assert_norm(actual, x, limit=1e-2)


@pytest.mark.slow
@needs_api
def test_gradients_interpreted_have_no_races():
  q, k, w, g = cases.make(1, 3, 130, 16, 64, seed=4)
  start, end = cases.causal_ranges(1, 3, 130)
  actual = kernels.chunk_gradients(
    q, k, w, g, start, end, target=mosaic.Target.INTERPRET_RACES
  )
  desired = expected_gradients(q, k, w, g, start, end)
  for x, y in zip(actual, desired, strict=True):
    assert_norm(x, y, limit=1e-2)


# Lowered.


def lower(function, *args):
  traced = jax.jit(function).trace(*args)
  return traced.lower(lowering_platforms=('cuda',)).as_text()


def specs(batch, queries, keys, heads, dim, dtype):
  return (
    jax.ShapeDtypeStruct((batch, queries, heads, dim), dtype),
    jax.ShapeDtypeStruct((batch, keys, dim), dtype),
    jax.ShapeDtypeStruct((batch, queries, heads), jnp.float32),
    jax.ShapeDtypeStruct((batch, queries), jnp.int32),
    jax.ShapeDtypeStruct((batch, queries), jnp.int32),
  )


@needs_api
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float8_e4m3fn])
@pytest.mark.parametrize(('heads', 'dim'), [(64, 128), (32, 128), (16, 64)])
def test_kernel_lowers_for_cuda(heads, dim, dtype):
  args = specs(1, 4096, 32768, heads, dim, dtype)
  scale = None
  if dtype == jnp.float8_e4m3fn:
    scale = jax.ShapeDtypeStruct((1, 32768), jnp.float32)

  def run(scale, *args):
    return kernels.score_chunk(
      *args, k_scale_BS=scale, target=mosaic.Target.LOWER
    )

  assert 'mosaic_gpu' in lower(run, scale, *args)


@needs_api
@pytest.mark.parametrize(('heads', 'dim'), [(64, 128), (32, 128), (16, 64)])
def test_gradients_lower_for_cuda(heads, dim):
  q, k, w, start, end = specs(1, 4096, 32768, heads, dim, jnp.bfloat16)
  g = jax.ShapeDtypeStruct((1, 4096, 32768), jnp.float32)
  run = functools.partial(kernels.chunk_gradients, target=mosaic.Target.LOWER)
  assert 'mosaic_gpu' in lower(run, q, k, w, g, start, end)


@needs_api
@pytest.mark.parametrize(
  ('heads', 'dim', 'dtype', 'message'),
  [
    (3, 128, jnp.bfloat16, '3 heads of 128'),
    (64, 32, jnp.bfloat16, '64 heads of 32'),
    (64, 128, jnp.float32, 'dtype float32'),
  ],
)
def test_kernel_refuses_what_it_does_not_support(heads, dim, dtype, message):
  args = specs(1, 8, 64, heads, dim, dtype)
  with pytest.raises(NotImplementedError, match=message):
    jax.eval_shape(kernels.score_chunk, *args)


# On a GPU.


@pytest.mark.gpu
@needs_api
@pytest.mark.parametrize('quantized', [False, True])
@pytest.mark.parametrize('name', cases.SHAPES)
def test_kernel_on_gpu_matches_numpy(name, quantized):
  q, k, w, _ = cases.make(*cases.SHAPES[name], seed=5)
  run = jax.jit(functools.partial(run_scores, quantized=quantized))
  for ranges in cases.both_ranges(*cases.SHAPES[name][:3]):
    desired = cases.numpy_scores(q, k, w, *ranges, quantized=quantized)
    # Hopper's fp8 products keep fewer bits than float32.
    limit = 1e-3 if quantized else 1e-5
    assert_scores(run(q, k, w, *ranges), desired, limit=limit)


@pytest.mark.gpu
@needs_api
@pytest.mark.parametrize('name', ['ragged', 'small'])
def test_kernel_on_gpu_rounds_to_bfloat16(name):
  q, k, w, _ = cases.make(*cases.SHAPES[name], seed=8)
  run = jax.jit(functools.partial(run_scores, out_dtype=jnp.bfloat16))
  for ranges in cases.both_ranges(*cases.SHAPES[name][:3]):
    assert_scores(run(q, k, w, *ranges), cases.numpy_scores(q, k, w, *ranges))


@pytest.mark.gpu
@needs_api
@pytest.mark.parametrize('quantized', [False, True])
def test_kernel_on_gpu_adversarial_values(quantized):
  q, k, w, _ = cases.make(1, 70, 500, 64, 128, seed=6)
  start, end = cases.causal_ranges(1, 70, 500)
  valid = cases.valid_pairs(start, end, 500)
  run = jax.jit(functools.partial(run_scores, quantized=quantized))
  huge = cases.numpy_scores(
    q * 1e5, k * 1e5, w, start, end, quantized=quantized
  )
  cases.poison()
  limit = 1e-3 if quantized else 1e-5
  assert_scores(run(q * 1e5, k * 1e5, w, start, end), huge, limit=limit)
  plateau = run(jnp.abs(q), -jnp.abs(k), w, start, end)
  assert_scores(plateau, np.where(valid, 0.0, -np.inf))
  assert np.all(np.isneginf(run(q, k, w, start, start)))
  # Duplicates score the same to the last bit.
  same = run(q, jnp.broadcast_to(k[:, :1], k.shape), w, start, end)
  same = np.asarray(same)
  assert np.all(np.where(valid, same == same[..., :1], True))


@pytest.mark.gpu
@needs_api
def test_kernel_on_gpu_scores_ignore_their_company():
  q, k, w, _ = cases.make(2, 70, 500, 64, 128, seed=9)
  start, end = cases.causal_ranges(2, 70, 500)
  whole = jax.jit(run_scores)(q, k, w, start, end)
  rows = slice(13, 40)
  part = run_scores(
    q[1:, rows],
    jnp.pad(k[1:], ((0, 0), (0, 140), (0, 0))),
    w[1:, rows],
    start[1:, rows],
    end[1:, rows],
  )
  np.testing.assert_array_equal(part[..., :500], whole[1:, rows])


@pytest.mark.gpu
@needs_api
@pytest.mark.parametrize('quantized', [False, True])
@pytest.mark.parametrize('name', cases.SHAPES)
def test_gradients_on_gpu_match_numpy(name, quantized):
  q, k, w, g = cases.make(*cases.SHAPES[name], seed=7)

  @jax.jit
  def gradients(q, k, w, g, start, end):
    def run(q, k, w):
      return lightning_indexer(
        q,
        k,
        w,
        key_start_BT=start,
        key_end_BT=end,
        quantized=quantized,
        implementation='mosaic_gpu',
      )

    return jax.vjp(run, q, k, w)[1](g)

  for ranges in cases.both_ranges(*cases.SHAPES[name][:3]):
    desired = cases.numpy_gradients(q, k, w, g, *ranges, quantized=quantized)
    # Nothing outside the ranges is read.
    dirty = jnp.where(cases.valid_pairs(*ranges, k.shape[1]), g, jnp.nan)
    actual = gradients(q, k, w, dirty, *ranges)
    for x, y in zip(actual, desired, strict=True):
      assert_norm(x, y, limit=1e-2)


@pytest.mark.gpu
@needs_api
def test_gradients_on_gpu_adversarial_values():
  q, k, w, g = cases.make(1, 70, 500, 64, 128, seed=10)
  start, end = cases.causal_ranges(1, 70, 500)
  run = jax.jit(kernels.chunk_gradients)
  huge = (1e3 * q, 1e3 * k, w, g, start, end)
  cases.poison()
  for x, y in zip(run(*huge), cases.numpy_gradients(*huge), strict=True):
    assert_norm(x, y, limit=1e-2)
  # Nothing gets through where every product is negative, or no key is valid.
  for nothing in (
    (jnp.abs(q), -jnp.abs(k), w, g, start, end),
    (q, k, w, jnp.full_like(g, jnp.nan), start, start),
  ):
    for x in run(*nothing):
      assert not np.any(np.asarray(x))
