"""Sequence-wise balance loss against float64 and at its known values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.losses import load_balance
from tests.support import tolerances

B, T, E, K = 3, 10, 8, 2


def _scores(key):
  return jax.nn.sigmoid(jax.random.normal(key, (B, T, E)))


def _valid():
  valid = np.ones((B, T), bool)
  valid[1, 6:] = False
  valid[2] = False
  return jnp.asarray(valid)


def _oracle(scores, valid, f_scores=None):
  """sum_e f_e P_e a sequence; `f_scores` decides f, `scores` P."""
  scores = np.asarray(scores, np.float64)
  f_scores = scores if f_scores is None else np.asarray(f_scores, np.float64)
  balance = []
  for s, s_f, v in zip(scores, f_scores, np.asarray(valid), strict=True):
    s, s_f = s[v], s_f[v]
    if not len(s):
      balance.append(0.0)
      continue
    best = np.argsort(-s_f, axis=1, kind='stable')[:, :K]
    f = np.bincount(best.ravel(), minlength=E) * E / (K * len(s))
    p = np.mean(s / s.sum(axis=1, keepdims=True), axis=0)
    balance.append(np.sum(f * p))
  return np.array(balance)


def test_sequence_balance_masked_matches_float64(key):
  scores, valid = _scores(key), _valid()
  actual = load_balance.sequence_balance(scores, valid, num_experts_per_tok=K)
  tolerances.assert_close(actual, _oracle(scores, valid))
  assert float(actual[2]) == 0.0


def test_sequence_balance_loss_is_the_mean_over_real_sequences(key):
  scores, valid = _scores(key), _valid()
  actual = load_balance.sequence_balance_loss(
    scores, valid, num_experts_per_tok=K, alpha=0.5
  )
  tolerances.assert_close(actual, 0.5 * _oracle(scores, valid)[:2].mean())
  everything = load_balance.sequence_balance_loss(
    scores, num_experts_per_tok=K, alpha=0.5
  )
  tolerances.assert_close(
    everything, 0.5 * _oracle(scores, np.ones((B, T), bool)).mean()
  )


def test_sequence_balance_loss_at_uniform_load_is_alpha():
  # Token t prefers experts 2t and 2t + 1; four tokens cover all eight.
  scores = np.full((2, 8, E), 0.25, np.float32)
  for t in range(8):
    scores[:, t, [2 * t % E, (2 * t + 1) % E]] = 0.75
  actual = load_balance.sequence_balance_loss(
    jnp.asarray(scores), num_experts_per_tok=K, alpha=1e-4
  )
  assert float(actual) == pytest.approx(1e-4, rel=1e-6)


def test_sequence_balance_loss_concentrated_load_exceeds_alpha():
  scores = np.full((1, 8, E), 0.1, np.float32)
  scores[:, :, :K] = 0.9
  actual = load_balance.sequence_balance(
    jnp.asarray(scores), num_experts_per_tok=K
  )
  # f = E / K on two experts, P = 0.9 / 2.4 on each.
  tolerances.assert_close(actual, np.array([4 * 2 * 0.9 / 2.4]))


def test_sequence_balance_gradient_runs_through_shares_only(key):
  scores, valid = _scores(key), _valid()

  def total(scores):
    return jnp.sum(
      load_balance.sequence_balance(scores, valid, num_experts_per_tok=K)
    )

  actual = jax.grad(total)(scores)
  base = np.asarray(scores, np.float64)
  desired = np.zeros_like(base)
  for position in np.ndindex(base.shape):
    step = np.zeros_like(base)
    step[position] = 1e-5
    up = _oracle(base + step, valid, base).sum()
    desired[position] = (up - _oracle(base - step, valid, base).sum()) / 2e-5
  tolerances.assert_close(actual, desired, gradient=True)
  np.testing.assert_array_equal(actual[~np.asarray(valid)], 0)


def test_sequence_balance_without_a_valid_token_is_finite(key):
  nothing = jnp.zeros((B, T), bool)
  value, gradient = jax.value_and_grad(
    lambda s: load_balance.sequence_balance_loss(
      s, nothing, num_experts_per_tok=K, alpha=1.0
    )
  )(_scores(key))
  assert float(value) == 0.0
  np.testing.assert_array_equal(gradient, 0)


def test_sequence_balance_too_many_experts_is_refused(key):
  with pytest.raises(ValueError, match='num_experts_per_tok=9'):
    load_balance.sequence_balance(_scores(key), num_experts_per_tok=9)


@pytest.mark.multidevice
def test_sequence_balance_sharded_batch_is_not_gathered(key, data_mesh):
  scores = jax.nn.sigmoid(jax.random.normal(key, (16, T, E)))
  sharded = jax.device_put(
    scores,
    jax.sharding.NamedSharding(data_mesh, jax.sharding.PartitionSpec('data')),
  )

  def balance(scores):
    return load_balance.sequence_balance(scores, num_experts_per_tok=K)

  compiled = jax.jit(balance).lower(sharded).compile()
  tolerances.assert_close(compiled(sharded), balance(scores))
  assert 'all-gather' not in compiled.as_text()
