"""The training step of every stage, on uneven rows.

One compiled sparse-training step serves most tests. Its optimizer hands the
gradients back as its state, so that tests read gradients, not what Adam's
division makes of their rounding errors.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv32_jax.config import presets
from dsv32_jax.config.data import DataConfig
from dsv32_jax.config.model import DENSE_WARMUP, SPARSE_TRAINING
from dsv32_jax.config.training import OptimizerConfig, StageConfig
from dsv32_jax.losses import mtp
from dsv32_jax.modules.moe import ROUTER_BIAS
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.training import optimizer, stages, state, step
from dsv32_jax.training.batch import Batch, arrange, totals
from tests.support import tiny_configs, tolerances

# Two MoE blocks, one of them the MTP module's: dense layers cost time to
# compile and have nothing of their own here.
CFG = tiny_configs.config(
  num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=1
)
T, K = tiny_configs.LENGTH, CFG.index_topk
# Uneven on purpose: micro-batches hold 1 to 40 tokens, and one row is empty.
DOCUMENTS = ([20], [11, 7], [], [3], [1], [], [2, 13, 5], [20])
GAMMA = 0.25


def _config(kind='sparse_training', **changes):
  given = {
    'kind': kind,
    'steps': 4,
    'data': DataConfig(seq_len=T, batch_size=len(DOCUMENTS)),
    'init_from': None if kind == 'pretrain' else 'somewhere',
    'router_bias_update_rate': GAMMA,
  }
  return StageConfig(**(given | changes))


def _stage(cfg=CFG, **changes):
  return stages.build(_config(**changes), cfg)


@functools.lru_cache
def _batch():
  return Batch.from_numpy(tiny_configs.rows(DOCUMENTS, seed=2))


def _capture():
  """An optimizer that moves nothing and keeps the gradients as its state."""
  return optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, _, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
  )


@functools.lru_cache
def _compiled(micro_batches):
  stage = _stage(micro_batches=micro_batches)
  train_step = step.make_train_step(DeepSeekV32(CFG), stage, _capture())
  # Tracing it a second time is an error.
  return tiny_configs.jit(chex.assert_max_traces(train_step, n=1))


def _first_state():
  return state.create(tiny_configs.variables(CFG), _stage(), _capture())


@functools.lru_cache
def _result(micro_batches=1):
  return _compiled(micro_batches)(_first_state(), _batch(), jax.random.key(0))


def test_step_compiles_once():
  """A second step, on the state of the first, is the same program."""
  new_state, metrics = _result()
  again, _ = _compiled(1)(new_state, _batch(), jax.random.key(0))
  assert int(new_state.step) == 1
  assert int(again.step) == 2
  assert np.isfinite(metrics['loss/total'])


@pytest.mark.parametrize('micro_batches', [4])
def test_step_micro_batches_give_the_same_losses_and_gradients(micro_batches):
  (whole, metrics), (parts, other) = _result(), _result(micro_batches)
  assert set(metrics) == set(other)
  for name in metrics:
    tolerances.assert_close(
      other[name], metrics[name], gradient=True, label=name
    )
  tolerances.assert_close(parts.opt_state, whole.opt_state, gradient=True)
  for name in ('expert_load_LE', 'num_pairs_L'):
    np.testing.assert_array_equal(other[name], metrics[name])
  jax.tree.map(
    np.testing.assert_array_equal, parts.router_bias, whole.router_bias
  )
  for name in ('lm', 'balance', 'mtp', 'indexer_kl'):
    np.testing.assert_allclose(
      other[f'loss/{name}'], metrics[f'loss/{name}'], rtol=2e-6
    )


@pytest.mark.multidevice
def test_step_on_eight_devices_equals_one_device(data_mesh):
  spec = jax.sharding.PartitionSpec
  whole = jax.sharding.NamedSharding(data_mesh, spec())
  rows = jax.sharding.NamedSharding(data_mesh, spec('data'))
  train_step = tiny_configs.jit(
    step.make_train_step(DeepSeekV32(CFG), _stage(), _capture())
  )
  sharded, other = train_step(
    jax.device_put(_first_state(), whole),
    jax.device_put(_batch(), rows),
    jax.random.key(0),
  )
  new_state, metrics = _result()
  assert len(other['loss/total'].sharding.device_set) == 8
  tolerances.assert_close(other, metrics, gradient=True)
  tolerances.assert_close(sharded.opt_state, new_state.opt_state, gradient=True)
  jax.tree.map(
    np.testing.assert_array_equal, sharded.router_bias, new_state.router_bias
  )


def test_step_losses_are_those_of_the_models_output():
  """Cross-entropies, their weights and sums written out in float64."""
  batch = _batch()
  output = tiny_configs.forward(CFG, SPARSE_TRAINING, compute_mtp=True)(
    tiny_configs.variables(CFG),
    batch.tokens_BT,
    segment_ids_BT=batch.segment_ids_BT,
    positions_BT=batch.positions_BT,
  )

  def cross_entropy(logits, targets, weight):
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_p, np.asarray(targets)[..., None], -1)
    return -np.sum(picked[..., 0] * weight) / np.sum(weight)

  targets_BT, weight_BT = mtp.shifted_targets(
    batch.targets_BT, batch.loss_weight_BT, batch.segment_ids_BT
  )
  desired = {
    'lm': cross_entropy(
      output.logits_BTV, batch.targets_BT, np.asarray(batch.loss_weight_BT)
    ),
    'mtp': cross_entropy(
      output.mtp_logits_BTV, targets_BT, np.asarray(weight_BT)
    ),
    'balance': np.sum(output.balance_loss_L),
    'indexer_kl': np.sum(output.indexer_kl_L),
  }
  _, metrics = _result()
  for name, value in desired.items():
    assert value > 0
    np.testing.assert_allclose(metrics[f'loss/{name}'], value, rtol=1e-5)
  np.testing.assert_allclose(
    metrics['loss/total'],
    desired['lm']
    + desired['balance']
    + 0.1 * desired['mtp']
    + desired['indexer_kl'],
    rtol=1e-5,
  )
  np.testing.assert_allclose(
    metrics['indexer_kl_L'], output.indexer_kl_L, rtol=1e-5
  )


def test_step_realised_sparsity_counts_selected_pairs():
  """min(k, valid keys) pairs a query and layer, MTP block included."""
  lengths = [size for row in DOCUMENTS for size in row]
  pairs = sum(min(t, K) for size in lengths for t in range(1, size + 1))
  causal = sum(size * (size + 1) // 2 for size in lengths)
  assert pairs < causal
  np.testing.assert_array_equal(_result()[1]['num_pairs_L'], [pairs] * 2)


def test_step_moves_the_router_bias_against_the_load():
  """T10: up where the load is below the mean; main layers, then MTP."""
  new_state, metrics = _result()
  old = tiny_configs.variables(CFG)[ROUTER_BIAS]
  load_LE = np.asarray(metrics['expert_load_LE'])
  valid = int((_batch().segment_ids_BT > 0).sum())
  np.testing.assert_array_equal(load_LE.sum(-1), [2 * valid] * 2)
  moved_LE = GAMMA * np.sign(load_LE.mean(-1, keepdims=True) - load_LE)
  # Else one row in place of the other would go unnoticed.
  assert not np.array_equal(moved_LE[0], moved_LE[1])
  assert {-GAMMA, GAMMA} <= set(moved_LE.ravel().tolist())
  for row, part in enumerate(('moe_layers', 'mtp')):
    (before,) = jax.tree.leaves(old[part])
    (after,) = jax.tree.leaves(new_state.router_bias[part])
    np.testing.assert_allclose(
      np.ravel(after), np.ravel(before) + moved_LE[row], rtol=1e-6
    )


@functools.lru_cache
def _gradients_apart(attention):
  """Gradients of the main losses and of the KL, through the stage's code."""
  cfg = CFG if attention.is_sparse else tiny_configs.config(num_hidden_layers=1)
  model = DeepSeekV32(cfg)
  variables = tiny_configs.variables(cfg)
  stage = dataclasses.replace(_stage(cfg), attention=attention)

  def gradients(params):
    def losses(params):
      whole = totals(_batch())
      inputs = arrange(_batch())
      output = step.forward(
        model, variables | {'params': params}, inputs, whole, stage,
        jax.random.key(0),
      )  # fmt: skip
      _, parts = step.losses(output, inputs, whole, stage)
      main = parts['loss/lm'] + parts['loss/balance']
      main += parts.get('loss/mtp', 0)
      return main, parts['loss/indexer_kl']

    _, pull = jax.vjp(losses, params)
    return pull((1.0, 0.0))[0], pull((0.0, 1.0))[0]

  params = variables['params']
  return params, *tiny_configs.jit(gradients)(params)


