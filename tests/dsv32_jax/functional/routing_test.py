"""Routing against a float64 oracle, and the router's known mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.functional import routing
from tests.support import tolerances

V3 = {
  'num_experts_per_tok': 4,
  'n_group': 4,
  'topk_group': 2,
  'routed_scaling_factor': 2.5,
}


def _oracle(logits, bias, *, method='noaux_tc', scoring='sigmoid', **sizes):
  """Expert lists and gates, one token at a time in float64."""
  num_experts = logits.shape[1]
  top_k, groups = sizes['num_experts_per_tok'], sizes.get('n_group', 1)
  indices, gates = [], []
  for row in np.asarray(logits, np.float64):
    if scoring == 'sigmoid':
      score = 1 / (1 + np.exp(-row))
    else:
      score = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
    choice = score + np.asarray(bias, np.float64)
    members = np.split(np.arange(num_experts), groups)
    counted = 2 if method == 'noaux_tc' else 1
    rank = [np.sort(choice[m])[-counted:].sum() for m in members]
    kept = np.argsort(-np.array(rank), kind='stable')
    kept = kept[: sizes.get('topk_group', 1)] if method != 'greedy' else kept
    allowed = np.concatenate([members[g] for g in kept])
    best = sorted(allowed, key=lambda e: (-choice[e], e))[:top_k]
    gate = score[best]
    if sizes.get('norm_topk_prob', True):
      gate = gate / gate.sum()
    indices.append(best)
    gates.append(gate * sizes.get('routed_scaling_factor', 1.0))
  return np.array(indices), np.array(gates)


@pytest.mark.parametrize('bias_scale', [0.0, 0.3])
def test_route_noaux_matches_float64(key, bias_scale):
  logits = 2 * jax.random.normal(key, (64, 16))
  bias = bias_scale * jax.random.normal(jax.random.key(1), (16,))
  actual = jax.jit(lambda *a: routing.route(*a, **V3))(logits, bias)
  index, gate = _oracle(logits, bias, **V3)
  np.testing.assert_array_equal(actual.expert_index, index)
  tolerances.assert_close(actual.gate, gate)
  assert actual.expert_index.dtype == jnp.int32
  assert actual.gate.dtype == actual.scores.dtype == jnp.float32


@pytest.mark.parametrize('method', ['greedy', 'group_limited_greedy'])
def test_route_v2_softmax_matches_float64(key, method):
  logits = 2 * jax.random.normal(key, (64, 16))
  sizes = V3 | {'routed_scaling_factor': 16.0, 'norm_topk_prob': False}
  actual = routing.route(
    logits, None, **sizes, scoring_func='softmax', topk_method=method
  )
  index, gate = _oracle(
    logits, np.zeros(16), method=method, scoring='softmax', **sizes
  )
  np.testing.assert_array_equal(actual.expert_index, index)
  tolerances.assert_close(actual.gate, gate)


def test_route_group_score_is_sum_of_two_for_noaux_and_max_for_v2():
  # Group 0 has the best single expert, group 1 the best pair.
  logits = jnp.array([[3.0, -3.0, 1.5, 1.4]])
  sizes = {'num_experts_per_tok': 2, 'n_group': 2, 'topk_group': 1}
  noaux = routing.route(logits, jnp.zeros(4), **sizes)
  v2 = routing.route(logits, None, **sizes, topk_method='group_limited_greedy')
  assert noaux.expert_index.tolist() == [[2, 3]]
  assert v2.expert_index.tolist() == [[0, 1]]


def test_route_negative_bias_never_selects_a_dropped_group(key):
  # All biased scores are below 0: a 0 in place of -inf would win.
  logits = jax.random.normal(key, (32, 16))
  bias = jnp.full((16,), -5.0)
  actual = routing.route(logits, bias, **V3)
  index, gate = _oracle(logits, bias, **V3)
  np.testing.assert_array_equal(actual.expert_index, index)
  tolerances.assert_close(actual.gate, gate)
  groups = np.asarray(actual.expert_index) // 4
  assert max(len(set(row)) for row in groups.tolist()) <= 2


def test_route_bias_changes_the_choice_but_never_the_weights():
  logits = jnp.array([[1.0, 0.5, 0.0, -0.5]])
  bias = jnp.array([0.0, 0.0, 0.0, 0.4])
  sizes = {'num_experts_per_tok': 2, 'routed_scaling_factor': 2.5}
  actual = routing.route(logits, bias, **sizes)
  assert actual.expert_index.tolist() == [[3, 0]]
  score = 1 / (1 + np.exp(-np.array([-0.5, 1.0])))
  tolerances.assert_close(actual.gate[0], 2.5 * score / score.sum())
  tolerances.assert_close(
    actual.scores, 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
  )


def test_route_weights_sum_to_the_scaling_factor(key):
  logits = 3 * jax.random.normal(key, (128, 16))
  actual = routing.route(logits, jnp.zeros(16), **V3)
  tolerances.assert_close(jnp.sum(actual.gate, axis=-1), np.full(128, 2.5))


def test_route_underflowing_scores_give_finite_weights():
  logits = jnp.full((1, 4), -200.0)
  actual = routing.route(logits, jnp.zeros(4), num_experts_per_tok=2)
  assert np.isfinite(actual.gate).all()


def test_route_ties_go_to_the_lowest_index():
  sizes = V3 | {'num_experts_per_tok': 3}
  actual = routing.route(jnp.zeros((2, 16)), jnp.zeros(16), **sizes)
  assert actual.expert_index.tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize('k', [1, 3, 8])
def test_top_experts_with_ties_equals_lax_top_k(key, k):
  choice = jax.random.randint(key, (5, 40, 8), 0, 4).astype(jnp.float32)
  choice = jnp.where(choice == 0, -1.0, choice)
  _, desired = jax.lax.top_k(choice, k)
  np.testing.assert_array_equal(routing.top_experts(choice, k=k), desired)


def test_route_gradient_matches_finite_differences_and_skips_bias(key):
  logits = jax.random.normal(key, (6, 16))
  bias = 0.1 * jax.random.normal(jax.random.key(1), (16,))
  cotangent = np.random.default_rng(0).standard_normal((6, 4))

  def loss(logits, bias):
    gate = routing.route(logits, bias, **V3).gate
    return jnp.sum(gate * jnp.asarray(cotangent, jnp.float32))

  d_logits, d_bias = jax.grad(loss, (0, 1))(logits, bias)
  np.testing.assert_array_equal(d_bias, 0)
  index, _ = _oracle(logits, bias, **V3)

  def loss64(logits64):
    score = np.take_along_axis(1 / (1 + np.exp(-logits64)), index, 1)
    return np.sum(2.5 * score / score.sum(1, keepdims=True) * cotangent)

  base = np.asarray(logits, np.float64)
  desired = np.zeros_like(base)
  for position in np.ndindex(base.shape):
    step = np.zeros_like(base)
    step[position] = 1e-5
    desired[position] = (loss64(base + step) - loss64(base - step)) / 2e-5
  tolerances.assert_close(d_logits, desired, gradient=True)


@pytest.mark.multidevice
def test_route_sharded_tokens_match_without_gathering(key, data_mesh):
  logits = jax.random.normal(key, (64, 16))
  bias = 0.1 * jax.random.normal(jax.random.key(1), (16,))
  desired = routing.route(logits, bias, **V3)
  sharded = jax.device_put(
    logits,
    jax.sharding.NamedSharding(data_mesh, jax.sharding.PartitionSpec('data')),
  )
  compiled = (
    jax.jit(lambda *a: routing.route(*a, **V3)).lower(sharded, bias).compile()
  )
  actual = compiled(sharded, bias)
  np.testing.assert_array_equal(actual.expert_index, desired.expert_index)
  tolerances.assert_close(actual.gate, desired.gate)
  assert 'all-gather' not in compiled.as_text()


def test_expert_load_counts_valid_tokens_only():
  index = jnp.array([[0, 2], [2, 1], [2, 3]], jnp.int32)
  valid = jnp.array([True, True, False])
  counts = routing.expert_load(index, valid, num_experts=5)
  assert counts.tolist() == [1, 1, 2, 0, 0]
  everything = routing.expert_load(index, None, num_experts=5)
  assert everything.tolist() == [1, 1, 3, 1, 0]


def test_update_bias_raises_the_underloaded_and_lowers_the_overloaded():
  bias = jnp.array([0.5, -0.25, 0.0, 1.0])
  load = jnp.array([2, 8, 5, 5], jnp.int32)
  moved = routing.update_bias(bias, load, gamma=0.125)
  assert moved.tolist() == [0.625, -0.375, 0.0, 1.0]
  assert routing.update_bias(bias, load, gamma=0).tolist() == bias.tolist()


def test_update_bias_repeated_balances_a_skewed_router(key):
  tilt = jnp.linspace(-1.0, 1.0, 8)
  logits = jax.random.normal(key, (512, 8)) + tilt[None, :]
  sizes = {'num_experts_per_tok': 2}

  @jax.jit
  def step(bias):
    index = routing.route(logits, bias, **sizes).expert_index
    load = routing.expert_load(index, None, num_experts=8)
    return routing.update_bias(bias, load, gamma=0.01), load

  bias, first = step(jnp.zeros(8))
  for _ in range(100):
    bias, load = step(bias)
  assert first.max() > 1.5 * first.mean()
  assert load.max() < 1.15 * load.mean()


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'scoring_func': 'relu'}, "scoring_func='relu'"),
    ({'topk_method': 'best'}, "topk_method='best'"),
    ({'n_group': 3}, 'n_group=3 must divide'),
    ({'n_group': 4, 'topk_group': 5}, 'topk_group=5'),
    ({'n_group': 8, 'topk_group': 4}, 'needs at least 2'),
    ({'n_group': 4, 'topk_group': 1}, 'num_experts_per_tok=3'),
    ({'topk_method': 'greedy'}, 'bias_E must be None'),
  ],
)
def test_route_impossible_arguments_are_refused(kwargs, message):
  with pytest.raises(ValueError, match=message):
    routing.route(
      jnp.zeros((2, 8)), jnp.zeros(8), num_experts_per_tok=3, **kwargs
    )
