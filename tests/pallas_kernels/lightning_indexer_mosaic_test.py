"""Tests of the indexer's Hopper kernels: interpreted, lowered, on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import lightning_indexer, mosaic
from pallas_kernels.lightning_indexer import pallas_mosaic_gpu as kernels
from pallas_kernels.lightning_indexer import quantization, reference

needs_api = pytest.mark.skipif(
  not mosaic.has_api(), reason='Mosaic GPU kernels need jax 0.11'
)


def make(batch, queries, keys, heads, dim, *, seed=0):
  """Random bfloat16 q and k, float32 w and gradient of the scores."""
  names = jax.random.split(jax.random.key(seed), 4)
  shapes = (
    (batch, queries, heads, dim),
    (batch, keys, dim),
    (batch, queries, heads),
    (batch, queries, keys),
  )
  dtypes = (jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32)
  return [
    jax.random.normal(name, shape, dtype)
    for name, shape, dtype in zip(names, shapes, dtypes, strict=True)
  ]


def ragged_ranges(batch, queries, keys, *, seed=1):
  """Random ranges, some empty; the first half shares a short one."""
  rng = np.random.default_rng(seed)
  start = rng.integers(0, keys, (batch, queries))
  end = np.minimum(start + rng.integers(-3, keys, (batch, queries)), keys)
  start[:, : queries // 2] = 3
  end[:, : queries // 2] = 60
  end[:, queries // 4] = start[:, queries // 4]
  return (jnp.asarray(x, jnp.int32) for x in (start, np.maximum(end, 0)))


def causal_ranges(batch, queries, keys):
  end = jnp.arange(1, queries + 1, dtype=jnp.int32) + keys - queries
  end = jnp.broadcast_to(end[None], (batch, queries))
  return jnp.zeros_like(end), end


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
@pytest.mark.parametrize('quantized', [False, True])
def test_kernel_interpreted_matches_reference(quantized):
  q, k, w, _ = make(1, 17, 130, 16, 64)
  start, end = ragged_ranges(1, 17, 130)
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


@needs_api
def test_kernel_interpreted_has_no_races():
  q, k, w, _ = make(1, 3, 130, 16, 64, seed=2)
  start, end = causal_ranges(1, 3, 130)
  scores = run_scores(q, k, w, start, end, target=mosaic.Target.INTERPRET_RACES)
  assert_scores(scores, expected_scores(q, k, w, start, end), limit=1e-5)


@needs_api
@pytest.mark.parametrize('quantized', [False, True])
def test_gradients_interpreted_match_reference(quantized):
  q, k, w, g = make(1, 9, 130, 16, 64, seed=3)
  start, end = ragged_ranges(1, 9, 130)
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


@needs_api
def test_gradients_interpreted_have_no_races():
  q, k, w, g = make(1, 3, 130, 16, 64, seed=4)
  start, end = causal_ranges(1, 3, 130)
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


# On a GPU. The expected values come from numpy: compiling the reference for a
# GPU takes longer than everything else here.

SHAPES = {
  'v32': (1, 64, 4096, 64, 128),
  'ragged': (2, 101, 1003, 64, 128),
  'glm': (2, 67, 1000, 32, 128),
  'small': (2, 100, 777, 16, 64),
  'decode': (3, 1, 3000, 64, 128),
}


def as_used(x, *, quantized):
  """What the kernel computes with, as float32 numpy."""
  if not quantized:
    return np.asarray(x.astype(jnp.float32))
  values, scale = quantization.quantize(x)
  values = np.asarray(values.astype(jnp.float32))
  return values * np.asarray(scale)[..., None]


def valid_pairs(start, end, num_keys):
  s = np.arange(num_keys)
  start, end = (np.asarray(x)[..., None] for x in (start, end))
  return (s >= start) & (s < end)


def all_dots(q, k):
  batch, queries, heads, dim = q.shape
  dots = np.matmul(q.reshape(batch, -1, dim), np.swapaxes(k, 1, 2))
  return dots.reshape(batch, queries, heads, -1)


def numpy_scores(q, k, w, start, end, *, quantized=False):
  q, k = (as_used(x, quantized=quantized) for x in (q, k))
  relu = np.maximum(all_dots(q, k), 0)
  scores = np.matmul(np.asarray(w)[:, :, None], relu)[:, :, 0]
  return np.where(valid_pairs(start, end, k.shape[1]), scores, -np.inf)


def numpy_gradients(q, k, w, g, start, end, *, quantized=False):
  q, k = (as_used(x, quantized=quantized) for x in (q, k))
  g = np.where(valid_pairs(start, end, k.shape[1]), np.asarray(g), 0)
  dots = all_dots(q, k)
  p = np.where(dots > 0, g[:, :, None], 0)
  dw = np.sum(p * dots, axis=-1)
  p = p * np.asarray(w)[..., None]
  p = p.reshape(p.shape[0], -1, p.shape[-1])
  dq = np.matmul(p, k).reshape(q.shape)
  dk = np.matmul(np.swapaxes(p, 1, 2), q.reshape(q.shape[0], -1, q.shape[-1]))
  return dq, dk, dw


def both_ranges(batch, queries, keys):
  return (
    causal_ranges(batch, queries, keys),
    tuple(ragged_ranges(batch, queries, keys)),
  )


@pytest.mark.gpu
@needs_api
@pytest.mark.parametrize('quantized', [False, True])
@pytest.mark.parametrize('name', SHAPES)
def test_kernel_on_gpu_matches_numpy(name, quantized):
  q, k, w, _ = make(*SHAPES[name], seed=5)
  run = jax.jit(functools.partial(run_scores, quantized=quantized))
  for ranges in both_ranges(*SHAPES[name][:3]):
    desired = numpy_scores(q, k, w, *ranges, quantized=quantized)
    # Hopper's fp8 products keep fewer bits than float32.
    limit = 1e-3 if quantized else 1e-5
    assert_scores(run(q, k, w, *ranges), desired, limit=limit)


@pytest.mark.gpu
@needs_api
@pytest.mark.parametrize('name', ['ragged', 'small'])
def test_kernel_on_gpu_rounds_to_bfloat16(name):
  q, k, w, _ = make(*SHAPES[name], seed=8)
  run = jax.jit(functools.partial(run_scores, out_dtype=jnp.bfloat16))
  for ranges in both_ranges(*SHAPES[name][:3]):
    assert_scores(run(q, k, w, *ranges), numpy_scores(q, k, w, *ranges))


@pytest.mark.gpu
@needs_api
def test_kernel_on_gpu_adversarial_values():
  q, k, w, _ = make(1, 70, 500, 64, 128, seed=6)
  start, end = causal_ranges(1, 70, 500)
  valid = valid_pairs(start, end, 500)
  run = jax.jit(run_scores)
  huge = numpy_scores(q * 1e5, k * 1e5, w, start, end)
  assert_scores(run(q * 1e5, k * 1e5, w, start, end), huge, limit=1e-5)
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
  q, k, w, _ = make(2, 70, 500, 64, 128, seed=9)
  start, end = causal_ranges(2, 70, 500)
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
@pytest.mark.parametrize('name', SHAPES)
def test_gradients_on_gpu_match_numpy(name, quantized):
  q, k, w, g = make(*SHAPES[name], seed=7)

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

  for ranges in both_ranges(*SHAPES[name][:3]):
    desired = numpy_gradients(q, k, w, g, *ranges, quantized=quantized)
    # Nothing outside the ranges is read.
    dirty = jnp.where(valid_pairs(*ranges, k.shape[1]), g, jnp.nan)
    actual = gradients(q, k, w, dirty, *ranges)
    for x, y in zip(actual, desired, strict=True):
      assert_norm(x, y, limit=1e-2)
