"""The Hopper kernels of dense attention: interpreted, lowered, on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.functional import attention, masking
from pallas_kernels import mosaic
from pallas_kernels.dense_attention import key_blocks, pallas_mosaic_gpu
from tests.support import tolerances

needs_mosaic = pytest.mark.skipif(
  not mosaic.has_api(), reason='needs the Mosaic GPU API of jax 0.11'
)


def _arrays(key, batch, queries, keys, heads, width, value_width):
  draw = jax.random.split(key, 4)
  shapes = (
    (batch, queries, heads, width),
    (batch, keys, heads, width),
    (batch, keys, heads, value_width),
    (batch, queries, heads, value_width),
  )
  return tuple(
    jax.random.normal(k, shape, jnp.bfloat16)
    for k, shape in zip(draw, shapes, strict=True)
  )


def _value_and_gradients(function, q, k, v, d_out):
  (out, lse), pullback = jax.vjp(function, q, k, v)
  return out, lse, *pullback((d_out, jnp.zeros_like(lse)))


def _oracle(q, k, v, d_out, start, end, *, scale):
  mask = masking.range_mask(start, end, num_keys=k.shape[1])

  def function(q, k, v):
    return attention.masked_attention(q, k, v, mask, scale=scale)

  inputs = (x.astype(jnp.float32) for x in (q, k, v, d_out))
  return _value_and_gradients(function, *inputs)


def _packed(lengths, total, batch):
  """Ranges of documents of some lengths, then padding."""
  segments = np.repeat(np.arange(len(lengths)) + 1, lengths)
  segments = np.pad(segments, (0, total - len(segments)))
  segments = np.broadcast_to(segments[None], (batch, total))
  return masking.key_ranges(jnp.asarray(segments, jnp.int32))


def _any_ranges(key, batch, queries, keys):
  """Not causal, some of them empty."""
  bounds = jax.random.randint(key, (2, batch, queries), 0, keys + 1)
  start, end = jnp.min(bounds, axis=0), jnp.max(bounds, axis=0)
  return start.at[:, ::7].set(5), end.at[:, ::7].set(3)


@pytest.mark.parametrize('how', ['causal', 'packed', 'any', 'empty'])
def test_blocks_hold_what_they_say(key, how):
  batch, total, rows, columns = 2, 96, 16, 8
  start, end = {
    'causal': lambda: masking.causal_ranges(batch, total, total),
    'packed': lambda: _packed((30, 1, 33), total, batch),
    'any': lambda: _any_ranges(key, batch, total, total),
    'empty': lambda: (
      jnp.zeros((batch, total), jnp.int32),
      jnp.zeros((batch, total), jnp.int32),
    ),
  }[how]()
  sizes = {'num_keys': total, 'rows': rows, 'columns': columns}
  mask = np.asarray(masking.range_mask(start, end, num_keys=total))
  for blocks, tiles in (
    (key_blocks.key_blocks(start, end, **sizes), mask),
    (key_blocks.query_blocks(start, end, **sizes), mask.swapaxes(1, 2)),
  ):
    cells = tiles.reshape(batch, total // rows, rows, total // columns, columns)
    some, every = cells.any((2, 4)), cells.all((2, 4))
    block = np.arange(total // columns)
    first, whole_first, whole_end, end_ = (
      np.asarray(x)[..., None]
      for x in (
        blocks.first,
        blocks.whole_first,
        blocks.whole_end,
        blocks.end,
      )
    )
    is_visited = (block >= first) & (block < end_)
    is_whole = (block >= whole_first) & (block < whole_end)
    assert (is_visited | ~some).all()
    assert (every | ~is_whole).all()
    assert (is_visited | ~is_whole).all()
    assert (first <= whole_first).all()
    assert (whole_first <= whole_end).all()
    assert (whole_end <= end_).all()
    if how in ('causal', 'packed'):
      # No block in vain, and nothing masked in vain but at the ends.
      np.testing.assert_array_equal(is_visited, some)


@needs_mosaic
@pytest.mark.parametrize(
  ('target', 'total', 'how'),
  [
    pytest.param(
      *(mosaic.Target.INTERPRET_RACES, 128, 'packed'), marks=pytest.mark.slow
    ),
    pytest.param(
      *(mosaic.Target.INTERPRET, 200, 'any'), marks=pytest.mark.slow
    ),
  ],
)
def test_dense_attention_interpreted_matches_oracle(key, target, total, how):
  arrays = _arrays(key, 1, total, total, 1, 64, 64)
  if how == 'packed':
    start, end = _packed((40, 70), total, 1)
  else:
    start, end = _any_ranges(key, 1, total, total)
  actual = _value_and_gradients(
    lambda *x: pallas_mosaic_gpu.dense_attention(
      *x, start, end, scale=0.2, target=target
    ),
    *arrays,
  )
  desired = _oracle(*arrays, start, end, scale=0.2)
  tolerances.assert_close(actual[:2], desired[:2], dtype=jnp.bfloat16)
  tolerances.assert_close(
    actual[2:], desired[2:], dtype=jnp.bfloat16, gradient=True
  )


@needs_mosaic
@pytest.mark.parametrize(
  ('queries', 'keys', 'heads', 'width', 'value_width'),
  [(4096, 4096, 128, 192, 128), (100, 300, 4, 64, 64)],
)
def test_dense_attention_lowers_for_cuda(
  queries, keys, heads, width, value_width
):
  arrays = jax.eval_shape(
    lambda: _arrays(
      jax.random.key(0), 1, queries, keys, heads, width, value_width
    )
  )
  ranges = jax.ShapeDtypeStruct((1, queries), jnp.int32)

  def run(q, k, v, d_out, start, end):
    return _value_and_gradients(
      lambda *x: pallas_mosaic_gpu.dense_attention(
        *x, start, end, scale=0.2, target=mosaic.Target.LOWER
      ),
      *(q, k, v, d_out),
    )

  trace = jax.jit(run).trace(*arrays, ranges, ranges)
  text = trace.lower(lowering_platforms=('cuda',)).as_text()
  assert text.count('mosaic_gpu') >= 3


@pytest.mark.parametrize(
  ('dtype', 'width', 'message'),
  [('float32', 64, 'takes bfloat16'), ('bfloat16', 48, r'takes \(X, U\) in')],
)
def test_dense_attention_unsupported_arguments_say_what_is(
  dtype, width, message
):
  q = jnp.zeros((1, 8, 2, width), dtype)
  ranges = jnp.zeros((1, 8), jnp.int32)
  with pytest.raises(NotImplementedError, match=message):
    pallas_mosaic_gpu.dense_attention(q, q, q, ranges, ranges, scale=1.0)


def _relative(actual, desired):
  is_finite = jnp.isfinite(desired)
  np.testing.assert_array_equal(jnp.isfinite(actual), is_finite)
  actual, desired = (
    jnp.where(is_finite, jnp.float32(a), 0).ravel() for a in (actual, desired)
  )
  # Of what is to be 0 throughout, the error itself.
  size = jnp.linalg.norm(desired)
  return jnp.linalg.norm(actual - desired) / jnp.where(size == 0, 1, size)


@pytest.mark.gpu
@pytest.mark.parametrize(
  ('queries', 'keys', 'width', 'value_width'),
  [
    (1000, 1000, 192, 128),
    (128, 1300, 192, 128),
    (300, 300, 128, 128),
    (300, 300, 64, 64),
  ],
)
def test_dense_attention_on_gpu_matches_oracle(
  key, monkeypatch, queries, keys, width, value_width
):
  # Widths that the device has not been trusted with yet run here first.
  monkeypatch.setattr(
    pallas_mosaic_gpu, 'DEVICE_WIDTHS', ((width, value_width),)
  )
  batch, scale = 2, 0.1

  @jax.jit
  def run(q, k, v, d_out, start, end):
    return _value_and_gradients(
      lambda *x: pallas_mosaic_gpu.dense_attention(*x, start, end, scale=scale),
      *(q, k, v, d_out),
    )

  oracle = jax.jit(functools.partial(_oracle, scale=scale))
  q, k, v, d_out = _arrays(key, batch, queries, keys, 3, width, value_width)
  causal = masking.causal_ranges(batch, queries, keys)
  twice = np.arange(keys) // 2
  cases = {
    'causal': ((q, k, v), causal),
    'huge': ((30 * q, k, v), causal),
    'zero': ((0 * q, k, v), causal),
    'duplicates': ((q, k[:, twice], v[:, twice]), causal),
    'any': ((q, k, v), _any_ranges(key, batch, queries, keys)),
    'no_key': ((q, k, v), (causal[1], causal[1])),
  }
  if queries == keys:
    lengths = (queries // 3, 1, queries // 2)
    cases['packed'] = ((q, k, v), _packed(lengths, queries, batch))
  for how, ((q, k, v), ranges) in cases.items():
    # What the outputs' memory held before must not show.
    jax.block_until_ready(jnp.full((2**25,), jnp.nan, jnp.bfloat16))
    actual = run(q, k, v, d_out, *ranges)
    desired = oracle(q, k, v, d_out, *ranges)
    limits = (4e-3, 1e-5, 1e-2, 1e-2, 1e-2)
    for a, d, limit in zip(actual, desired, limits, strict=True):
      assert _relative(a, d) < limit, how
    again = run(q, k, v, d_out, *ranges)
    jax.tree.map(np.testing.assert_array_equal, actual, again)


@pytest.mark.gpu
def test_functional_dense_attention_on_gpu_takes_the_kernels(key):
  q, k, v, _ = _arrays(key, 1, 200, 200, 2, 192, 128)
  text = jax.jit(functools.partial(attention.dense_attention, scale=0.1)).lower(
    q, k, v
  )
  assert 'mosaic_gpu' in text.as_text()
