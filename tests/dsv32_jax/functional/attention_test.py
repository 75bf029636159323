import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.functional import attention, masking
from tests.support import tolerances

# Divides none of the lengths below, so that every call has ragged edges.
_BLOCK = 12


@functools.partial(jax.jit, static_argnames=('scale', 'block'))
def _dense(q, k, v, start=None, end=None, *, scale, block=_BLOCK):
  return attention.dense_attention(
    q,
    k,
    v,
    scale=scale,
    key_start_BT=start,
    key_end_BT=end,
    block=block,
  )


@functools.partial(jax.jit, static_argnames='scale')
def _dense_gradients(q, k, v, start, end, d_out, *, scale):
  def loss(q, k, v):
    out, _ = _dense(q, k, v, start, end, scale=scale)
    return jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32))

  return jax.grad(loss, (0, 1, 2))(q, k, v)


def _oracle(q, k, v, mask_BTS, d_out, *, scale):
  """out, lse, d_q, d_k, d_v in float64."""
  q, k, v, d_out = (np.asarray(x).astype(np.float64) for x in (q, k, v, d_out))
  mask = np.asarray(mask_BTS)[:, None]
  scores = scale * np.einsum('bthx,bshx->bhts', q, k)
  mass = np.where(mask, np.exp(scores), 0)
  total = mass.sum(-1, keepdims=True)
  p = mass / np.where(total == 0, 1, total)
  out = np.einsum('bhts,bshu->bthu', p, v)
  with np.errstate(divide='ignore'):
    lse = np.log(total[..., 0]).swapaxes(1, 2)
  d_p = np.einsum('bthu,bshu->bhts', d_out, v)
  d_scores = scale * p * (d_p - np.sum(p * d_p, axis=-1, keepdims=True))
  return (
    out,
    lse,
    np.einsum('bhts,bshx->bthx', d_scores, k),
    np.einsum('bhts,bthx->bshx', d_scores, q),
    np.einsum('bhts,bthu->bshu', p, d_out),
  )


def _arrays(key, batch, queries, keys, *, heads=3, width=10, value=6, dtype):
  draw = jax.random.split(key, 4)
  return (
    2 * jax.random.normal(draw[0], (batch, queries, heads, width), dtype),
    jax.random.normal(draw[1], (batch, keys, heads, width), dtype),
    jax.random.normal(draw[2], (batch, keys, heads, value), dtype),
    jax.random.normal(draw[3], (batch, queries, heads, value), dtype),
  )


def _ragged_ranges(key, batch, queries, keys):
  """Any range at all, not only causal ones, some empty."""
  bounds = jax.random.randint(key, (2, batch, queries), 0, keys + 1)
  start, end = jnp.min(bounds, axis=0), jnp.max(bounds, axis=0)
  end = jnp.where(jax.random.uniform(key, end.shape) < 0.1, start, end)
  # Whole blocks of queries without keys, or with a few of them only.
  end = end.at[:, :_BLOCK].set(start[:, :_BLOCK])
  return start, end


@pytest.mark.parametrize(
  ('sizes', 'dtype'),
  [
    ((2, 37, 37), 'float32'),
    ((3, 29, 53), 'float32'),
    ((1, 48, 24), 'float32'),
    ((2, 40, 40), 'bfloat16'),
  ],
)
@pytest.mark.parametrize('ranges', ['causal', 'ragged'])
def test_dense_attention_matches_float64(key, sizes, dtype, ranges):
  q, k, v, d_out = _arrays(key, *sizes, dtype=dtype)
  if ranges == 'causal':
    given = (None, None)
    start, end = masking.causal_ranges(*sizes)
  else:
    start, end = given = _ragged_ranges(key, *sizes)
  mask = masking.range_mask(start, end, num_keys=sizes[2])
  out, lse, *gradients = _oracle(q, k, v, mask, d_out, scale=0.3)

  @jax.jit
  def run(q, k, v, d_out):
    values, pullback = jax.vjp(
      lambda *x: _dense(*x, *given, scale=0.3), q, k, v
    )
    return values, pullback((d_out, jnp.zeros_like(values[1])))

  actual, actual_gradients = run(q, k, v, d_out)
  assert [x.dtype for x in actual] == [q.dtype, jnp.float32]
  assert all(x.dtype == q.dtype for x in actual_gradients)
  tolerances.assert_close(actual, (out, lse), dtype=dtype)
  tolerances.assert_close(
    actual_gradients, tuple(gradients), dtype=dtype, gradient=True
  )


