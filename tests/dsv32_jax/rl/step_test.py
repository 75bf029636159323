"""The optimizer step: what it replays, what learns, what it reports."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv32_jax.config.model import Precision
from dsv32_jax.config.rl import GRPOConfig
from dsv32_jax.config.training import OptimizerConfig
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.rl import batches, step
from dsv32_jax.rl.types import Group, Scored
from dsv32_jax.training import optimizer, state
from tests.support import rl_cases, tiny_configs

CFG = tiny_configs.config()
DEEPER = tiny_configs.config(num_hidden_layers=3, num_nextn_predict_layers=1)
GRPO = GRPOConfig(
  clip_epsilon=0.2,
  kl_strength=0.05,
  domain_kl_strength={'mathematics': 0.0},
  mask_delta=0.1,
)
LENGTHS = [[(3, 6), (3, 4), (3, 1)], [(5, 5), (5, 3), (5, 7)]]
ROW, FED = 12, sum(p + n - 1 for group in LENGTHS for p, n in group)


@functools.cache
def sampled(cfg):
  """The sampler's variables and one minibatch of its responses."""
  variables = tiny_configs.variables(cfg)
  groups = rl_cases.groups(cfg, variables, LENGTHS)
  batch = batches.make_batch(
    batches.samples(groups, GRPO), model=cfg, grpo=GRPO, row_tokens=ROW, rows=6
  )
  ref_BT = batch.sampling_logprob_BT - 0.1 * np.cos(
    np.arange(batch.tokens_BT.size, dtype=np.float32)
  ).reshape(batch.tokens_BT.shape)
  return variables, dataclasses.replace(batch, ref_logprob_BT=ref_BT)


def built(cfg, grpo, **options) -> tuple[Any, Any]:
  """The step and the state's maker."""
  stage = step.rl_stage(grpo, cfg)
  settings = OptimizerConfig(
    peak_learning_rate=1e-3, warmup_steps=0, schedule='constant'
  )
  groups = {name: optimizer.adamw(settings, 10) for name in stage.trainable}
  tx = optax.partition(groups, optimizer.labels)
  run = step.make_rl_step(DeepSeekV32(cfg), grpo, tx, **options)
  return run, lambda variables: state.create(variables, stage, tx)


@functools.cache
def result(cfg=CFG, moved=False, micro_batches=1, logits_chunk=0, **switches):
  """The state before and after one step, and the metrics."""
  run, create = built(
    cfg,
    dataclasses.replace(GRPO, **switches),
    micro_batches=micro_batches,
    logits_chunk=logits_chunk,
  )
  variables, batch = sampled(cfg)
  if moved:
    variables = rl_cases.with_other_choices(variables)
  before = create(variables)
  after, metrics = tiny_configs.jit(run)(before, batch)
  return before, after, {k: float(v) for k, v in metrics.items()}


def changed(before, after) -> dict[str, bool]:
  """Which groups of parameters moved."""
  groups: dict[str, bool] = {}
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(before.params),
    jax.tree.leaves(after.params),
    strict=True,
  ):
    name = 'mtp' if path[0].key == 'mtp' else optimizer.group_of(path)
    groups[name] = groups.get(name, False) or bool(np.any(a != b))
  return groups


