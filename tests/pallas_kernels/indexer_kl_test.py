import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.indexer_kl import api, arg_specs, reference, xla
from pallas_kernels.sparse_mla_attention import config as config_lib
from tests.support import tolerances

# Blocks that divide none of the sizes, so that every call has ragged edges.
_SMALL_BLOCKS = {
  'gather': config_lib.XlaConfig(
    form='gather', block_queries=10, block_keys=1, sorted_scatter=False
  ),
  'gather_sorted': config_lib.XlaConfig(
    form='gather', block_queries=10, block_keys=1, sorted_scatter=True
  ),
  'mask': config_lib.XlaConfig(
    form='mask', block_queries=10, block_keys=12, sorted_scatter=False
  ),
}
_RANGE_FORMS = ('reference', 'mask')
_SELECTED_FORMS = ('reference', 'mask', 'gather')


def _function(name):
  """The op with ranges or indices as keywords -> (loss, kl), not compiled."""
  if name == 'reference':
    return reference.indexer_kl
  return functools.partial(xla.indexer_kl, config=_SMALL_BLOCKS[name])


def _run(name, arrays, *, scale, **valid):
  """Loss, kl and the gradients of all seven arrays."""

  def loss(*arrays):
    return _function(name)(*arrays, scale=scale, **valid)

  @jax.jit
  def run(*arrays):
    (value, kl), gradients = jax.value_and_grad(
      loss, argnums=(0, 1, 2), has_aux=True
    )(*arrays)
    return value, kl, gradients

  return run(*arrays)


def _oracle(arrays, valid_BTS, *, scale):
  """Loss, kl and the three gradients in float64, one row at a time."""
  q_index, k_index, w, q, k, lse, weight = (
    np.asarray(x).astype(np.float64) for x in arrays
  )
  heads = q.shape[2]
  k = np.repeat(k, heads // k.shape[2], axis=2)
  kl = np.zeros(weight.shape)
  d_q, d_k, d_w = (np.zeros(x.shape) for x in (q_index, k_index, w))
  for b, t in np.ndindex(*weight.shape):
    chosen = np.flatnonzero(valid_BTS[b, t])
    if not len(chosen) or weight[b, t] == 0:
      continue
    scores = scale * np.einsum('hx,shx->hs', q[b, t], k[b, chosen])
    p = np.exp(scores - lse[b, t][:, None]).sum(0) / heads
    dots = q_index[b, t] @ k_index[b, chosen].T
    index_scores = w[b, t] @ np.maximum(dots, 0)
    index_scores -= index_scores.max()
    log_q = index_scores - np.log(np.exp(index_scores).sum())
    kl[b, t] = np.sum(p * (np.log(p) - log_q))
    g = weight[b, t] * (np.exp(log_q) - p)
    d_w[b, t] = np.maximum(dots, 0) @ g
    active = (dots > 0) * g
    d_q[b, t] = w[b, t][:, None] * (active @ k_index[b, chosen])
    d_k[b, chosen] += np.einsum('js,j,ji->si', active, w[b, t], q_index[b, t])
  return np.sum(weight * kl), kl, (d_q, d_k, d_w)


def _lse(q, k, valid_BTS, scale):
  """Per-head normaliser over the valid keys; -inf where there are none."""
  q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
  k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
  scores = scale * np.einsum('bthx,bshx->bths', q, k)
  mass = np.sum(np.exp(scores) * valid_BTS[:, :, None], axis=-1)
  with np.errstate(divide='ignore'):
    return np.log(mass).astype(np.float32)


def _rng(key):
  return np.random.default_rng(int(jax.random.randint(key, (), 0, 2**30)))


def _selection(rng, spec):
  """Random sets in the causal range, shuffled, some rows empty."""
  indices = np.full((spec.batch, spec.num_queries, spec.topk), -1, np.int32)
  for b, t in np.ndindex(*indices.shape[:2]):
    end = t + 1 + spec.num_keys - spec.num_queries
    count = 0 if t % 13 == 7 else min(end, spec.topk - t % 3)
    indices[b, t, :count] = rng.choice(end, count, replace=False)
    indices[b, t] = rng.permutation(indices[b, t])
  valid = np.any(indices[..., None] == np.arange(spec.num_keys), axis=2)
  return jnp.asarray(indices), valid


def _ranges(rng, spec):
  """Causal ranges with ragged starts, some rows empty."""
  shape = (spec.batch, spec.num_queries)
  end = np.arange(spec.num_queries) + 1 + spec.num_keys - spec.num_queries
  end = np.broadcast_to(end, shape).astype(np.int32)
  start = (rng.integers(0, 1000, shape) % end).astype(np.int32)
  start = np.where(rng.random(shape) < 0.1, end, start).astype(np.int32)
  keys = np.arange(spec.num_keys)
  valid = (keys >= start[..., None]) & (keys < end[..., None])
  return jnp.asarray(start), jnp.asarray(end), valid


def _arrays(rng, spec, valid):
  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), spec.dtype)

  batch, queries, keys = spec.batch, spec.num_queries, spec.num_keys
  q = draw(batch, queries, spec.num_heads, spec.width)
  k = draw(batch, keys, spec.num_key_heads, spec.width)
  weight = rng.random((batch, queries)).astype(np.float32)
  weight[:, 4::9] = 0  # rows left out of the loss
  return (
    draw(batch, queries, spec.index_heads, spec.index_dim),
    draw(batch, keys, spec.index_dim),
    draw(batch, queries, spec.index_heads) / 4,  # of both signs
    q,
    k,
    jnp.asarray(_lse(q, k, valid, spec.scale)),
    jnp.asarray(weight),
  )


