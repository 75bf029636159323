"""Recorded experts and selections in a whole model.

A model with other router biases and other indexers is the same function as soon
as it makes the same choices: that is what all comparisons here are made with.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.config.model import (
  DENSE,
  SPARSE,
  SPARSE_TRAINING,
  AttentionMode,
  Precision,
)
from dsv32_jax.functional import routing
from dsv32_jax.functional.recorded import Recorded
from dsv32_jax.modules.replay import Replay
from dsv32_jax.modules.transformer import DeepSeekV32
from tests.support import rl_cases, tiny_configs
from tests.support.tiny_configs import LENGTH
from tests.support.tolerances import assert_close

RECORD = AttentionMode(record=True)
SIZES = {'num_hidden_layers': 3}
ROWS = tiny_configs.rows([(9, 7), (20,)])
VALID = ROWS['segment_ids'] > 0
PLACES = 36.0


def arrays():
  return {
    'segment_ids_BT': jnp.asarray(ROWS['segment_ids']),
    'positions_BT': jnp.asarray(ROWS['positions']),
  }


@functools.cache
def sampler(cfg):
  """Variables that sampled, and what was recorded."""
  variables = tiny_configs.variables(cfg)
  output = tiny_configs.forward(cfg, RECORD)(
    variables, jnp.asarray(ROWS['tokens']), **arrays()
  )
  return variables, output


def records(output, **options) -> Replay:
  return Replay(
    experts=Recorded(output.expert_index_LBTA, **options),
    selected=Recorded(output.selected_LBTK, **options),
  )


@pytest.mark.slow
def test_replay_of_a_scanned_model_makes_the_same_choices():
  cfg = tiny_configs.config(**SIZES)
  variables, sampled = sampler(cfg)
  other = rl_cases.with_other_choices(variables)
  forward = tiny_configs.forward(cfg, RECORD)
  tokens_BT = jnp.asarray(ROWS['tokens'])
  found = forward(other, tokens_BT, replay=records(sampled), **arrays())
  assert_close(found.logits_BTV[VALID], sampled.logits_BTV[VALID])
  for name in ('expert_index_LBTA', 'selected_LBTK'):
    np.testing.assert_array_equal(
      getattr(found, name)[:, VALID], getattr(sampled, name)[:, VALID]
    )
  # Every record was taken, once a layer, and own choices would be others.
  routing, selection = found.routing_mismatch_L, found.selection_mismatch_L
  assert routing.positions.tolist() == [PLACES] * 2
  assert selection.positions.tolist() == [PLACES] * 3
  assert np.all(routing.differing > 5)
  assert np.all(selection.differing > 5)
  assert np.all(routing.choices == 2 * PLACES)
  assert np.all(routing.missing <= routing.choices)
  free = forward(other, tokens_BT, **arrays())
  assert np.max(np.abs(free.logits_BTV - sampled.logits_BTV)) > 0.1
  assert free.routing_mismatch_L is None


@pytest.mark.slow
def test_replay_of_the_own_choices_has_no_mismatch():
  cfg = tiny_configs.config(**SIZES)
  variables, sampled = sampler(cfg)
  found = tiny_configs.forward(cfg, RECORD)(
    variables,
    jnp.asarray(ROWS['tokens']),
    replay=records(sampled),
    **arrays(),
  )
  assert_close(found.logits_BTV[VALID], sampled.logits_BTV[VALID])
  assert np.all(found.routing_mismatch_L.differing == 0)
  assert np.all(found.selection_mismatch_L.missing == 0)


def shapes(cfg, mode=SPARSE, **inputs):
  model = DeepSeekV32(cfg)
  tokens_BT = jnp.zeros((2, LENGTH), jnp.int32)
  return jax.eval_shape(
    lambda: model.apply(
      tiny_configs.variables(cfg), tokens_BT, attention=mode, **inputs
    )
  )


@pytest.mark.parametrize(
  ('name', 'shape', 'message'),
  [
    ('experts', (1, 2, LENGTH, 2), r'expected \(2, 2, 20, 2\): 2 layers'),
    ('experts', (2, 2, LENGTH, 3), r'got shape \(2, 2, 20, 3\)'),
    ('experts', (2, 1, LENGTH, 2), r'2 rows of 20 tokens'),
    ('selected', (2, 2, LENGTH, 6), r'expected \(3, 2, 20, 6\)'),
    ('selected', (3, 2, LENGTH, 8), r'replay.selected: got shape'),
  ],
)
def test_replay_refuses_records_of_another_model(name, shape, message):
  replay = Replay(**{name: Recorded(jnp.zeros(shape, jnp.int32))})
  with pytest.raises(ValueError, match=message):
    shapes(tiny_configs.config(**SIZES), replay=replay)


def test_replay_refuses_what_cannot_be_replayed():
  cfg = tiny_configs.config(**SIZES)
  selected = Replay(selected=Recorded(jnp.zeros((3, 2, LENGTH, 6), jnp.int32)))
  with pytest.raises(ValueError, match='with dense attention'):
    shapes(cfg, DENSE, replay=selected)
  experts = Replay(experts=Recorded(jnp.zeros((0, 2, LENGTH, 2), jnp.int32)))
  with pytest.raises(ValueError, match='a model without experts'):
    shapes(dataclasses.replace(cfg, first_k_dense_replace=3), replay=experts)
  unrolled = dataclasses.replace(cfg, scan_layers=False)
  with pytest.raises(ValueError, match='records with caches'):
    shapes(unrolled, replay=selected, caches=())


@functools.cache
def gradients(cfg, mode):
  """Logits, indexer loss and gradients of the main model, compiled."""
  model = DeepSeekV32(cfg)

  def run(variables, replay):
    def loss(params):
      output = model.apply(
        variables | {'params': params},
        jnp.asarray(ROWS['tokens']),
        attention=mode,
        replay=replay,
        **arrays(),
      )
      weight_BTV = jnp.cos(
        jnp.arange(output.logits_BTV.size, dtype=jnp.float32)
      ).reshape(output.logits_BTV.shape)
      logits_BTV = jnp.where(VALID[..., None], output.logits_BTV, 0)
      total = jnp.sum(weight_BTV * logits_BTV)
      return total + jnp.sum(output.indexer_kl_L), (
        logits_BTV,
        output.indexer_kl_L,
      )

    return jax.grad(loss, has_aux=True)(variables['params'])

  return tiny_configs.jit(run)


def main_only(grads):
  return [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
    if not any(key.key == 'indexer' for key in path)
  ]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize('scan_layers', [True, False])
@pytest.mark.parametrize('remat', ['none', 'save_attention', 'full'])
def test_replay_under_rematerialisation_has_the_samplers_gradients(
  remat, scan_layers
):
  """If a recomputed block chose for itself, its gradients would be others."""
  cfg = tiny_configs.config(**SIZES, remat=remat, scan_layers=scan_layers)
  reference = dataclasses.replace(cfg, remat='none')
  variables, sampled = sampler(cfg)
  other = rl_cases.with_other_choices(variables)
  expected, (logits_BTV, _) = gradients(reference, SPARSE)(variables, None)
  found, (replayed_BTV, kl_L) = gradients(cfg, SPARSE_TRAINING)(
    other, records(sampled)
  )
  assert_close(replayed_BTV, logits_BTV)
  assert_close(main_only(found), main_only(expected), gradient=True)
  # The indexer learns on the recorded sets, whatever it would select.
  assert np.all(kl_L > 0)
  free, _ = gradients(cfg, SPARSE_TRAINING)(other, None)
  errors = [
    np.max(np.abs(a - b))
    for a, b in zip(main_only(free), main_only(expected), strict=True)
  ]
  assert max(errors) > 0.1


@pytest.mark.slow
@pytest.mark.exhaustive
def test_records_that_are_only_compared_change_nothing():
  cfg = tiny_configs.config(**SIZES)
  variables, sampled = sampler(cfg)
  other = rl_cases.with_other_choices(variables)
  forward = tiny_configs.forward(cfg, RECORD)
  tokens_BT = jnp.asarray(ROWS['tokens'])
  found = forward(
    other, tokens_BT, replay=records(sampled, force=False), **arrays()
  )
  free = forward(other, tokens_BT, **arrays())
  np.testing.assert_array_equal(found.logits_BTV, free.logits_BTV)
  assert np.all(found.selection_mismatch_L.differing > 5)
  assert np.all(found.routing_mismatch_L.differing > 5)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_replay_in_query_chunks_is_that_of_all_queries():
  cfg = tiny_configs.config(**SIZES, query_chunk=8)
  variables, sampled = sampler(dataclasses.replace(cfg, query_chunk=0))
  other = rl_cases.with_other_choices(variables)
  found = tiny_configs.forward(cfg, RECORD)(
    other, jnp.asarray(ROWS['tokens']), replay=records(sampled), **arrays()
  )
  assert_close(found.logits_BTV[VALID], sampled.logits_BTV[VALID])
  assert found.selection_mismatch_L.positions.tolist() == [PLACES] * 3
  np.testing.assert_array_equal(
    found.selected_LBTK[:, VALID], sampled.selected_LBTK[:, VALID]
  )


@pytest.mark.slow
@pytest.mark.exhaustive
def test_replay_in_bfloat16_takes_the_recorded_choices():
  precision = Precision(compute='bfloat16')
  cfg = tiny_configs.config(**SIZES, precision=precision, remat='full')
  variables, sampled = sampler(cfg)
  other = rl_cases.with_other_choices(variables)
  found = tiny_configs.forward(cfg, RECORD)(
    other, jnp.asarray(ROWS['tokens']), replay=records(sampled), **arrays()
  )
  np.testing.assert_array_equal(
    found.expert_index_LBTA[:, VALID],
    sampled.expert_index_LBTA[:, VALID],
  )
  assert_close(
    found.logits_BTV[VALID], sampled.logits_BTV[VALID], dtype=jnp.bfloat16
  )


@pytest.mark.slow
@pytest.mark.exhaustive
def test_complete_records_without_comparison_run_no_selector():
  """The indexer's top-k is not in the program at all."""
  cfg = tiny_configs.config(**SIZES)
  variables, sampled = sampler(cfg)
  options = {'compare': False, 'is_complete': True}
  found = tiny_configs.forward(cfg)(
    rl_cases.with_other_choices(variables),
    jnp.asarray(ROWS['tokens']),
    replay=records(sampled, **options),
    **arrays(),
  )
  assert_close(found.logits_BTV[VALID], sampled.logits_BTV[VALID])
  assert found.selection_mismatch_L is None

  def program(replay):
    model = DeepSeekV32(cfg)
    return str(
      jax.make_jaxpr(
        lambda replay: (
          model.apply(
            variables, jnp.asarray(ROWS['tokens']), replay=replay, **arrays()
          ).logits_BTV
        )
      )(replay)
    )

  assert 'name=indexed_topk' in program(records(sampled))
  assert 'name=indexed_topk' not in program(records(sampled, **options))