@pytest.mark.slow
@pytest.mark.exhaustive
def test_step_with_other_choices_trains_what_was_sampled():
  """Routers' biases and indexers have moved since: nothing else differs."""
  before, after, metrics = result(moved=True)
  assert metrics['grpo/log_ratio_abs_max'] < 3e-6
  assert metrics['grpo/ratio_mean'] == pytest.approx(1, abs=1e-6)
  assert metrics['mismatch/routing'] > 0.2
  assert metrics['mismatch/selection'] > 0.1
  assert 0 < metrics['mismatch/routing_choices'] <= metrics['mismatch/routing']
  # Every record is taken once in its layer, and there is one for each token.
  assert metrics['replayed/routing'] == FED
  assert metrics['replayed/selection'] == 2 * FED
  assert metrics['num_tokens'] == FED
  new = sum(n for group in LENGTHS for _, n in group)
  assert metrics['policy_tokens'] == new
  assert metrics['grpo/responses'] == 6
  assert metrics['grpo/clip_fraction'] == 0
  assert metrics['grpo/masked_fraction'] == 0
  assert (
    metrics['kl_tokens/mathematics'] + metrics['kl_tokens/programming'] == new
  )
  assert 0 < metrics['kl/programming'] < 0.1
  assert metrics['loss/kl'] > 0
  assert metrics['loss/indexer_kl'] > 0
  assert metrics['loss/total'] == pytest.approx(
    metrics['loss/policy'] + metrics['loss/kl'] + metrics['loss/indexer_kl'],
    rel=1e-5,
  )
  assert 0 < metrics['entropy'] < np.log(CFG.vocab_size)
  assert metrics['grad_norm/main'] > 0
  assert metrics['grad_norm/indexer'] > 0
  assert all(np.isfinite(value) for value in metrics.values())
  assert changed(before, after) == {'main': True, 'indexer': True}
  assert after.step == 1
  for a, b in zip(
    jax.tree.leaves(before.router_bias),
    jax.tree.leaves(after.router_bias),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)


def random_batch():
  """A batch that nothing was computed for."""
  group = Group(
    problem='p', domain='programming', mode='chat',
    responses=tuple(
      Scored(response=rl_cases.random_response(CFG, 3, n), reward=float(n))
      for n in (4, 6)
    ),
  )  # fmt: skip
  batch = batches.make_batch(
    batches.samples([group], GRPO), model=CFG, grpo=GRPO, row_tokens=ROW, rows=6
  )
  return dataclasses.replace(batch, ref_logprob_BT=batch.sampling_logprob_BT)


def traced(batch, cfg=CFG, grpo=GRPO, **options):
  run, create = built(cfg, grpo, **options)
  state_shapes = jax.eval_shape(lambda: create(tiny_configs.variables(cfg)))
  return jax.eval_shape(run, state_shapes, batch)


@pytest.mark.parametrize(
  ('field', 'message'),
  [
    ('ref_logprob_BT', 'got None with a KL strength of 0.05'),
    ('experts_BTLA', 'experts_BTLA: got None, expected a record'),
    ('selected_BTLK', 'selected_BTLK: got None, expected a record'),
  ],
)
def test_step_refuses_a_batch_without_what_it_needs(field, message):
  batch = random_batch()
  with pytest.raises(ValueError, match=message):
    traced(dataclasses.replace(batch, **{field: None}))


def test_step_refuses_records_of_another_model_and_odd_micro_batches():
  batch = random_batch()
  other = dataclasses.replace(CFG, num_hidden_layers=4)
  with pytest.raises(ValueError, match=r'replay\.experts: got shape'):
    traced(batch, cfg=other)
  with pytest.raises(ValueError, match='micro_batches: got 4 for 6 rows'):
    traced(batch, micro_batches=4)


def tolerances_hold(found, expected):
  for name, value in expected.items():
    assert found[name] == pytest.approx(value, rel=2e-5, abs=2e-6), name


@pytest.mark.slow
@pytest.mark.exhaustive
def test_step_in_micro_batches_and_chunks_is_the_whole_step():
  _, expected_state, expected = result(moved=True)
  _, found_state, found = result(moved=True, micro_batches=3, logits_chunk=5)
  tolerances_hold(found, expected)
  for a, b in zip(
    jax.tree.leaves(found_state.params),
    jax.tree.leaves(expected_state.params),
    strict=True,
  ):
    # One step of Adam at 1e-3: where a gradient is all rounding, its sign is.
    close = np.isclose(a, b, atol=1e-6)
    assert np.mean(close) > 0.99