def _assert_matches(actual, expected, *, dtype='float32'):
  tolerances.assert_close(actual[:2], expected[:2], dtype=dtype)
  tolerances.assert_close(
    actual[2], expected[2], dtype=dtype, gradient=True, label='gradient'
  )


@pytest.mark.parametrize('name', _RANGE_FORMS)
@pytest.mark.parametrize('spec_name', arg_specs.TEST_SPECS)
def test_indexer_kl_ranges_match_float64(key, name, spec_name):
  spec, rng = arg_specs.TEST_SPECS[spec_name], _rng(key)
  start, end, valid = _ranges(rng, spec)
  arrays = _arrays(rng, spec, valid)
  actual = _run(
    name, arrays, scale=spec.scale, key_start_BT=start, key_end_BT=end
  )
  assert actual[0].dtype == actual[1].dtype == jnp.float32
  assert [x.dtype for x in actual[2]] == [x.dtype for x in arrays[:3]]
  expected = _oracle(arrays, valid, scale=spec.scale)
  _assert_matches(actual, expected, dtype=spec.dtype)


@pytest.mark.parametrize('name', _SELECTED_FORMS)
@pytest.mark.parametrize('spec_name', arg_specs.TEST_SPECS)
def test_indexer_kl_selected_sets_match_float64(key, name, spec_name):
  spec, rng = arg_specs.TEST_SPECS[spec_name], _rng(key)
  indices, valid = _selection(rng, spec)
  arrays = _arrays(rng, spec, valid)
  actual = _run(name, arrays, scale=spec.scale, indices_BTK=indices)
  expected = _oracle(arrays, valid, scale=spec.scale)
  _assert_matches(actual, expected, dtype=spec.dtype)


@pytest.mark.parametrize('name', _SMALL_BLOCKS)
def test_indexer_kl_float32_gradients_match_reference_closely(key, name):
  # The gradient table is wide; two float32 programs are far closer.
  spec, rng = arg_specs.TEST_SPECS['ragged'], _rng(key)
  indices, valid = _selection(rng, spec)
  arrays = _arrays(rng, spec, valid)
  kwargs = {'scale': spec.scale, 'indices_BTK': indices}
  tolerances.assert_close(
    _run(name, arrays, **kwargs)[2], _run('reference', arrays, **kwargs)[2]
  )