@pytest.mark.slow
def test_masked_attention_any_mask_matches_float64(key):
  q, k, v, d_out = _arrays(key, 2, 15, 21, dtype='float32')
  mask = jax.random.bernoulli(key, 0.4, (2, 15, 21)).at[:, 3].set(False)

  @jax.jit
  def run(q, k, v):
    call = functools.partial(
      attention.masked_attention, mask_BTS=mask, scale=0.3
    )
    values, pullback = jax.vjp(call, q, k, v)
    return values, pullback((d_out, jnp.zeros(values[1].shape)))

  (out, lse), gradients = run(q, k, v)
  expected = _oracle(q, k, v, mask, d_out, scale=0.3)
  tolerances.assert_close((out, lse), expected[:2])
  tolerances.assert_close(gradients, expected[2:], gradient=True)


def test_dense_attention_float32_gradients_match_oracle_closely(key):
  # The gradient table is wide; two float32 programs are far closer.
  q, k, v, d_out = _arrays(key, 2, 37, 37, dtype='float32')
  start, end = masking.causal_ranges(2, 37, 37)
  mask = masking.range_mask(start, end, num_keys=37)

  @jax.jit
  def expected(q, k, v):
    out, pullback = jax.vjp(
      lambda *x: attention.masked_attention(*x, mask, scale=0.3)[0], q, k, v
    )
    return pullback(d_out.astype(out.dtype))

  tolerances.assert_close(
    _dense_gradients(q, k, v, start, end, d_out, scale=0.3), expected(q, k, v)
  )


def test_dense_attention_packed_documents_do_not_mix(key):
  q, k, v, _ = _arrays(key, 1, 40, 40, dtype='float32')
  segments = np.repeat([1, 2, 0], [17, 18, 5])[None]
  start, end = masking.key_ranges(jnp.asarray(segments))
  out, lse = _dense(q, k, v, start, end, scale=0.3)
  alone, _ = _dense(*(x[:, 17:35] for x in (q, k, v)), scale=0.3)
  tolerances.assert_close(out[:, 17:35], alone)
  # Padding: zero, -inf, and never NaN.
  assert np.all(np.asarray(out)[:, 35:] == 0)
  assert np.all(np.asarray(lse)[:, 35:] == -np.inf)
  changed, _ = _dense(
    q, k.at[:, :17].add(1), v.at[:, 35:].add(1), start, end, scale=0.3
  )
  np.testing.assert_array_equal(changed[:, 17:], out[:, 17:])
  assert np.all(np.asarray(changed != out)[:, 1:17].any((1, 2, 3)))


def test_dense_attention_rows_without_keys_have_zero_gradient(key):
  q, k, v, d_out = _arrays(key, 2, 40, 40, dtype='float32')
  start, end = _ragged_ranges(key, 2, 40, 40)
  empty = np.asarray(start >= end)
  gradients = _dense_gradients(q, k, v, start, end, d_out, scale=0.3)
  assert empty[:, :_BLOCK].all()
  assert np.all(np.asarray(gradients[0])[empty] == 0)
  assert all(np.all(np.isfinite(x)) for x in gradients)


def test_dense_attention_large_scores_stay_finite(key):
  q, k, v, d_out = _arrays(key, 1, 30, 30, dtype='float32')
  q *= 300
  out, lse = _dense(q, k, v, scale=1.0)
  gradients = _dense_gradients(q, k, v, None, None, d_out, scale=1.0)
  assert all(np.all(np.isfinite(x)) for x in (out, lse, *gradients))
  # The first query has one key, whatever the score.
  tolerances.assert_close(out[:, 0], v[:, 0])


def test_dense_attention_lse_has_no_gradient(key):
  q, k, v, _ = _arrays(key, 1, 14, 14, dtype='float32')

  def loss(*x):
    return jnp.sum(_dense(*x, scale=0.3)[1])

  for gradient in jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v):
    assert np.all(np.asarray(gradient) == 0)


def test_dense_attention_result_does_not_depend_on_block(key):
  q, k, v, _ = _arrays(key, 2, 37, 37, dtype='float32')
  expected = _dense(q, k, v, scale=0.3, block=None)
  for block in (1, 16, 64):
    tolerances.assert_close(_dense(q, k, v, scale=0.3, block=block), expected)


def _poisoned(length, poison_from):
  """Causal attention whose values are NaN from a key onwards."""
  x = jnp.ones((1, length, 1, 4))
  v = x.at[:, poison_from:].set(jnp.nan)
  return _dense(x, x, v, scale=1.0)[0]


def test_dense_attention_blocks_after_the_queries_are_never_read():
  # 0 * NaN is NaN: masking alone would let it through.
  out = _poisoned(4 * _BLOCK, 2 * _BLOCK)
  assert np.all(np.isfinite(out[:, : 2 * _BLOCK]))
  assert np.all(np.isnan(out[:, 2 * _BLOCK :]))


