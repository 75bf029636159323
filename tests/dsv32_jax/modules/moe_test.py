import functools

import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax.modules import moe
from tests.support import tiny_configs, tolerances

CFG = tiny_configs.config(n_shared_experts=2)
VALID = tiny_configs.rows([[20], [11, 7]])['segment_ids'] > 0


@functools.lru_cache
def _variables(cfg=CFG):
  layer = moe.MoE(cfg)
  shapes = jax.eval_shape(
    lambda: jax.tree.map(
      lambda box: box.value,
      layer.init(
        jax.random.key(0),
        jnp.zeros((1, 1, cfg.hidden_size)),
        jnp.ones((1, 1), bool),
      ),
      is_leaf=lambda leaf: hasattr(leaf, 'value'),
    )
  )
  return tiny_configs.random_tree(shapes)


def _x(seed=0):
  shape = (*VALID.shape, CFG.hidden_size)
  return jnp.asarray(
    np.random.default_rng(seed).standard_normal(shape), jnp.float32
  )


@functools.lru_cache
def _apply(cfg=CFG):
  return tiny_configs.jit(moe.MoE(cfg).apply)


def _swiglu(x, gate, up, down):
  product = x @ gate
  return (product / (1 + np.exp(-product)) * (x @ up)) @ down


def _oracle(variables, x_BTD):
  """Section 3.7, one token at a time, float64; also each token's experts."""
  variables = jax.tree.map(lambda v: np.asarray(v, np.float64), variables)
  weights = variables['params']
  bias_E = variables['router_bias']['router']['e_score_correction_bias']
  experts, shared = weights['experts'], weights['shared']
  size = CFG.n_routed_experts // CFG.n_group
  y_BTD, chosen = np.zeros(x_BTD.shape), {}
  for b, t in np.ndindex(*x_BTD.shape[:2]):
    x_D = np.asarray(x_BTD[b, t], np.float64)
    s_E = 1 / (1 + np.exp(-x_D @ weights['router']['w_router']))
    biased_E = s_E + bias_E
    group_g = np.sort(biased_E.reshape(-1, size))[:, -2:].sum(-1)
    kept = np.argsort(-group_g)[: CFG.topk_group]
    allowed = [e for e in range(len(s_E)) if e // size in kept]
    best = sorted(allowed, key=lambda e: -biased_E[e])
    best = best[: CFG.num_experts_per_tok]
    chosen[b, t] = best
    gates = CFG.routed_scaling_factor * s_E[best] / s_E[best].sum()
    y_BTD[b, t] = _swiglu(
      x_D, shared['w_gate'], shared['w_up'], shared['w_down']
    ) + sum(
      gate
      * _swiglu(
        x_D, *(experts[name][e] for name in ('w_gate', 'w_up', 'w_down'))
      )
      for gate, e in zip(gates, best, strict=True)
    )
  return y_BTD, chosen


def test_moe_matches_one_token_at_a_time_in_float64():
  y_BTD, aux = _apply()(_variables(), _x(), jnp.asarray(VALID))
  desired, chosen = _oracle(_variables(), _x())
  tolerances.assert_close(y_BTD, desired, gradient=True)
  load_E = np.zeros(CFG.n_routed_experts)
  for place, experts in chosen.items():
    load_E[experts] += VALID[place]
  np.testing.assert_array_equal(aux.expert_load_E, load_E)


def test_moe_load_and_balance_do_not_count_padding():
  other = jnp.where(VALID[..., None], _x(), _x(seed=5))
  aux = [
    _apply()(_variables(), x, jnp.asarray(VALID))[1] for x in (_x(), other)
  ]
  assert not np.array_equal(other, _x())
  np.testing.assert_array_equal(aux[0].expert_load_E, aux[1].expert_load_E)
  np.testing.assert_array_equal(aux[0].balance_loss, aux[1].balance_loss)
  assert aux[0].expert_load_E.sum() == VALID.sum() * CFG.num_experts_per_tok


def test_moe_bias_moves_the_choice_but_never_the_weights():
  """A bias that changes nobody's rank leaves the output bitwise alone."""
  variables = _variables()
  y_BTD, aux = _apply()(variables, _x(), jnp.asarray(VALID))

  def biased(change_E):
    router = variables['router_bias']['router']
    old = router['e_score_correction_bias']
    return variables | {
      'router_bias': {
        'router': {'e_score_correction_bias': old + jnp.asarray(change_E)}
      }
    }

  shifted, _ = _apply()(biased(np.full(8, 0.5, 'f')), _x(), jnp.asarray(VALID))
  np.testing.assert_array_equal(shifted, y_BTD)
  # A large one keeps everybody away from two groups.
  _, away = _apply()(
    biased(np.array([0] * 4 + [-9] * 4, 'f')), _x(), jnp.asarray(VALID)
  )
  np.testing.assert_array_equal(away.expert_load_E[4:], 0)
  assert (aux.expert_load_E > 0).all()


def test_moe_relabelled_experts_give_the_same_output():
  """Groups in another order, weights and bias alike, changes nothing."""
  order = np.array([6, 7, 0, 1, 4, 5, 2, 3])

  def permute(path, leaf):
    names = [key.key for key in path]
    if 'experts' in names:
      return leaf[order]
    return leaf[..., order] if 'router' in names else leaf

  permuted = jax.tree_util.tree_map_with_path(permute, _variables())
  y_BTD, aux = _apply()(_variables(), _x(), jnp.asarray(VALID))
  other_BTD, other = _apply()(permuted, _x(), jnp.asarray(VALID))
  tolerances.assert_close(other_BTD, y_BTD, gradient=True)
  np.testing.assert_array_equal(other.expert_load_E, aux.expert_load_E[order])


def test_moe_router_bias_is_no_parameter():
  shapes = _variables()
  assert set(shapes) == {'params', 'router_bias'}
  assert set(shapes['params']['router']) == {'w_router'}
  greedy = tiny_configs.config(topk_method='greedy', n_group=1, topk_group=1)
  assert set(_variables(greedy)) == {'params'}
