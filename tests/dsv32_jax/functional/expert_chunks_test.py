"""Bounded chunks of experts against the same rows all at once, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.functional import expert_chunks
from tests.support import tolerances

R, A, E, D = 13, 2, 3, 5


def _experts(x_QD, weights, group_sizes_E):
  """tanh(x @ w) of each group; 0 past the last; NaN for too large groups."""
  (w_EDD,) = weights
  end_E = jnp.cumsum(group_sizes_E)
  row_Q = jnp.arange(x_QD.shape[0])
  expert_Q = jnp.sum(row_Q[:, None] >= end_E[None, :], axis=1)
  y_EQD = jnp.tanh(jnp.einsum('qd,edf->eqf', x_QD, w_EDD))
  member_EQ = jnp.arange(E)[:, None] == expert_Q[None, :]
  y_QD = jnp.sum(jnp.where(member_EQ[..., None], y_EQD, 0), axis=0)
  return jnp.where(end_E[-1] > x_QD.shape[0], jnp.nan, y_QD)


def _inputs(seed=0):
  rng = np.random.default_rng(seed)
  x, dy = rng.standard_normal((2, R, D)).astype(np.float32)
  choice = np.stack([rng.permutation(E + 1)[:A] for _ in range(R)])
  choice[3] = E
  choice[:, 1] = np.where(choice[:, 1] == 1, E, choice[:, 1])
  gate = rng.random((R, A)).astype(np.float32)
  w = rng.standard_normal((E, D, D)).astype(np.float32)
  return w, x, choice.astype(np.int32), gate, dy


def _oracle(w, x, choice, gate, dy):
  """Value and gradients, one pair at a time."""
  w, x, gate, dy = (a.astype(np.float64) for a in (w, x, gate, dy))
  y, dx, dgate, dw = (np.zeros_like(a) for a in (x, x, gate, w))
  for r, a in np.ndindex(choice.shape):
    if (e := choice[r, a]) == E:
      continue
    out = np.tanh(x[r] @ w[e])
    y[r] += gate[r, a] * out
    dgate[r, a] = out @ dy[r]
    slope = gate[r, a] * dy[r] * (1 - out**2)
    dx[r] += w[e] @ slope
    dw[e] += np.outer(x[r], slope)
  return y, dx, dgate, dw


@functools.partial(jax.jit, static_argnames='chunk')
def _run(w, x, choice, gate, dy, chunk):
  y = expert_chunks.apply(_experts, (w,), x, choice, gate, chunk=chunk)
  # What was there before is added to.
  before = (jnp.ones_like(w),)
  dx, dgate, (dw,) = expert_chunks.gradients(
    _experts, (w,), x, choice, gate, dy, before, chunk=chunk
  )
  return y, dx, dgate, dw - 1.0


@pytest.mark.parametrize('chunk', [1, 7, 100])
def test_chunks_of_any_size_give_value_and_gradients(chunk):
  inputs = _inputs()
  assert np.sum(inputs[2] < E) == 2 * 7 + 2
  actual = _run(*inputs, chunk)
  tolerances.assert_close(actual, _oracle(*inputs), gradient=True)
  assert all(a.dtype == jnp.float32 for a in actual)


def test_chunks_ignore_rows_without_experts():
  """Neither NaN there nor their cotangents reach anything."""
  w, x, choice, gate, dy = _inputs()
  results = []
  for bad in (0.0, np.nan):
    x[3] = dy[3] = bad
    y, dx, dgate, dw = _run(w, x, choice, gate, dy, 4)
    for row in (y[3], dx[3], dgate[3]):
      np.testing.assert_array_equal(row, 0)
    results.append((y, dx, dgate, dw))
  jax.tree.map(np.testing.assert_array_equal, *results)