def test_dense_attention_blocks_before_the_ranges_are_never_read():
  length = 4 * _BLOCK
  x = jnp.ones((1, length, 1, 4))
  v = x.at[:, : 2 * _BLOCK].set(jnp.nan)
  start = jnp.full((1, length), 2 * _BLOCK, jnp.int32)
  _, end = masking.causal_ranges(1, length, length)
  out, _ = _dense(x, x, v, start, end, scale=1.0)
  assert np.all(np.isfinite(out))


def _subjaxprs(jaxpr):
  yield jaxpr
  for equation in jaxpr.eqns:
    for value in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')
    ):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from _subjaxprs(inner)


def _squared(q, k, v):
  out, _ = attention.dense_attention(jnp.sin(q), k, v, scale=0.3)
  return jnp.sum(out**2)


def _abstract(length):
  return 3 * (jax.ShapeDtypeStruct((1, length, 4, 16), jnp.float32),)


@pytest.mark.slow
def test_dense_attention_memory_is_linear_in_length():
  temporary = {}
  for length in (2048, 8192):
    gradient = jax.jit(jax.grad(_squared, (0, 1, 2)))
    memory = gradient.lower(*_abstract(length)).compile().memory_analysis()
    temporary[length] = memory.temp_size_in_bytes
  assert temporary[8192] < 4.2 * temporary[2048]


def test_dense_attention_never_holds_scores_of_all_pairs():
  length = 8192
  jaxpr = jax.make_jaxpr(jax.grad(_squared, (0, 1, 2)))(*_abstract(length))
  largest = max(
    variable.aval.size
    for inner in _subjaxprs(jaxpr.jaxpr)
    for equation in inner.eqns
    for variable in equation.outvars
  )
  assert largest < length * length / 8


def test_dense_attention_policy_saves_output_and_normaliser():
  def num_loops(policy):
    gradient = jax.grad(jax.checkpoint(_squared, policy=policy), (0, 1, 2))
    return sum(
      equation.primitive.name == 'scan'
      for inner in _subjaxprs(jax.make_jaxpr(gradient)(*_abstract(64)).jaxpr)
      for equation in inner.eqns
    )

  policies = jax.checkpoint_policies
  names = ('attention_out', 'attention_lse')
  # Forward and backward; the third is the forward pass again.
  assert num_loops(policies.save_only_these_names(*names)) == 2
  assert num_loops(policies.nothing_saveable) == 3


@pytest.mark.multidevice
def test_dense_attention_sharded_batch_matches_one_device(key, data_mesh):
  q, k, v, d_out = _arrays(key, 8, 24, 24, heads=2, dtype='float32')
  start, end = _ragged_ranges(key, 8, 24, 24)

  def run(q, k, v, start, end, d_out):
    values, pullback = jax.vjp(
      lambda *x: _dense(*x, start, end, scale=0.3), q, k, v
    )
    return values, pullback((d_out, jnp.zeros_like(values[1])))

  args = (q, k, v, start, end, d_out)
  expected = jax.jit(run)(*args)
  rows = jax.sharding.NamedSharding(
    data_mesh, jax.sharding.PartitionSpec('data')
  )
  compiled = (
    jax.jit(run, in_shardings=rows, out_shardings=rows).lower(*args).compile()
  )
  tolerances.assert_close(compiled(*jax.device_put(args, rows)), expected)
  # Every device works on its own rows: nothing but block bounds is shared.
  text = compiled.as_text()
  assert 'all-gather' not in text
  assert 'all-to-all' not in text


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'k': (2, 9, 4, 6)}, 'k_BSHX.shape'),
    ({'v': (2, 8, 4, 6)}, 'v_BSHU.shape'),
    ({'start': (2, 8)}, 'key_start_BT.shape'),
    ({'dtype': jnp.bfloat16}, 'dtypes of q, k and v'),
    ({'block': 0}, 'block=0'),
  ],
)
def test_dense_attention_bad_arguments_raise(change, message):
  # Sizes are checked by jaxtyping first where it is switched on.
  function = getattr(
    attention.dense_attention, '__wrapped__', attention.dense_attention
  )
  start = None
  if 'start' in change:
    start = jnp.zeros(change['start'], jnp.int32)
  with pytest.raises(ValueError, match=message):
    function(
      jnp.zeros((2, 7, 4, 5)),
      jnp.zeros(change.get('k', (2, 9, 4, 5))),
      jnp.zeros(
        change.get('v', (2, 9, 4, 6)), change.get('dtype', jnp.float32)
      ),
      scale=1.0,
      key_start_BT=start,
      block=change.get('block'),
    )
