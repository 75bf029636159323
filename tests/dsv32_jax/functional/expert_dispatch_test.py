"""Sorting, permuting and combining against plain indexing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.functional import expert_dispatch
from tests.support import tolerances

N, A, E, D = 37, 3, 8, 5


@pytest.fixture
def expert_index():
  """Three distinct experts a token; expert 6 gets nothing."""
  rng = np.random.default_rng(0)
  choices = [e for e in range(E) if e != 6]
  return jnp.asarray(
    [rng.permutation(choices)[:A] for _ in range(N)], jnp.int32
  )


def _valid():
  return jnp.arange(N) % 5 != 1


@pytest.mark.parametrize('valid', [None, _valid()], ids=['all', 'padded'])
def test_sort_by_expert_is_a_stable_permutation(expert_index, valid):
  if valid is not None:
    expert_index = jnp.where(valid[:, None], expert_index, E)
  order = jax.jit(lambda i: expert_dispatch.sort_by_expert(i, num_experts=E))(
    expert_index
  )
  keys = np.array(expert_index).ravel()
  np.testing.assert_array_equal(order.pair_M, np.argsort(keys, kind='stable'))
  np.testing.assert_array_equal(
    np.asarray(order.row_NA).ravel()[order.pair_M], np.arange(N * A)
  )
  np.testing.assert_array_equal(
    order.group_sizes_E, np.bincount(keys, minlength=E + 1)[:E]
  )
  assert {a.dtype for a in jax.tree.leaves(order)} == {jnp.dtype('int32')}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_permute_and_gradient_match_indexing(key, expert_index, dtype):
  order = expert_dispatch.sort_by_expert(expert_index, num_experts=E)
  x = jax.random.normal(key, (N, D), dtype)
  dy = jax.random.normal(jax.random.key(1), (N * A, D), dtype)
  y, vjp = jax.vjp(lambda x: expert_dispatch.permute(x, order), x)
  (dx,) = vjp(dy)
  token = np.asarray(order.pair_M) // A
  np.testing.assert_array_equal(y, np.asarray(x)[token])
  desired = np.zeros((N, D))
  np.add.at(desired, token, np.asarray(dy.astype(jnp.float32), np.float64))
  assert dx.dtype == x.dtype
  tolerances.assert_close(dx, desired, dtype=dtype)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_combine_and_gradients_match_float64(key, expert_index, dtype):
  order = expert_dispatch.sort_by_expert(expert_index, num_experts=E)
  y = jax.random.normal(key, (N * A, D), dtype)
  gate = jax.random.uniform(jax.random.key(1), (N, A))
  dout = jax.random.normal(jax.random.key(2), (N, D))
  out, vjp = jax.vjp(lambda y, g: expert_dispatch.combine(y, g, order), y, gate)
  dy, dgate = vjp(dout)
  y64 = np.asarray(y.astype(jnp.float32), np.float64)
  gate64, dout64 = np.asarray(gate, np.float64), np.asarray(dout, np.float64)
  y_NAD = y64[np.asarray(order.row_NA)]
  desired_dy = np.zeros_like(y64)
  desired_dy[np.asarray(order.row_NA)] = gate64[..., None] * dout64[:, None]
  assert out.dtype == jnp.float32  # the sum is not rounded to y's type
  tolerances.assert_close(out, np.sum(gate64[..., None] * y_NAD, axis=1))
  assert (dy.dtype, dgate.dtype) == (y.dtype, gate.dtype)
  tolerances.assert_close(dy, desired_dy, dtype=dtype)
  tolerances.assert_close(dgate, np.sum(y_NAD * dout64[:, None], axis=-1))


def test_permute_then_combine_with_unit_sum_gates_is_identity(
  key, expert_index
):
  order = expert_dispatch.sort_by_expert(expert_index, num_experts=E)
  x = jax.random.normal(key, (N, D))
  gate = jnp.full((N, A), 1 / A)
  out = expert_dispatch.combine(expert_dispatch.permute(x, order), gate, order)
  tolerances.assert_close(out, x)


def test_dispatch_gradients_hold_no_scatter(expert_index):
  order = expert_dispatch.sort_by_expert(expert_index, num_experts=E)

  def loss(x, gate):
    rows = expert_dispatch.permute(x, order)
    return jnp.sum(expert_dispatch.combine(rows, gate, order) ** 2)

  jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(
    jnp.ones((N, D)), jnp.ones((N, A))
  )
  assert 'gather' in str(jaxpr)
  assert 'scatter' not in str(jaxpr)


@pytest.mark.multidevice
def test_dispatch_sharded_tokens_match_one_device(key, data_mesh):
  x = jax.random.normal(key, (32, D))
  gate = jax.random.uniform(jax.random.key(1), (32, A))
  index = jnp.asarray(
    [np.random.default_rng(i).permutation(E)[:A] for i in range(32)], jnp.int32
  )

  @jax.jit
  def run(x, gate, index):
    def loss(x, gate):
      order = expert_dispatch.sort_by_expert(index, num_experts=E)
      rows = jnp.tanh(expert_dispatch.permute(x, order))
      out = expert_dispatch.combine(rows, gate, order)
      return jnp.sum(out**2), out

    gradients, out = jax.grad(loss, (0, 1), has_aux=True)(x, gate)
    return out, *gradients

  desired = run(x, gate, index)
  sharding = jax.sharding.NamedSharding(
    data_mesh, jax.sharding.PartitionSpec('data')
  )
  actual = run(*jax.device_put((x, gate, index), sharding))
  tolerances.assert_close(actual, desired)
