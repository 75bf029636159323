"""grouped_matmul against a float64 oracle, for every implementation."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import (
  api,
  arg_specs,
  config,
  xla_batched,
  xla_loop,
)
from tests.support import tolerances

# Where the rows go; 'short' leaves a third of them to no expert.
SPLITS = ('random', 'first_takes_all', 'last_takes_all', 'short', 'none')


def _batched(x, w, group_sizes):
  """The accelerators' formulation, with its gradients, on any platform."""

  @jax.custom_vjp
  def f(x, w, group_sizes):
    return xla_batched.product(
      x, w, group_sizes, block_rows=block, transpose_w=False
    )

  def backward(residuals, dy):
    x, w, group_sizes = residuals
    dx = xla_batched.product(
      dy, w, group_sizes, block_rows=block, transpose_w=True
    )
    dw = xla_batched.weight_gradient(x, dy, group_sizes, block_rows=block)
    return dx, dw.astype(w.dtype), None

  # Smaller than the heuristic's, so that groups take several blocks.
  block = min(16, x.shape[0])
  f.defvjp(lambda *args: (f(*args), args), backward)
  return f(x, w, group_sizes)


FUNCTIONS = {
  'reference': lambda *args: api.grouped_matmul(
    *args, implementation='reference'
  ),
  'xla': api.grouped_matmul,
  'xla_batched': _batched,
}


@pytest.fixture(params=FUNCTIONS)
def function(request):
  return FUNCTIONS[request.param]


