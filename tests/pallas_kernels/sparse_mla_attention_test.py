import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sparse_mla_attention import (
  api,
  arg_specs,
  reference,
  selection,
  xla,
)
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
IMPLEMENTATIONS = ('reference', 'gather', 'mask')


def _implementation(name):
  """(q, kv, indices, latent_dim=, scale=) -> (out, lse)."""
  if name == 'reference':
    return reference.sparse_mla_attention
  return functools.partial(xla.sparse_mla_attention, config=_SMALL_BLOCKS[name])


@pytest.fixture(params=IMPLEMENTATIONS)
def name(request):
  return request.param


@pytest.fixture(params=arg_specs.TEST_SPECS)
def spec(request):
  return arg_specs.TEST_SPECS[request.param]


def _selection(rng, spec, *, empty_rows=True):
  """Random sets within the causal range, shuffled, -1 in between."""
  shape = (spec.batch, spec.num_queries, spec.topk)
  indices = np.full(shape, -1, np.int32)
  for b, t in np.ndindex(*shape[:2]):
    end = max(t + 1 + spec.num_keys - spec.num_queries, 0)
    count = min(spec.topk, end)
    if count > 1:
      count = int(rng.integers((count + 1) // 2, count + 1))
    if empty_rows and t % 11 == 5:
      count = 0
    row = np.full(spec.topk, -1, np.int32)
    row[:count] = rng.choice(end, count, replace=False)
    indices[b, t] = rng.permutation(row)
  return jnp.asarray(indices)


def _arrays(key, spec):
  keys = jax.random.split(key, 3)
  width = spec.latent_dim + spec.rope_dim
  query_shape = (spec.batch, spec.num_queries, spec.num_heads)
  dtype = spec.dtype
  return (
    2 * jax.random.normal(keys[0], (*query_shape, width), dtype),
    jax.random.normal(keys[1], (spec.batch, spec.num_keys, width), dtype),
    jax.random.normal(keys[2], (*query_shape, spec.latent_dim), dtype),
  )


def _inputs(key, spec, **kwargs):
  seed = int(jax.random.randint(jax.random.fold_in(key, 7), (), 0, 2**30))
  indices = _selection(np.random.default_rng(seed), spec, **kwargs)
  return *_arrays(key, spec), indices


def _oracle(q, kv, indices, d_out, *, latent_dim, scale):
  """out, lse, d_q, d_kv in float64, one row and head at a time."""
  q, kv, d_out = (np.asarray(x).astype(np.float64) for x in (q, kv, d_out))
  out = np.zeros(d_out.shape)
  lse = np.full(q.shape[:3], -np.inf)
  d_q, d_kv = np.zeros(q.shape), np.zeros(kv.shape)
  for b, t, h in np.ndindex(*q.shape[:3]):
    chosen = [s for s in np.asarray(indices)[b, t] if s >= 0]
    if not chosen:
      continue
    rows = kv[b, chosen]
    scores = scale * rows @ q[b, t, h]
    mass = np.exp(scores - scores.max())
    p = mass / mass.sum()
    lse[b, t, h] = scores.max() + np.log(mass.sum())
    out[b, t, h] = p @ rows[:, :latent_dim]
    d_p = rows[:, :latent_dim] @ d_out[b, t, h]
    d_scores = p * (d_p - p @ d_p) * scale
    d_q[b, t, h] = d_scores @ rows
    d_kv[b, chosen] += np.outer(d_scores, q[b, t, h])
    d_kv[b, chosen, :latent_dim] += np.outer(p, d_out[b, t, h])
  return out, lse, d_q, d_kv


def _run(name, q, kv, indices, d_out, **kwargs):
  """out, lse, d_q, d_kv of one implementation, compiled at once."""

  @jax.jit
  def run(q, kv, indices, d_out):
    (out, lse), pullback = jax.vjp(
      lambda q, kv: _implementation(name)(q, kv, indices, **kwargs), q, kv
    )
    return out, lse, *pullback((d_out.astype(out.dtype), jnp.zeros_like(lse)))

  return run(q, kv, indices, d_out)


def test_sparse_mla_attention_random_sets_match_float64(key, spec, name):
  q, kv, d_out, indices = _inputs(key, spec)
  kwargs = {'latent_dim': spec.latent_dim, 'scale': spec.scale}
  expected = _oracle(q, kv, indices, d_out, **kwargs)
  actual = _run(name, q, kv, indices, d_out, **kwargs)
  dtypes = [q.dtype, jnp.float32, q.dtype, q.dtype]
  assert [x.dtype for x in actual] == dtypes
  tolerances.assert_close(actual[:2], expected[:2], dtype=spec.dtype)
  tolerances.assert_close(
    actual[2:], expected[2:], dtype=spec.dtype, gradient=True
  )


@pytest.mark.parametrize('name', _SMALL_BLOCKS)
def test_sparse_mla_attention_float32_gradients_match_reference_closely(
  key, name
):
  # The gradient table is wide; two float32 programs are far closer.
  spec = arg_specs.TEST_SPECS['ragged']
  q, kv, d_out, indices = _inputs(key, spec)
  kwargs = {'latent_dim': spec.latent_dim, 'scale': spec.scale}
  tolerances.assert_close(
    _run(name, q, kv, indices, d_out, **kwargs),
    _run('reference', q, kv, indices, d_out, **kwargs),
  )


@pytest.mark.parametrize('implementation', [None, 'xla', 'reference'])
def test_sparse_mla_attention_public_call_matches_float64(key, implementation):
  spec = arg_specs.TEST_SPECS['ragged']
  q, kv, d_out, indices = _inputs(key, spec)
  kwargs = {'latent_dim': spec.latent_dim, 'scale': spec.scale}
  output = api.sparse_mla_attention(
    q, kv, indices, **kwargs, implementation=implementation
  )
  out, lse, _, _ = _oracle(q, kv, indices, d_out, **kwargs)
  tolerances.assert_close((output.out_BTHC, output.lse_BTH), (out, lse))


def test_sparse_mla_attention_row_without_keys_is_zero(key, name):
  spec = arg_specs.TEST_SPECS['square']
  q, kv, d_out, indices = _inputs(key, spec)
  indices = indices.at[:, :12].set(-1)  # a whole block of queries, and more
  kwargs = {'latent_dim': spec.latent_dim, 'scale': spec.scale}
  out, lse, d_q, d_kv = _run(name, q, kv, indices, d_out, **kwargs)
  empty = np.all(np.asarray(indices) < 0, axis=-1)
  assert empty[:, :12].all()
  assert not empty.all()
  assert np.all(np.asarray(out)[empty] == 0)
  assert np.all(np.asarray(lse)[empty] == -np.inf)
  assert np.all(np.asarray(d_q)[empty] == 0)
  assert np.all(np.isfinite(d_q))
  assert np.all(np.isfinite(d_kv))
  assert np.all(np.isfinite(np.asarray(lse)[~empty]))


def test_sparse_mla_attention_all_keys_selected_equals_dense(key, name):
  spec = arg_specs.TEST_SPECS['wider_than_keys']
  q, kv, d_out = _arrays(key, spec)
  causal = np.tril(np.ones((spec.num_keys, spec.num_keys), bool))
  indices = np.where(causal, np.arange(spec.num_keys)[None], -1)
  indices = np.pad(
    indices, ((0, 0), (0, spec.topk - spec.num_keys)), constant_values=-1
  )
  out, *_ = _run(
    name,
    q,
    kv,
    jnp.asarray(indices[None], jnp.int32),
    d_out,
    latent_dim=spec.latent_dim,
    scale=spec.scale,
  )
  q, kv = np.asarray(q, np.float64), np.asarray(kv, np.float64)
  scores = np.einsum('bthx,bsx->bhts', q, kv) * spec.scale
  scores = np.where(causal[None, None], scores, -np.inf)
  p = np.exp(scores - scores.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  dense = np.einsum('bhts,bsc->bthc', p, kv[..., : spec.latent_dim])
  tolerances.assert_close(out, dense)


def test_sparse_mla_attention_unselected_rows_have_no_influence(key, name):
  spec = arg_specs.TEST_SPECS['square']
  q, kv, d_out, indices = _inputs(key, spec)
  kwargs = {'latent_dim': spec.latent_dim, 'scale': spec.scale}
  hidden = 3
  indices = jnp.where(indices == hidden, -1, indices)
  out, _, _, d_kv = _run(name, q, kv, indices, d_out, **kwargs)
  kv = kv.at[:, hidden].set(1e4)
  changed, *_ = _run(name, q, kv, indices, d_out, **kwargs)
  np.testing.assert_array_equal(out, changed)
  assert np.all(np.asarray(d_kv)[:, hidden] == 0)
  assert np.any(np.asarray(d_kv)[:, hidden + 1] != 0)


def test_sparse_mla_attention_large_scores_stay_finite(key, name):
  spec = arg_specs.TEST_SPECS['square']
  q, kv, d_out, indices = _inputs(key, spec, empty_rows=False)
  q *= 300
  kwargs = {'latent_dim': spec.latent_dim, 'scale': spec.scale}
  actual = _run(name, q, kv, indices, d_out, **kwargs)
  expected = _oracle(q, kv, indices, d_out, **kwargs)
  tolerances.assert_close(actual[1], expected[1])
  assert all(np.all(np.isfinite(x)) for x in actual)


def test_sparse_mla_attention_lse_has_no_gradient(key, name):
  spec = arg_specs.TEST_SPECS['square']
  q, kv, _, indices = _inputs(key, spec, empty_rows=False)

  def loss(q, kv):
    _, lse = _implementation(name)(
      q, kv, indices, latent_dim=spec.latent_dim, scale=1.0
    )
    return jnp.sum(lse)

  for gradient in jax.jit(jax.grad(loss, (0, 1)))(q, kv):
    assert np.all(np.asarray(gradient) == 0)


@pytest.mark.slow
@pytest.mark.parametrize('form', _SMALL_BLOCKS)
def test_sparse_mla_attention_two_runs_are_bitwise_equal(key, form):
  spec = arg_specs.TEST_SPECS['square']
  q, kv, d_out, indices = _inputs(key, spec)
  kwargs = {'latent_dim': spec.latent_dim, 'scale': spec.scale}
  first = _run(form, q, kv, indices, d_out, **kwargs)
  second = _run(form, q, kv, indices, d_out, **kwargs)
  jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.slow
def test_add_rows_sorted_order_matches_numpy_with_heavy_collisions(key):
  indices = np.asarray(jax.random.randint(key, (3, 20, 9), -1, 6))
  updates = np.asarray(jax.random.normal(key, (3, 20, 9, 5)))
  add = jax.jit(functools.partial(selection.add_rows, in_sorted_order=True))
  actual = add(jnp.ones((3, 8, 5)), indices, updates)
  expected = np.ones((3, 8, 5))
  for b, t, k in np.ndindex(*indices.shape):
    if indices[b, t, k] >= 0:
      expected[b, indices[b, t, k]] += updates[b, t, k]
  tolerances.assert_close(actual, expected)


def _subjaxprs(jaxpr):
  yield jaxpr
  for equation in jaxpr.eqns:
    for value in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')
    ):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from _subjaxprs(inner)


def _largest_temporary(function, *args):
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  return max(
    variable.aval.size
    for inner in _subjaxprs(jaxpr)
    for equation in inner.eqns
    for variable in equation.outvars
  )


def _abstract(length, topk=32, heads=4):
  shapes = ((1, length, heads, 24), (1, length, 24))
  q, kv = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
  return q, kv, jax.ShapeDtypeStruct((1, length, topk), jnp.int32)


def _abstract_gradient(form):
  def gradient(q, kv, indices):
    config = config_lib.xla_config(
      batch=1,
      num_queries=q.shape[1],
      num_keys=kv.shape[1],
      num_heads=q.shape[2],
      width=kv.shape[2],
      topk=indices.shape[2],
      form=form,
    )

    def loss(q, kv):
      out, _ = xla.sparse_mla_attention(
        q, kv, indices, latent_dim=16, scale=0.2, config=config
      )
      return jnp.sum(out**2)

    return jax.grad(loss, (0, 1))(q, kv)

  return gradient


@pytest.mark.slow
@pytest.mark.parametrize('form', ['gather', 'mask'])
def test_sparse_mla_attention_memory_is_linear_in_length(form):
  temporary = {}
  for length in (2048, 8192):
    lowered = jax.jit(_abstract_gradient(form)).lower(*_abstract(length))
    memory = lowered.compile().memory_analysis()
    temporary[length] = memory.temp_size_in_bytes
  assert temporary[8192] < 4.2 * temporary[2048]


@pytest.mark.parametrize('form', ['gather', 'mask'])
def test_sparse_mla_attention_never_holds_scores_of_all_pairs(form):
  length, heads = 8192, 4
  largest = _largest_temporary(
    _abstract_gradient(form), *_abstract(length, heads=heads)
  )
  assert largest < length * length / 8


def test_sparse_mla_attention_policy_saves_output_and_normaliser(key):
  spec = arg_specs.TEST_SPECS['square']
  q, kv, _, indices = _inputs(key, spec)

  def loss(q, kv):
    output = api.sparse_mla_attention(
      jnp.sin(q), kv, indices, latent_dim=spec.latent_dim, scale=spec.scale
    )
    return jnp.sum(jnp.sin(output.out_BTHC))

  def num_loops(policy):
    gradient = jax.grad(jax.checkpoint(loss, policy=policy), (0, 1))
    jaxpr = jax.make_jaxpr(gradient)(q, kv).jaxpr
    return sum(
      equation.primitive.name == 'scan'
      for inner in _subjaxprs(jaxpr)
      for equation in inner.eqns
    )

  names = ('attention_out', 'attention_lse')
  saved = jax.checkpoint_policies.save_only_these_names(*names)
  recomputed = jax.checkpoint_policies.nothing_saveable
  # Forward and backward; the third is the forward pass again.
  assert num_loops(saved) == 2
  assert num_loops(recomputed) == 3


@pytest.mark.slow
@pytest.mark.multidevice
@pytest.mark.parametrize('form', ['gather', 'mask'])
def test_sparse_mla_attention_sharded_batch_matches_one_device(
  key, data_mesh, form
):
  spec = arg_specs.ArgSpec(
    batch=8,
    num_queries=24,
    num_keys=24,
    num_heads=2,
    latent_dim=8,
    rope_dim=4,
    topk=5,
  )
  q, kv, d_out, indices = _inputs(key, spec)
  attend = functools.partial(
    xla.sparse_mla_attention,
    config=_SMALL_BLOCKS[form],
    latent_dim=spec.latent_dim,
    scale=spec.scale,
  )

  def gradient(q, kv, indices, d_out):
    (out, _), pullback = jax.vjp(lambda q, kv: attend(q, kv, indices), q, kv)
    return out, pullback((d_out, jnp.zeros(q.shape[:3])))

  args = (q, kv, indices, d_out)
  expected = jax.jit(gradient)(*args)
  rows = jax.sharding.NamedSharding(
    data_mesh, jax.sharding.PartitionSpec('data')
  )
  sharded = jax.jit(gradient, in_shardings=rows, out_shardings=rows)
  compiled = sharded.lower(*args).compile()
  tolerances.assert_close(compiled(*jax.device_put(args, rows)), expected)
  # Every device works on its own rows: nothing but block bounds is shared.
  text = compiled.as_text()
  assert 'all-gather' not in text
  assert 'all-to-all' not in text


def test_xla_config_form_follows_ratio_of_keys_to_selected():
  sizes = {'batch': 1, 'num_heads': 4, 'width': 48, 'platform': 'cpu'}

  def form(length, topk):
    return config_lib.xla_config(
      num_queries=length, num_keys=length, topk=topk, **sizes
    ).form

  assert form(1024, 256) == 'mask'
  assert form(256, 64) == 'mask'
  assert form(4096, 64) == 'gather'
  assert form(16384, 32) == 'gather'


def test_xla_config_gpu_sums_in_sorted_order():
  sizes = {
    'batch': 1,
    'num_queries': 64,
    'num_keys': 4096,
    'num_heads': 4,
    'width': 48,
    'topk': 32,
  }
  assert config_lib.xla_config(**sizes, platform='gpu').sorted_scatter
  assert not config_lib.xla_config(**sizes, platform='cpu').sorted_scatter


def test_xla_config_unknown_form_raises():
  with pytest.raises(ValueError, match="form='scatter'"):
    config_lib.XlaConfig(
      form='scatter', block_queries=1, block_keys=1, sorted_scatter=False
    )


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'latent_dim': 25}, 'latent_dim=25'),
    ({'latent_dim': 0}, 'latent_dim=0'),
    ({'kv': (2, 64, 20)}, 'share B and X'),
    ({'indices': (2, 63, 4)}, 'share B and T'),
    ({'indices': (2, 64, 0)}, 'must not be empty'),
    ({'kv_dtype': jnp.bfloat16}, 'must be equal'),
  ],
)
def test_sparse_mla_attention_bad_arguments_raise(change, message):
  kv_dtype = change.get('kv_dtype', jnp.float32)
  # Sizes are checked by jaxtyping first where it is switched on.
  function = getattr(
    api.sparse_mla_attention, '__wrapped__', api.sparse_mla_attention
  )
  with pytest.raises(ValueError, match=message):
    function(
      jnp.zeros((2, 64, 4, 24)),
      jnp.zeros(change.get('kv', (2, 64, 24)), kv_dtype),
      jnp.zeros(change.get('indices', (2, 64, 4)), jnp.int32),
      latent_dim=change.get('latent_dim', 16),
      scale=1.0,
    )