@pytest.mark.slow
@pytest.mark.exhaustive
def test_step_without_a_replay_is_off_policy():
  """The same batch, the switches one by one; equal weights but for choices."""
  ratios = {}
  for name in ('keep_routing', 'keep_selection', 'keep_sampling_mask'):
    _, _, metrics = result(moved=True, **{name: False})
    ratios[name] = metrics['grpo/log_ratio_abs_mean']
    if name != 'keep_sampling_mask':
      kind = name.removeprefix('keep_')
      # Still counted.
      assert metrics[f'mismatch/{kind}'] > 0.1
  print(ratios)
  assert min(ratios.values()) > 0.05


@pytest.mark.slow
@pytest.mark.exhaustive
def test_step_leaves_frozen_indexers_and_the_mtp_module():
  before, after, metrics = result(cfg=DEEPER, indexer='frozen')
  # The MTP module has no loss here: not even decay may move it.
  assert changed(before, after) == {
    'main': True, 'indexer': False, 'mtp': False,
  }  # fmt: skip
  assert metrics['loss/indexer_kl'] == 0
  assert 'grad_norm/indexer' not in metrics


@pytest.mark.slow
@pytest.mark.exhaustive
def test_indexers_learn_from_their_own_loss_alone():
  """ "The main model from its task loss only" (spec section 1), and reverse."""
  _, _, without = result(indexer_kl_coefficient=0.0)
  _, _, usual = result()
  assert without['grad_norm/indexer'] == 0
  assert usual['grad_norm/indexer'] > 0
  assert usual['grad_norm/main'] == pytest.approx(
    without['grad_norm/main'], rel=1e-5
  )


@pytest.mark.slow
@pytest.mark.exhaustive
def test_router_biases_follow_the_replayed_load_if_asked():
  before, after, _ = result(router_bias_update_rate=0.01)
  moved = [
    np.abs(np.asarray(a - b))
    for a, b in zip(
      jax.tree.leaves(before.router_bias),
      jax.tree.leaves(after.router_bias),
      strict=True,
    )
  ]
  assert max(x.max() for x in moved) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_kl_over_the_vocabulary_is_another_one():
  _, _, whole = result(kl_over='vocabulary')
  _, _, kept = result()
  assert whole['kl/all'] != pytest.approx(kept['kl/all'], rel=0.01)
  assert whole['grpo/ratio_mean'] == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize('remat', ['none', 'save_attention', 'full'])
@pytest.mark.parametrize('scan_layers', [True, False])
def test_step_in_bfloat16_replays_under_every_policy(remat, scan_layers):
  cfg = dataclasses.replace(
    CFG,
    remat=remat,
    scan_layers=scan_layers,
    precision=Precision(compute='bfloat16'),
  )
  _, _, metrics = result(cfg=cfg, moved=True, logits_chunk=4)
  # bfloat16 in other programs: near, where other choices are far.
  assert metrics['grpo/log_ratio_abs_mean'] < 0.02
  assert metrics['mismatch/routing'] > 0.2
  assert metrics['replayed/selection'] == 2 * FED


@pytest.mark.slow
@pytest.mark.exhaustive
def test_scores_are_the_samplers_and_serve_as_reference():
  variables, batch = sampled(CFG)
  score = tiny_configs.jit(step.make_score_fn(DeepSeekV32(CFG), GRPO))
  found = score(rl_cases.with_other_choices(variables), batch)
  is_policy_BT = batch.response_BT >= 0
  np.testing.assert_allclose(
    found.logprob_BT[is_policy_BT],
    batch.sampling_logprob_BT[is_policy_BT],
    atol=3e-6,
  )
  np.testing.assert_array_equal(found.ref_logprob_BT, found.logprob_BT)
  assert found.metrics['sampler/log_ratio_abs_mean'] < 1e-6
  assert found.metrics['mismatch/selection'] > 0.1
  # As reference of the very same policy the KL is nothing.
  run, create = built(CFG, GRPO)
  batch = dataclasses.replace(batch, ref_logprob_BT=found.ref_logprob_BT)
  _, metrics = tiny_configs.jit(run)(create(variables), batch)
  assert abs(metrics['loss/kl']) < 1e-9
  assert jnp.abs(metrics['kl/all']) < 1e-9