def _worked_example():
  """Spec 5.4 as tensors: a_h are the probabilities of two heads."""
  a = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]], np.float32)
  # With one-hot keys of width 3, the query entries are the log probabilities
  # and the index scores are w * ReLU of the index query's entries.
  return (
    jnp.array([[[[1.0, 0.0, 2.0]]]]),
    jnp.eye(3)[None],
    jnp.ones((1, 1, 1)),
    jnp.log(a)[None, None],
    jnp.eye(3)[None, :, None],
  )


@pytest.mark.parametrize('name', _RANGE_FORMS)
def test_indexer_kl_worked_example_all_keys(name):
  arrays = (*_worked_example(), jnp.zeros((1, 1, 2)), jnp.ones((1, 1)))
  loss, kl, gradients = _run(
    name,
    arrays,
    scale=1.0,
    key_start_BT=jnp.zeros((1, 1), jnp.int32),
    key_end_BT=jnp.full((1, 1), 3),
  )
  assert float(loss) == pytest.approx(0.0971932107, abs=2e-7)
  assert float(kl[0, 0]) == float(loss)
  # dI[s] reaches q_index[s] where the dot product is positive: not at s = 1.
  d_scores = [-0.15527153, 0.0, 0.21524096]
  np.testing.assert_allclose(gradients[0][0, 0, 0], d_scores, rtol=0, atol=2e-7)