@pytest.mark.parametrize(
  'attention', [SPARSE_TRAINING, DENSE_WARMUP], ids=['sparse', 'dense']
)
def test_step_losses_reach_their_own_parameters_only(attention):
  """T11: both ways, exactly; and each reaches all of its own."""
  _, main, kl = _gradients_apart(attention)
  groups = {'main': main, 'indexer': kl}
  for own, gradients in groups.items():
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
      where = jax.tree_util.keystr(path)
      largest = np.abs(leaf).max()
      assert np.isfinite(leaf).all(), where
      if optimizer.group_of(path) == own:
        assert largest > 0, where
      else:
        assert largest == 0, where


def test_step_kl_coefficient_does_not_change_the_main_update():
  """Separate clipping: 1000 times the KL, the same update of the rest."""
  params, main, kl = _gradients_apart(SPARSE_TRAINING)
  config = _config()
  stage = _stage()
  tx = optimizer.build(config, stage)

  @tiny_configs.jit
  def update(coefficient):
    gradients = jax.tree.map(lambda m, k: m + coefficient * k, main, kl)
    return tx.update(gradients, tx.init(params), params)[0]

  updates = {coefficient: update(coefficient) for coefficient in (1.0, 1000.0)}
  # The larger one is far beyond the clip, which a shared norm would feel.
  norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(kl)))
  assert 1000 * norm > 10 * config.optimizer.clip_norm
  leaves = zip(
    jax.tree_util.tree_leaves_with_path(updates[1.0]),
    jax.tree.leaves(updates[1000.0]),
    strict=True,
  )
  for (path, one), thousand in leaves:
    if optimizer.group_of(path) == 'main':
      np.testing.assert_array_equal(thousand, one)