def _group_sizes(split: str, num_rows: int, num_experts: int) -> np.ndarray:
  sizes = np.zeros(num_experts, np.int32)
  if split == 'first_takes_all':
    sizes[0] = num_rows
  elif split == 'last_takes_all':
    sizes[-1] = num_rows
  elif split != 'none':
    rng = np.random.default_rng(num_rows)
    total = num_rows if split == 'random' else num_rows * 2 // 3
    share = rng.dirichlet(np.ones(num_experts))
    # Some expert in the middle gets nothing.
    share[num_experts // 2] *= num_experts == 1
    sizes[:] = rng.multinomial(total, share / share.sum())
  return sizes


def _inputs(spec: arg_specs.ArgSpec):
  rng = np.random.default_rng(7)
  shapes = (
    (spec.num_rows, spec.input_dim),
    (spec.num_experts, spec.input_dim, spec.output_dim),
    (spec.num_rows, spec.output_dim),
  )
  return tuple(
    jnp.asarray(rng.standard_normal(shape), spec.dtype) for shape in shapes
  )


def _oracle(x, w, dy, group_sizes):
  """y, dx, dw row by row in float64."""
  x, w, dy = (np.asarray(a).astype(np.float64) for a in (x, w, dy))
  y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
  row = 0
  for expert, size in enumerate(group_sizes):
    for m in range(row, row + size):
      y[m] = x[m] @ w[expert]
      dx[m] = w[expert] @ dy[m]
      dw[expert] += np.outer(x[m], dy[m])
    row += size
  return y, dx, dw


@functools.partial(jax.jit, static_argnums=0)
def _value_and_gradients(function, x, w, dy, group_sizes):
  y, vjp = jax.vjp(lambda x, w: function(x, w, group_sizes), x, w)
  return y, *vjp(dy)


@pytest.mark.parametrize('split', SPLITS)
@pytest.mark.parametrize('spec', arg_specs.TEST_SPECS)
def test_grouped_matmul_any_split_matches_float64(function, spec, split):
  spec = arg_specs.TEST_SPECS[spec]
  x, w, dy = _inputs(spec)
  group_sizes = _group_sizes(split, spec.num_rows, spec.num_experts)
  actual = _value_and_gradients(function, x, w, dy, group_sizes)
  desired = _oracle(x, w, dy, group_sizes)
  assert [a.dtype for a in actual] == [x.dtype, x.dtype, w.dtype]
  # Products of inputs, not of results: the table of values holds throughout.
  tolerances.assert_close(actual, desired, dtype=x.dtype)


def test_grouped_matmul_rows_past_the_groups_are_isolated(function):
  spec = arg_specs.TEST_SPECS['ragged_rows']
  x, w, dy = _inputs(spec)
  group_sizes = _group_sizes('short', spec.num_rows, spec.num_experts)
  total = int(group_sizes.sum())
  x, dy = (a.at[total:].set(jnp.nan) for a in (x, dy))
  if function is FUNCTIONS['reference']:
    dy = dy.at[total:].set(0.0)  # plain autodiff has 0 * NaN here
  y, dx, dw = _value_and_gradients(function, x, w, dy, group_sizes)
  np.testing.assert_array_equal(y[total:], 0)
  np.testing.assert_array_equal(dx[total:], 0)
  assert np.isfinite(y).all()
  assert np.isfinite(dx).all()
  assert np.isfinite(dw).all()


def test_grouped_matmul_permuted_experts_permutes_weight_gradient():
  spec = arg_specs.TEST_SPECS['even_blocks']
  x, w, dy = _inputs(spec)
  sizes = np.full(spec.num_experts, spec.num_rows // spec.num_experts, np.int32)
  _, _, dw = _value_and_gradients(FUNCTIONS['xla'], x, w, dy, sizes)
  rows = np.arange(spec.num_rows).reshape(spec.num_experts, -1)[::-1].ravel()
  y, _, dw_reversed = _value_and_gradients(
    FUNCTIONS['xla'], x[rows], w[::-1], dy[rows], sizes
  )
  tolerances.assert_close(dw_reversed[::-1], dw)
  assert np.abs(y).max() > 0


def test_grouped_matmul_two_runs_are_bitwise_equal(function):
  spec = arg_specs.TEST_SPECS['ragged_rows']
  x, w, dy = _inputs(spec)
  sizes = _group_sizes('random', spec.num_rows, spec.num_experts)
  first = _value_and_gradients(function, x, w, dy, sizes)
  second = _value_and_gradients(function, x, w, dy, sizes)
  jax.tree.map(np.testing.assert_array_equal, first, second)


def _dots(jaxpr, found):
  """(size of the product, multiply-adds) of every dot, calls included."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      (contract, _), _ = eqn.params['dimension_numbers']
      lhs, out = eqn.invars[0].aval, eqn.outvars[0].aval
      depth = int(np.prod([lhs.shape[d] for d in contract]))
      found.append(out.size * depth)
    assert 'ragged' not in eqn.primitive.name
    for value in jax.tree.leaves(
      eqn.params, is_leaf=lambda v: hasattr(v, 'eqns') or hasattr(v, 'jaxpr')
    ):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        _dots(inner, found)
  return found


@pytest.mark.parametrize('num_experts', [4, 64])
def test_grouped_matmul_work_does_not_grow_with_experts(num_experts):
  num_rows, dim, width = 4096, 8, 16
  x = jnp.ones((num_rows, dim))
  w = jnp.ones((num_experts, dim, width))
  dy = jnp.ones((num_rows, width))
  sizes = jnp.zeros(num_experts, jnp.int32)
  needed = num_rows * dim * width

  block = config.loop_config(num_rows, num_experts).block_rows
  for trace in (
    jax.make_jaxpr(
      lambda: xla_loop.product(x, w, sizes, block_rows=block, transpose_w=False)
    )(),
    jax.make_jaxpr(
      lambda: xla_loop.weight_gradient(x, dy, sizes, block_rows=block)
    )(),
  ):
    # One block a step, at most M / b + E steps, and little beyond M rows.
    assert _dots(trace.jaxpr, []) == [block * dim * width]
  assert (num_rows + num_experts * block) <= 1.5 * num_rows

  block = config.batched_config(num_rows, num_experts).block_rows
  for trace in (
    jax.make_jaxpr(
      lambda: xla_batched.product(
        x, w, sizes, block_rows=block, transpose_w=False
      )
    )(),
    jax.make_jaxpr(
      lambda: xla_batched.weight_gradient(x, dy, sizes, block_rows=block)
    )(),
  ):
    (work,) = _dots(trace.jaxpr, [])
    assert needed <= work <= 2 * needed


@pytest.mark.parametrize(
  ('num_rows', 'num_experts', 'loop', 'batched'),
  [
    (512, 8, 32, 64),
    (2048, 8, 64, 64),
    (8192, 8, 128, 256),
    (32768, 8, 128, 1024),
    (5, 8, 5, 5),
  ],
)
def test_config_heuristics_give_expected_blocks(
  num_rows, num_experts, loop, batched
):
  assert config.loop_config(num_rows, num_experts).block_rows == loop
  assert config.batched_config(num_rows, num_experts).block_rows == batched


@pytest.mark.multidevice
def test_grouped_matmul_sharded_rows_match_one_device(data_mesh):
  spec = arg_specs.TEST_SPECS['even_blocks']
  x, w, dy = _inputs(spec)
  sizes = _group_sizes('short', spec.num_rows, spec.num_experts)
  desired = _value_and_gradients(FUNCTIONS['xla'], x, w, dy, sizes)
  rows = jax.sharding.NamedSharding(
    data_mesh, jax.sharding.PartitionSpec('data')
  )
  x, dy = jax.device_put((x, dy), rows)
  actual = _value_and_gradients(FUNCTIONS['xla'], x, w, dy, sizes)
  tolerances.assert_close(actual, desired)


def test_grouped_matmul_in_remat_scan_matches_unrolled(function):
  """Inside nn.scan over nn.remat, as the model's stacks call it."""
  num_layers, num_rows, dim, num_experts = 3, 48, 8, 4
  sizes = jnp.asarray(_group_sizes('random', num_rows, num_experts))

  class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      w = self.param('w', nn.initializers.normal(0.3), (num_experts, dim, dim))
      return x + function(x, w, sizes), None

  stack = nn.scan(
    nn.remat(Layer),
    variable_axes={'params': 0},
    split_rngs={'params': True},
    length=num_layers,
  )()
  x = jax.random.normal(jax.random.key(0), (num_rows, dim))
  variables = stack.init(jax.random.key(1), x, None)

  def scanned(variables, x):
    return jnp.sum(stack.apply(variables, x, None)[0] ** 2)

  def unrolled(variables, x):
    for w in variables['params']['w']:
      x = x + api.grouped_matmul(x, w, sizes, implementation='reference')
    return jnp.sum(x**2)

  actual = jax.jit(jax.grad(scanned, (0, 1)))(variables, x)
  desired = jax.jit(jax.grad(unrolled, (0, 1)))(variables, x)
  tolerances.assert_close(actual, desired, gradient=True)


@pytest.mark.parametrize(
  ('x_shape', 'w_shape', 'sizes_shape', 'w_dtype', 'message'),
  [
    ((4, 3), (2, 5, 6), (2,), 'float32', 'share D'),
    ((4, 3), (2, 3, 6), (3,), 'float32', 'share E'),
    ((0, 3), (2, 3, 6), (2,), 'float32', 'must not be empty'),
    ((4, 3), (2, 3, 6), (2,), 'bfloat16', 'must be equal'),
  ],
)
def test_grouped_matmul_impossible_arguments_are_refused(
  x_shape, w_shape, sizes_shape, w_dtype, message
):
  # Past the shape checks of the test run, which would speak first.
  call = getattr(api.grouped_matmul, '__wrapped__', api.grouped_matmul)
  with pytest.raises(ValueError, match=message):
    call(
      jnp.zeros(x_shape),
      jnp.zeros(w_shape, w_dtype),
      jnp.zeros(sizes_shape, jnp.int32),
    )
