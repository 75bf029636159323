import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.config.data import DataConfig
from dsv32_jax.config.training import OptimizerConfig, StageConfig
from dsv32_jax.training import optimizer, stages
from tests.support import tiny_configs

CFG = tiny_configs.config(num_nextn_predict_layers=1)


def _tree():
  """A small tree with both groups, matrices and vectors."""
  return {
    'lm_head': jnp.full((2, 3), 2.0),
    'final_norm': {'scale': jnp.ones((3,))},
    'mtp': {
      'attention': {
        'indexer': {
          'w_ik': jnp.full((2, 2), 3.0),
          'k_norm': {'scale': jnp.ones((4, 2)), 'bias': jnp.ones((4, 2))},
        },
        'mla': {'w_o': jnp.full((2, 2), -1.0)},
      }
    },
  }


def _build(kind='sparse_training', *, steps=10, main=None, indexer=None):
  config = StageConfig(
    kind=kind,
    steps=steps,
    data=DataConfig(),
    init_from='somewhere',
    optimizer=main or OptimizerConfig(),
    indexer_optimizer=indexer or OptimizerConfig(),
  )
  stage = stages.build(config, CFG)
  return stage, optimizer.build(config, stage)


def _groups(tree):
  return {
    optimizer.group_of(path)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if leaf.ndim
  }


def test_labels_put_every_indexer_array_in_its_own_group():
  labels = optimizer.labels(tiny_configs.variables(CFG)['params'])
  leaves = jax.tree_util.tree_leaves_with_path(labels)
  found = {'main': 0, 'indexer': 0}
  for path, label in leaves:
    assert label == (
      'indexer' if "['indexer']" in jax.tree_util.keystr(path) else 'main'
    )
    found[label] += 1
  # Five arrays an indexer; dense stack, MoE stack and MTP block.
  assert found['indexer'] == 15
  assert found['main'] > 30


def test_split_and_join_are_inverse_and_share_nothing():
  stage, _ = _build('dense_warmup')
  trainable, frozen = optimizer.split(_tree(), stage)
  assert _groups(trainable) == {'indexer'}
  assert _groups(frozen) == {'main'}
  joined = optimizer.join(trainable, frozen)
  jax.tree.map(np.testing.assert_array_equal, joined, _tree())
  stage, _ = _build()
  trainable, frozen = optimizer.split(_tree(), stage)
  assert frozen == {}
  assert jax.tree.structure(trainable) == jax.tree.structure(_tree())


@pytest.mark.parametrize(
  ('kind', 'groups'),
  [('dense_warmup', {'indexer'}), ('sparse_training', {'main', 'indexer'})],
)
def test_optimizer_state_holds_the_trainable_groups_only(kind, groups):
  stage, tx = _build(kind)
  trainable, _ = optimizer.split(_tree(), stage)
  assert _groups(tx.init(trainable)) == groups


def test_adamw_decays_matrices_and_no_norms():
  """With no gradient at all, decay is all that moves."""
  settings = OptimizerConfig(peak_learning_rate=0.5, weight_decay=0.1)
  _, tx = _build(main=settings, indexer=settings)
  params = _tree()
  updates, _ = tx.update(
    jax.tree.map(jnp.zeros_like, params), tx.init(params), params
  )
  for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
    value = _at(params, path)
    factor = 0.0 if path[-1].key in ('scale', 'bias') else -0.5 * 0.1
    np.testing.assert_allclose(leaf, factor * value, rtol=1e-6)


def _at(tree, path):
  for key in path:
    tree = tree[key.key]
  return tree


def test_groups_have_their_own_learning_rate():
  """Adam's first step is the learning rate, whatever the gradient."""
  _, tx = _build(
    main=OptimizerConfig(peak_learning_rate=0.01, weight_decay=0.0),
    indexer=OptimizerConfig(peak_learning_rate=0.3, weight_decay=0.0),
  )
  params = _tree()
  updates, _ = tx.update(
    jax.tree.map(jnp.ones_like, params), tx.init(params), params
  )
  for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
    rate = 0.3 if optimizer.group_of(path) == 'indexer' else 0.01
    np.testing.assert_allclose(leaf, -rate, rtol=1e-5)