@pytest.mark.parametrize('name', _SELECTED_FORMS)
def test_indexer_kl_worked_example_selected_keys(name):
  # Over S = {0, 2} each head is normalised by its own mass there.
  lse = jnp.log(jnp.array([[[0.8, 0.9]]]))
  arrays = (*_worked_example(), lse, jnp.ones((1, 1)))
  loss, _, gradients = _run(
    name, arrays, scale=1.0, indices_BTK=jnp.array([[[2, -1, 0]]])
  )
  assert float(loss) == pytest.approx(0.1132665165, abs=2e-7)
  q = np.exp([1.0, 2.0]) / np.exp([1.0, 2.0]).sum()
  expected = [q[0] - 0.49305556, 0.0, q[1] - 0.50694444]
  np.testing.assert_allclose(gradients[0][0, 0, 0], expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize('name', _RANGE_FORMS)
def test_indexer_kl_first_row_is_zero(key, name):
  spec, rng = arg_specs.TEST_SPECS['latent_keys'], _rng(key)
  valid = np.tril(np.ones((spec.num_queries,) * 2, bool))
  valid = np.broadcast_to(valid, (spec.batch, *valid.shape))
  arrays = _arrays(rng, spec, valid)
  output = jax.jit(
    functools.partial(
      api.indexer_kl,
      scale=spec.scale,
      implementation='reference' if name == 'reference' else 'xla',
    )
  )(*arrays)
  # One key: p = softmax(I) = 1 up to the rounding of lse.
  np.testing.assert_allclose(output.kl_BT[:, 0], 0, atol=1e-6)
  assert np.all(np.asarray(output.kl_BT)[:, 1] > 1e-4)


@pytest.mark.slow
def test_indexer_kl_full_selection_equals_ranges_up_to_k(key):
  # Rows t < k select all preceding keys: stage 2 is stage 1 there.
  spec, rng = arg_specs.TEST_SPECS['latent_keys'], _rng(key)
  t, k = spec.num_queries, spec.topk
  valid = np.broadcast_to(np.tril(np.ones((t, t), bool)), (spec.batch, t, t))
  arrays = _arrays(rng, spec, valid)
  weight = jnp.where(jnp.arange(t)[None] < k, arrays[6], 0)
  arrays = (*arrays[:6], weight)
  indices = jnp.where(valid[..., :k], jnp.arange(k)[None, None], -1)
  start = jnp.zeros((spec.batch, t), jnp.int32)
  end = jnp.broadcast_to(jnp.arange(t) + 1, (spec.batch, t))
  scale = spec.scale
  dense = _run('mask', arrays, scale=scale, key_start_BT=start, key_end_BT=end)
  for name in ('mask', 'gather'):
    sparse = _run(name, arrays, scale=scale, indices_BTK=indices)
    tolerances.assert_close(sparse, dense)


@pytest.mark.parametrize('name', ['gather', 'mask'])
def test_indexer_kl_gradient_reaches_the_indexer_only(key, name):
  spec, rng = arg_specs.TEST_SPECS['key_per_head'], _rng(key)
  indices, valid = _selection(rng, spec)
  arrays = _arrays(rng, spec, valid)

  @functools.partial(jax.jit, static_argnums=0)
  def gradients(implementation, *arrays):
    def loss(*arrays):
      if implementation == 'xla':
        call = functools.partial(xla.indexer_kl, config=_SMALL_BLOCKS[name])
        return call(*arrays, scale=spec.scale, indices_BTK=indices)[0]
      return api.indexer_kl(
        *arrays,
        scale=spec.scale,
        indices_BTK=indices,
        implementation='reference',
      ).loss

    return jax.grad(loss, argnums=tuple(range(7)))(*arrays)

  for implementation in ('xla', 'reference'):
    result = gradients(implementation, *arrays)
    assert all(np.any(np.asarray(x) != 0) for x in result[:3])
    assert all(np.all(np.asarray(x) == 0) for x in result[3:])


@pytest.mark.parametrize('name', ['gather', 'mask'])
def test_indexer_kl_row_divergence_has_no_gradient(key, name):
  spec, rng = arg_specs.TEST_SPECS['latent_keys'], _rng(key)
  indices, valid = _selection(rng, spec)
  arrays = _arrays(rng, spec, valid)

  @jax.jit
  def gradient(q_index):
    def total(q_index):
      call = functools.partial(xla.indexer_kl, config=_SMALL_BLOCKS[name])
      _, kl = call(q_index, *arrays[1:], scale=spec.scale, indices_BTK=indices)
      return jnp.sum(kl)

    return jax.grad(total)(q_index)

  assert np.all(np.asarray(gradient(arrays[0])) == 0)


@pytest.mark.parametrize('name', _SELECTED_FORMS)
def test_indexer_kl_rows_left_out_are_zero_whatever_they_hold(key, name):
  spec, rng = arg_specs.TEST_SPECS['latent_keys'], _rng(key)
  indices, valid = _selection(rng, spec)
  arrays = _arrays(rng, spec, valid)
  weight = np.array(arrays[6])
  weight[:, 20:41] = 0  # a whole block of queries, and more
  left_out = (weight == 0) | ~valid.any(-1)
  # As a padding row's normaliser may be; rows merely of weight 0 keep theirs.
  lse = np.where(left_out[..., None], -np.inf, arrays[5])
  lse[:, 30:] = arrays[5][:, 30:]
  arrays = (*arrays[:5], jnp.asarray(lse), jnp.asarray(weight))
  loss, kl, gradients = _run(
    name, arrays, scale=spec.scale, indices_BTK=indices
  )
  assert np.all(np.asarray(kl)[left_out] == 0)
  assert np.all(np.asarray(kl)[~left_out & (valid.sum(-1) > 1)] > 0)
  assert np.isfinite(loss)
  assert all(np.all(np.isfinite(x)) for x in gradients)
  for gradient in (gradients[0], gradients[2]):
    assert np.all(np.asarray(gradient)[left_out] == 0)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['gather', 'mask'])
def test_indexer_kl_loss_does_not_depend_on_micro_batches(key, name):
  # Weights are normalised over the whole step: parts add up.
  spec, rng = arg_specs.TEST_SPECS['ragged'], _rng(key)
  indices, valid = _selection(rng, spec)
  arrays = _arrays(rng, spec, valid)
  scale = spec.scale
  whole = _run(name, arrays, scale=scale, indices_BTK=indices)
  parts = [
    _run(
      name,
      [x[b : b + 1] for x in arrays],
      scale=scale,
      indices_BTK=indices[b : b + 1],
    )
    for b in range(spec.batch)
  ]
  tolerances.assert_close(sum(part[0] for part in parts), whole[0])
  for i in range(3):
    joined = np.concatenate([part[2][i] for part in parts])
    tolerances.assert_close(joined, whole[2][i])