def test_gates_of_replayed_experts_follow_live_scores():
  """Spec 2.4: g_e = scale s_e / SUM_{j in S} s_j of the recorded set S."""
  rng = np.random.default_rng(0)
  logits_BTE = rng.standard_normal((2, 3, 8)).astype(np.float32)
  experts_BTA = np.argsort(rng.random((2, 3, 8)))[..., :2]

  def gate(logits_BTE):
    return routing.route(
      logits_BTE,
      jnp.full((8,), 100.0).at[:2].set(-100.0),
      num_experts_per_tok=2,
      n_group=4,
      topk_group=2,
      routed_scaling_factor=2.5,
      recorded=Recorded(jnp.asarray(experts_BTA)),
      valid=jnp.ones((2, 3), bool),
    )

  found = tiny_configs.jit(gate)(logits_BTE)
  np.testing.assert_array_equal(found.expert_index, experts_BTA)
  score = 1 / (1 + np.exp(-np.float64(logits_BTE)))
  chosen = np.take_along_axis(score, np.asarray(experts_BTA), axis=-1)
  np.testing.assert_allclose(
    found.gate, 2.5 * chosen / chosen.sum(-1, keepdims=True), rtol=1e-5
  )
  # Live: the first gate's gradient reaches both chosen scores, no others.
  gradient = tiny_configs.jit(jax.grad(lambda x: gate(x).gate[0, 0, 0]))(
    logits_BTE
  )
  reached = np.flatnonzero(np.asarray(gradient[0, 0]))
  assert set(reached) == set(np.asarray(experts_BTA)[0, 0].tolist())