@functools.lru_cache
def _warmed_up():
  """Five AdamW steps of warm-up, with decay on every group."""
  settings = OptimizerConfig(peak_learning_rate=0.02, weight_decay=0.1)
  config = _config(
    'dense_warmup', optimizer=settings, indexer_optimizer=settings
  )
  stage = stages.build(config, CFG)
  tx = optimizer.build(config, stage)
  train_step = tiny_configs.jit(
    step.make_train_step(DeepSeekV32(CFG), stage, tx)
  )
  current = state.create(tiny_configs.variables(CFG), stage, tx)
  lines = []
  for _ in range(5):
    current, metrics = train_step(current, _batch(), jax.random.key(0))
    lines.append(metrics)
  return current, lines


def test_warmup_leaves_all_but_the_indexers_bit_identical():
  """T12 and T10: no decay, no router bias, no momentum moves them."""
  after, _ = _warmed_up()
  before = tiny_configs.variables(CFG)
  new = jax.tree_util.tree_leaves_with_path(after.variables)
  old = jax.tree.leaves(before)
  assert len(new) == len(old)
  indexers = 0
  for (path, leaf), previous in zip(new, old, strict=True):
    where = jax.tree_util.keystr(path)
    if optimizer.group_of(path) == 'indexer':
      indexers += 1
      assert np.abs(leaf - previous).max() > 1e-3, where
    else:
      assert np.asarray(leaf).tobytes() == np.asarray(previous).tobytes(), where
  # Five arrays in the stack and in the MTP block.
  assert indexers == 10