@pytest.mark.parametrize('name', ['gather', 'mask'])
def test_indexer_kl_cotangent_scales_the_gradients(key, name):
  spec, rng = arg_specs.TEST_SPECS['latent_keys'], _rng(key)
  indices, valid = _selection(rng, spec)
  arrays = _arrays(rng, spec, valid)

  @jax.jit
  def gradient(factor):
    def loss(q_index):
      value, _ = _function(name)(
        q_index, *arrays[1:], scale=spec.scale, indices_BTK=indices
      )
      return factor * value

    return jax.grad(loss)(arrays[0])

  np.testing.assert_array_equal(gradient(-4.0), -4.0 * gradient(1.0))


@pytest.mark.parametrize('name', _SMALL_BLOCKS)
def test_indexer_kl_value_alone_equals_value_with_gradient(key, name):
  # Without differentiation the sweep leaves the gradients out.
  spec, rng = arg_specs.TEST_SPECS['ragged'], _rng(key)
  indices, valid = _selection(rng, spec)
  arrays = _arrays(rng, spec, valid)
  kwargs = {'scale': spec.scale, 'indices_BTK': indices}
  alone = jax.jit(functools.partial(_function(name), **kwargs))(*arrays)
  tolerances.assert_close(alone, _run(name, arrays, **kwargs)[:2])


def _subjaxprs(jaxpr):
  yield jaxpr
  for equation in jaxpr.eqns:
    for value in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')
    ):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from _subjaxprs(inner)


def _abstract(length, topk=32):
  shapes = (
    (1, length, 4, 16),
    (1, length, 16),
    (1, length, 4),
    (1, length, 4, 24),
    (1, length, 1, 24),
    (1, length, 4),
    (1, length),
  )
  return (
    *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes),
    jax.ShapeDtypeStruct((1, length, topk), jnp.int32),
  )


def _gradient(valid):
  """Gradient over all preceding keys, or in the form given."""

  def gradient(*args):
    *arrays, indices = args
    config = config_lib.xla_config(
      batch=1,
      num_queries=indices.shape[1],
      num_keys=indices.shape[1],
      num_heads=4,
      width=40,
      topk=indices.shape[2],
      form=None if valid == 'ranges' else valid,
    )

    def loss(*indexer):
      if valid == 'ranges':
        return api.indexer_kl(*indexer, *arrays[3:], scale=0.2).loss
      return xla.indexer_kl(
        *indexer, *arrays[3:], scale=0.2, indices_BTK=indices, config=config
      )[0]

    return jax.grad(loss, (0, 1, 2))(*arrays[:3])

  return gradient


@pytest.mark.slow
@pytest.mark.parametrize('valid', ['ranges', 'gather', 'mask'])
def test_indexer_kl_memory_is_linear_in_length(valid):
  temporary = {}
  for length in (2048, 8192):
    lowered = jax.jit(_gradient(valid)).lower(*_abstract(length))
    memory = lowered.compile().memory_analysis()
    temporary[length] = memory.temp_size_in_bytes
  assert temporary[8192] < 4.2 * temporary[2048]


@pytest.mark.parametrize('valid', ['ranges', 'gather', 'mask'])
def test_indexer_kl_never_holds_scores_of_all_pairs(valid):
  length = 8192
  jaxpr = jax.make_jaxpr(_gradient(valid))(*_abstract(length)).jaxpr
  largest = max(
    variable.aval.size
    for inner in _subjaxprs(jaxpr)
    for equation in inner.eqns
    for variable in equation.outvars
  )
  assert largest < length * length / 8