def test_groups_are_clipped_apart():
  """Gradients beyond the clip are scaled by their own group's norm.

  A large Adam epsilon makes the update proportional to the clipped gradient.
  """
  settings = OptimizerConfig(
    peak_learning_rate=1.0, weight_decay=0.0, eps=1e6, clip_norm=1.0
  )
  _, tx = _build(main=settings, indexer=settings)
  params = _tree()
  updates = {}
  for factor in (1.0, 1000.0):
    grads = jax.tree_util.tree_map_with_path(
      lambda path, leaf, f=factor: jnp.full_like(
        leaf, f if optimizer.group_of(path) == 'indexer' else 0.01
      ),
      params,
    )
    updates[factor], _ = tx.update(grads, tx.init(params), params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(updates[1.0]):
    other = _at(updates[1000.0], path)
    if optimizer.group_of(path) == 'main':
      np.testing.assert_array_equal(other, leaf)
      # 0.01 is within the clip and passes as it is.
      np.testing.assert_allclose(-1e6 * leaf, 0.01, rtol=1e-3)
    else:
      # 20 elements of equal size and norm 1.
      np.testing.assert_allclose(-1e6 * leaf, 20**-0.5, rtol=1e-3)
      np.testing.assert_allclose(-1e6 * other, 20**-0.5, rtol=1e-3)


def _rates(steps=20, **settings):
  schedule = optimizer.schedule(
    OptimizerConfig(peak_learning_rate=2.0, **settings), steps
  )
  return [float(schedule(i)) for i in range(steps + 1)]


def test_schedule_constant_stays():
  assert _rates() == [2.0] * 21


def test_schedule_linear_warmup_starts_above_zero_and_reaches_the_peak():
  for steps in (1, 4):
    rates = _rates(warmup_steps=steps)
    expected = [2.0 * (i + 1) / steps for i in range(steps)]
    np.testing.assert_allclose(rates[:steps], expected, rtol=1e-6)
    np.testing.assert_allclose(rates[steps:], 2.0)


def test_schedule_linear_falls_to_the_final_fraction():
  rates = _rates(schedule='linear', final_fraction=0.25, warmup_steps=4)
  expected = [2.0 - 1.5 * i / 16 for i in range(17)]
  np.testing.assert_allclose(rates[4:], expected, rtol=1e-6)


def test_schedule_cosine_falls_to_the_final_fraction():
  rates = _rates(schedule='cosine', final_fraction=0.1)
  expected = [
    2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * i / 20)) / 2) for i in range(21)
  ]
  np.testing.assert_allclose(rates, expected, rtol=1e-5)


def _trained(moment_dtype, *, steps=50):
  """A quadratic's minimum is approached; returns (params, state, path)."""
  config = OptimizerConfig(
    peak_learning_rate=0.03, weight_decay=0.0, moment_dtype=moment_dtype
  )
  tx = optimizer.adamw(config, steps)
  rng = np.random.default_rng(0)
  target = jnp.asarray(rng.standard_normal((16, 8)), jnp.float32)
  params = {'w': jnp.zeros((16, 8))}
  state = tx.init(params)
  step = jax.jit(
    lambda params, state: tx.update({'w': params['w'] - target}, state, params)
  )
  path = []
  for _ in range(steps):
    updates, state = step(params, state)
    params = jax.tree.map(jnp.add, params, updates)
    path.append(np.asarray(params['w']))
  return params, state, np.stack(path)


def _bytes(tree):
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if leaf.ndim)


def test_adam_bfloat16_moments_take_half_the_memory_and_the_same_path():
  _, wide, path = _trained('float32')
  _, narrow, other = _trained('bfloat16')
  assert _bytes(wide) == 2 * 16 * 8 * 4
  assert _bytes(narrow) == 2 * 16 * 8 * 2
  # Rounding a moment by 2^-9 moves each step of at most 0.03 by about as much.
  np.testing.assert_allclose(other, path, atol=0.02, rtol=0)
  assert np.abs(path[-1]).max() > 0.9
  assert np.abs(other - path).max() > 0


def test_adam_bfloat16_moments_are_used_before_they_are_rounded():
  config = OptimizerConfig(moment_dtype='bfloat16')
  plain = optimizer.scale_by_adam(OptimizerConfig())
  tx = optimizer.scale_by_adam(config)
  gradient = {'w': jnp.float32([1.01, -0.3333, 7e-5])}
  first, _ = tx.update(gradient, tx.init(gradient))
  desired, _ = plain.update(gradient, plain.init(gradient))
  np.testing.assert_array_equal(first['w'], desired['w'])