def test_warmup_lowers_the_kl_and_computes_nothing_else():
  _, lines = _warmed_up()
  kl = [float(line['loss/indexer_kl']) for line in lines]
  assert kl == sorted(kl, reverse=True)
  assert kl[-1] < 0.9 * kl[0]
  for line in lines:
    assert {name for name in line if name.startswith('loss/')} == {
      'loss/indexer_kl',
      'loss/total',
    }
    assert set(line) >= {'grad_norm/indexer'}
    assert 'grad_norm/main' not in line
  lengths = [size for row in DOCUMENTS for size in row]
  causal = sum(size * (size + 1) // 2 for size in lengths)
  np.testing.assert_array_equal(lines[0]['num_pairs_L'], [causal] * 2)


def test_warmup_keeps_no_optimizer_state_of_frozen_parameters():
  after, _ = _warmed_up()
  arrays = [
    path
    for path, leaf in jax.tree_util.tree_leaves_with_path(after.opt_state)
    if leaf.ndim
  ]
  assert len(arrays) == 2 * 10
  assert {optimizer.group_of(path) for path in arrays} == {'indexer'}


@pytest.mark.parametrize(
  ('changes', 'losses'),
  [
    ({'kind': 'pretrain'}, {'lm', 'balance', 'mtp', 'total'}),
    ({'kind': 'pretrain', 'mtp_loss_weight': 0.0}, {'lm', 'balance', 'total'}),
    ({'selector': 'all'}, {'lm', 'balance', 'mtp', 'total'}),
    ({'selector': 'window'}, {'lm', 'balance', 'mtp', 'total'}),
  ],
)
def test_step_takes_the_losses_of_its_stage(changes, losses):
  stage = _stage(**changes)
  shapes = jax.eval_shape(
    step.make_train_step(DeepSeekV32(CFG), stage, _capture()),
    state.create(tiny_configs.variables(CFG), stage, _capture()),
    _batch(),
    jax.random.key(0),
  )[1]
  assert {
    name.removeprefix('loss/') for name in shapes if name.startswith('loss/')
  } == losses
  assert 'grad_norm/indexer' not in shapes
  assert 'indexer_kl_L' not in shapes


@pytest.mark.slow
@pytest.mark.parametrize(
  'kind',
  [
    pytest.param('pretrain', marks=pytest.mark.exhaustive),
    pytest.param('dense_warmup', marks=pytest.mark.exhaustive),
    'sparse_training',
  ],
)
def test_step_peak_memory_grows_linearly_with_the_length(kind):
  """Bar 6: four times the tokens, at most 4.4 times the temporaries."""
  cfg = dataclasses.replace(presets.tiny(), remat='save_attention')
  config = _config(kind)
  stage = stages.build(config, cfg)
  tx = optimizer.build(config, stage)
  model = DeepSeekV32(cfg)
  first = jax.eval_shape(
    lambda variables: state.create(variables, stage, tx),
    state.variable_shapes(model),
  )
  peaks = {}
  for length in (4096, 16384):
    integers = jax.ShapeDtypeStruct((1, length), jnp.int32)
    floats = jax.ShapeDtypeStruct((1, length), jnp.float32)
    rows = Batch(integers, integers, floats, integers, integers)
    compiled = (
      jax.jit(step.make_train_step(model, stage, tx), donate_argnums=0)
      .lower(first, rows, jax.random.key(0))
      .compile()
    )
    peaks[length] = compiled.memory_analysis().temp_size_in_bytes
  growth = peaks[16384] / peaks[4096]
  print(f'{kind}: {peaks} bytes, {growth:.2f} times')
  assert growth <= 4.4