@pytest.mark.parametrize('valid', ['ranges', 'mask'])
def test_indexer_kl_policy_saves_the_gradients(valid):
  def num_loops(policy):
    def gradient(*args):
      *arrays, indices = args
      chosen = indices if valid == 'mask' else None

      def loss(*indexer):
        return api.indexer_kl(
          *map(jnp.sin, indexer),
          *arrays[3:],
          scale=0.2,
          indices_BTK=chosen,
        ).loss

      function = jax.checkpoint(loss, policy=policy)
      return jax.grad(function, (0, 1, 2))(*arrays[:3])

    jaxpr = jax.make_jaxpr(gradient)(*_abstract(64)).jaxpr
    return sum(
      equation.primitive.name == 'scan'
      for inner in _subjaxprs(jaxpr)
      for equation in inner.eqns
    )

  policies = jax.checkpoint_policies
  saved = num_loops(policies.save_only_these_names('indexer_kl_grads'))
  assert saved == 1
  assert num_loops(policies.nothing_saveable) == 2


@pytest.mark.multidevice
@pytest.mark.parametrize('name', ['ranges', 'gather', 'mask'])
def test_indexer_kl_sharded_batch_matches_one_device(key, data_mesh, name):
  spec = arg_specs.ArgSpec(
    batch=8,
    num_queries=24,
    num_keys=24,
    index_heads=2,
    index_dim=8,
    num_heads=2,
    num_key_heads=1,
    width=12,
    topk=5,
  )
  rng = _rng(key)
  indices, valid = _selection(rng, spec)
  if name == 'ranges':
    start, end, valid = _ranges(rng, spec)
    chosen = {'key_start_BT': start, 'key_end_BT': end}
  else:
    chosen = {'indices_BTK': indices}
  arrays = _arrays(rng, spec, valid)
  function = _function('mask' if name == 'ranges' else name)

  def run(arrays, chosen):
    def loss(*indexer):
      return function(*indexer, *arrays[3:], scale=spec.scale, **chosen)

    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*arrays[:3])

  expected = jax.jit(run)(arrays, chosen)
  rows = jax.sharding.NamedSharding(
    data_mesh, jax.sharding.PartitionSpec('data')
  )
  args = jax.device_put((arrays, chosen), rows)
  compiled = jax.jit(run, in_shardings=rows).lower(*args).compile()
  tolerances.assert_close(compiled(*args), expected)
  # Every device works on its own rows: sums and block bounds are shared.
  text = compiled.as_text()
  assert 'all-gather' not in text
  assert 'all-to-all' not in text


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'k_index': (2, 7, 16)}, 'k_index_BSI.shape'),
    ({'k': (2, 8, 3, 24)}, 'must divide the H=4'),
    ({'lse': (2, 8, 3)}, 'lse_BTH.shape'),
    ({'row_weight': (2, 9)}, 'row_weight_BT.shape'),
    ({'indices': (2, 7, 3)}, 'indices_BTK.shape'),
    ({'indices': (2, 8, 3), 'end': (2, 8)}, 'excludes'),
    ({'end': (1, 8)}, 'key_end_BT.shape'),
  ],
)
def test_indexer_kl_bad_arguments_raise(change, message):
  shapes = {
    'q_index': (2, 8, 3, 16),
    'k_index': (2, 8, 16),
    'w': (2, 8, 3),
    'q': (2, 8, 4, 24),
    'k': (2, 8, 1, 24),
    'lse': (2, 8, 4),
    'row_weight': (2, 8),
  } | {k: v for k, v in change.items() if k not in ('indices', 'end')}
  arrays = (jnp.zeros(shape) for shape in shapes.values())

  def integers(name):
    return jnp.zeros(change[name], jnp.int32) if name in change else None

  # Sizes are checked by jaxtyping first where it is switched on.
  function = getattr(api.indexer_kl, '__wrapped__', api.indexer_kl)
  with pytest.raises(ValueError, match=message):
    function(
      *arrays,
      scale=1.0,
      indices_BTK=integers('indices'),
      key_end_BT=integers('end'),
    )
