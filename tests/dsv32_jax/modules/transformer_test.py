"""The whole model: causality, packing, batches, parameters, devices.

One configuration and one batch shape serve nearly all tests.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax import inference
from dsv32_jax.config import presets
from dsv32_jax.config.model import (
  DENSE,
  DENSE_WARMUP,
  SPARSE,
  SPARSE_TRAINING,
  AttentionMode,
)
from dsv32_jax.modules.moe import ROUTER_BIAS
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.sharding import axes
from tests.support import tiny_configs, tolerances

CFG = tiny_configs.config()
K, T = CFG.index_topk, tiny_configs.LENGTH
TRACED = dataclasses.replace(SPARSE, trace=True)


def _forward(rows):
  """Logits and selected sets of one batch, always by the same program."""
  return tiny_configs.forward(CFG, TRACED)(
    tiny_configs.variables(CFG),
    jnp.asarray(rows['tokens']),
    segment_ids_BT=jnp.asarray(rows['segment_ids']),
    positions_BT=jnp.asarray(rows['positions']),
  )


def _row(rows, row):
  return {name: value[row] for name, value in rows.items()}


def _stack(*rows):
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _place(row, start, size, *, at=0):
  """One document of a row, alone in a row of its own."""
  alone = {name: np.zeros_like(value) for name, value in row.items()}
  for name, value in row.items():
    alone[name][at : at + size] = value[start : start + size]
  alone['segment_ids'][at : at + size] = 1
  return alone


def test_transformer_row_does_not_depend_on_its_batch():
  """T7: bitwise, whatever the other rows hold and wherever the row stands."""
  first = tiny_configs.rows([[T], [11, 7], []], seed=1)
  other = tiny_configs.rows([[3, 14], [], [T]], seed=2)
  row = _row(first, 0)
  results = [
    (_forward(first), 0),
    (_forward(_stack(row, _row(other, 0), _row(other, 2))), 0),
    (_forward(_stack(_row(other, 2), _row(other, 0), row)), 2),
  ]
  output, place = results[0]
  for other_output, other_place in results[1:]:
    np.testing.assert_array_equal(
      other_output.logits_BTV[other_place], output.logits_BTV[place]
    )
    for trace, other_trace in zip(
      output.trace_L, other_output.trace_L, strict=True
    ):
      np.testing.assert_array_equal(
        other_trace.indices_BTK[other_place], trace.indices_BTK[place]
      )


def test_transformer_later_tokens_change_nothing_before_them():
  """T8, bitwise: the prefix of a row whose end is replaced, or cut off."""
  rows = tiny_configs.rows([[T], [T], [T]], seed=3)
  cut = 12
  rows['tokens'][1, cut:] = (rows['tokens'][0, cut:] + 5) % 32
  rows['tokens'][:, :cut] = rows['tokens'][0, :cut]
  rows['tokens'][2] = rows['tokens'][0]
  rows['segment_ids'][2, cut:] = 0
  logits_BTV = np.asarray(_forward(rows).logits_BTV)
  np.testing.assert_array_equal(logits_BTV[1, :cut], logits_BTV[0, :cut])
  np.testing.assert_array_equal(logits_BTV[2, :cut], logits_BTV[0, :cut])
  assert (np.abs(logits_BTV[1] - logits_BTV[0])[cut:].max(-1) > 0).all()


def test_transformer_packed_documents_equal_documents_alone():
  packed = tiny_configs.rows([[11, 8]] * 3, seed=4)
  row = _row(packed, 0)
  alone = _stack(_place(row, 0, 11), _place(row, 11, 8), row)
  together = np.asarray(_forward(packed).logits_BTV[0])
  apart = np.asarray(_forward(alone).logits_BTV)
  tolerances.assert_close(apart[0, :11], together[:11], gradient=True)
  tolerances.assert_close(apart[1, :8], together[11:19], gradient=True)


def test_transformer_positions_default_to_those_of_each_document():
  rows = tiny_configs.rows([[11, 7], [T], []], seed=5)
  given = _forward(rows)
  derived = tiny_configs.forward(CFG, TRACED)(
    tiny_configs.variables(CFG),
    jnp.asarray(rows['tokens']),
    segment_ids_BT=jnp.asarray(rows['segment_ids']),
  )
  valid = rows['segment_ids'] > 0
  np.testing.assert_array_equal(
    derived.logits_BTV[valid], given.logits_BTV[valid]
  )


def test_transformer_padding_is_finite_everywhere():
  """T8: rows of padding alone, a single token, padding after documents."""
  output = _forward(tiny_configs.rows([[], [1], [7, 1, 4]], seed=6))
  for leaf in jax.tree.leaves(output):
    assert np.isfinite(leaf).all()


@functools.lru_cache
def _sensitivity():
  """d (sum of |logits|) at a position by the embedding of every token."""
  model = DeepSeekV32(CFG)

  def total(params, rest, tokens_BT, segment_ids_BT, position):
    logits_BTV = model.apply(
      {'params': params, **rest}, tokens_BT, segment_ids_BT=segment_ids_BT
    ).logits_BTV
    return jnp.sum(jnp.sin(logits_BTV[0, position]))

  return tiny_configs.jit(jax.grad(total))


def test_transformer_gradient_by_future_padded_and_foreign_tokens_is_zero():
  """T8: every position holds its own token, so its own embedding row."""
  variables = dict(tiny_configs.variables(CFG))
  params = variables.pop('params')
  tokens_BT = jnp.arange(3, 3 + T, dtype=jnp.int32)[None]
  segments = tiny_configs.rows([[8, 9]])['segment_ids']
  for position in (0, 5, 7, 8, 14, 16):
    gradient = _sensitivity()(
      params, variables, tokens_BT, jnp.asarray(segments), position
    )['embedding']
    size_T = np.abs(np.asarray(gradient)[3 : 3 + T]).max(-1)
    first = 0 if position < 8 else 8
    np.testing.assert_array_equal(size_T[position + 1 :], 0)
    np.testing.assert_array_equal(size_T[:first], 0)
    assert size_T[position] > 0
    if first < position < first + K:
      # Short enough that every token of the document is selected.
      assert (size_T[first : position + 1] > 0).all()


def test_transformer_without_logits_computes_the_same_losses():
  rows = tiny_configs.rows([[T], [11, 7]])
  cfg = tiny_configs.config(num_hidden_layers=1)
  outputs = [
    tiny_configs.forward(cfg, DENSE_WARMUP, compute_logits=compute)(
      tiny_configs.variables(cfg),
      jnp.asarray(rows['tokens']),
      segment_ids_BT=jnp.asarray(rows['segment_ids']),
    )
    for compute in (True, False)
  ]
  assert outputs[1].logits_BTV is None
  assert outputs[0].logits_BTV.shape == (2, T, CFG.vocab_size)
  assert outputs[0].logits_BTV.dtype == jnp.float32
  np.testing.assert_allclose(
    outputs[1].indexer_kl_L, outputs[0].indexer_kl_L, rtol=1e-6
  )
  assert (outputs[0].indexer_kl_L > 0).all()


def test_transformer_scanned_equals_unrolled():
  cfg = tiny_configs.config(num_hidden_layers=3, num_nextn_predict_layers=1)
  rows = tiny_configs.rows([[T], [11, 7]])
  arrays = {
    'segment_ids_BT': jnp.asarray(rows['segment_ids']),
  }
  model, variables = inference.unroll(
    DeepSeekV32(cfg), tiny_configs.variables(cfg)
  )
  assert sorted(variables['params']['moe_layers']) == ['layer_0', 'layer_1']
  outputs = [
    tiny_configs.forward(c, SPARSE_TRAINING, compute_mtp=True)(
      v, jnp.asarray(rows['tokens']), **arrays
    )
    for c, v in (
      (cfg, tiny_configs.variables(cfg)),
      (model.cfg, variables),
    )
  ]
  assert outputs[0].indexer_kl_L.shape == (4,)
  assert outputs[0].expert_load_LE.shape == (3, 8)
  for name in (
    'logits_BTV',
    'mtp_logits_BTV',
    'indexer_kl_L',
    'num_pairs_L',
    'balance_loss_L',
    'expert_load_LE',
  ):
    scanned, unrolled = (getattr(output, name) for output in outputs)
    tolerances.assert_close(unrolled, scanned, gradient=True, label=name)


def test_transformer_tied_embeddings_have_no_head():
  cfg = tiny_configs.config(tie_word_embeddings=True)
  shapes = _shapes(cfg)['params']
  assert 'lm_head' not in shapes
  assert 'lm_head' in _shapes(CFG)['params']


def test_transformer_caches_on_a_scanned_model_are_refused():
  with pytest.raises(ValueError, match=r'caches: got .*expected an unrolled'):
    DeepSeekV32(CFG).apply(
      tiny_configs.variables(CFG), jnp.zeros((1, 1), jnp.int32), caches=()
    )


@functools.lru_cache
def _shapes(cfg):
  """Boxed shapes of all variables."""
  return jax.eval_shape(
    lambda: DeepSeekV32(cfg).init(
      jax.random.key(0), jnp.zeros((1, 1), jnp.int32), attention=DENSE
    )
  )


def _count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(nn.meta.unbox(tree)))


def test_transformer_671b_parameter_counts_are_the_published_ones():
  """Section 1: main model with its router biases, and the MTP module."""
  shapes = _shapes(presets.deepseek_v32_671b())
  params, bias = dict(shapes['params']), dict(shapes[ROUTER_BIAS])
  mtp = _count(params.pop('mtp')) + _count(bias.pop('mtp'))
  assert mtp == 11_624_027_648
  assert _count(bias) == 58 * 256
  assert _count(params) + _count(bias) == 671_877_944_064

  def indexers(tree):
    leaves = jax.tree_util.tree_leaves_with_path(nn.meta.unbox(tree))
    return sum(
      leaf.size for path, leaf in leaves if 'indexer' in map(_name, path)
    )

  assert indexers(params) == 851_524_864


def _name(key):
  return getattr(key, 'key', None)


@pytest.mark.parametrize(
  ('preset', 'millions'), [('mini', 28.5), ('small', 423)]
)
def test_transformer_preset_has_the_size_it_is_said_to_have(preset, millions):
  count = _count(_shapes(presets.get(preset))['params'])
  assert count / 1e6 == pytest.approx(millions, rel=2e-3)


@pytest.mark.parametrize(
  'cfg',
  [
    presets.deepseek_v32_671b(),
    tiny_configs.config(num_nextn_predict_layers=1, scan_layers=False),
    tiny_configs.config(q_lora_rank=None, tie_word_embeddings=True),
  ],
  ids=['671b', 'unrolled', 'no_q_latent'],
)
def test_transformer_every_variable_has_logical_axes(cfg):
  boxes = jax.tree_util.tree_leaves_with_path(
    _shapes(cfg), is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)
  )
  used = set()
  for path, box in boxes:
    where = jax.tree_util.keystr(path)
    assert isinstance(box, nn.Partitioned), where
    assert len(box.names) == len(box.value.shape), where
    assert set(box.names) <= set(axes.LOGICAL_AXES), where
    used |= set(box.names)
  if cfg.scan_layers and cfg.q_lora_rank is not None:
    # No name that nothing uses; rules for it would never be tried.
    activations = {axes.BATCH, axes.SEQUENCE}
    assert used == set(axes.LOGICAL_AXES) - activations


# Integer-valued operands: every norm divides entries of equal size, 1024, by
# 1024 exactly (the epsilon is lost in 2^20), RoPE sees no weight, and heads and
# widths of 16 make the scale of the head weights 1 / 16.
_EXACT = tiny_configs.config(
  num_hidden_layers=3,
  hidden_size=16,
  q_lora_rank=16,
  index_n_heads=16,
  index_head_dim=16,
  index_topk=5,
)


def _exact_variables():
  generator = np.random.default_rng(8)
  width = _EXACT.hidden_size

  def signs(*shape):
    return generator.choice([-1.0, 1.0], shape)

  def one_hot(*shape):
    """Columns with one entry of size 1024."""
    rows = generator.integers(0, shape[-2], (*shape[:-2], 1, shape[-1]))
    hot = np.arange(shape[-2])[:, None] == rows
    return 1024 * hot * signs(*shape[:-2], 1, shape[-1])

  def value(path, leaf):
    names = [key.key for key in path]
    shape = leaf.shape
    match names[-1]:
      case 'embedding':
        return 1024 * signs(*shape)
      case 'scale':
        return np.ones(shape)
      case 'w_dq':
        return one_hot(*shape)
      case 'w_ik':
        # Pairs of opposite sign: mean 0, so LayerNorm gives exactly +-1.
        half = one_hot(*shape[:-1], shape[-1] // 2)
        return np.concatenate([half, -half], axis=-1)
      case 'w_iq':
        integers = generator.integers(-2, 3, shape)
        integers[..., : _EXACT.qk_rope_head_dim] = 0
        return integers
      case 'w_iw':
        return generator.integers(-1, 3, shape)
      case 'bias' | 'e_score_correction_bias' | 'w_o' | 'w_down':
        # Nothing is added to the residual stream: it stays integer.
        return np.zeros(shape)
      case _:
        return generator.standard_normal(shape)

  assert width == 16
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: jnp.asarray(value(path, leaf), leaf.dtype),
    tiny_configs.variables(_EXACT),
  )


@pytest.mark.multidevice
def test_transformer_integer_inputs_select_the_same_sets_on_eight_devices(
  data_mesh,
):
  """Bar 6: end to end, with plateaus of equal scores at the boundary."""
  variables = _exact_variables()
  generator = np.random.default_rng(9)
  # Few different tokens: the same key many times.
  tokens_BT = jnp.asarray(generator.integers(0, 6, (8, T)), jnp.int32)
  forward = tiny_configs.forward(_EXACT, TRACED)
  one = forward(variables, tokens_BT)
  spec = jax.sharding.PartitionSpec
  eight = forward(
    jax.device_put(variables, jax.sharding.NamedSharding(data_mesh, spec())),
    jax.device_put(
      tokens_BT, jax.sharding.NamedSharding(data_mesh, spec('data'))
    ),
  )
  ties = 0
  for trace, other in zip(one.trace_L, eight.trace_L, strict=True):
    assert len(other.indices_BTK.sharding.device_set) == 8
    np.testing.assert_array_equal(other.indices_BTK, trace.indices_BTK)
    q, k, w = (
      np.asarray(x, np.float64)
      for x in (trace.q_index_BTJI, trace.k_index_BSI, 16 * trace.w_index_BTJ)
    )
    # Queries are 0 in the rotated channels, the first ones.
    for x in (q, k[..., _EXACT.qk_rope_head_dim :], w):
      np.testing.assert_array_equal(x, np.round(x))
    scores = np.einsum(
      'btj,btjs->bts', w, np.maximum(np.einsum('btji,bsi->btjs', q, k), 0)
    )
    for b, t in np.ndindex(8, T):
      best = sorted(range(t + 1), key=lambda s: (-scores[b, t, s], s))
      kept = best[: _EXACT.index_topk]
      picked = np.asarray(trace.indices_BTK[b, t])
      assert set(picked[picked >= 0].tolist()) == set(kept)
      rest = best[_EXACT.index_topk :]
      ties += bool(rest) and scores[b, t, rest[0]] == scores[b, t, kept[-1]]
  # A third of the boundaries of full rows lie in a plateau.
  assert ties > 3 * 8 * (T - _EXACT.index_topk) / 3


def test_transformer_random_selector_is_new_in_every_layer():
  cfg = tiny_configs.config(num_hidden_layers=3)
  mode = AttentionMode(selector='random', trace=True)
  model = DeepSeekV32(cfg)
  apply = tiny_configs.jit(
    lambda variables, tokens_BT, key: model.apply(
      variables, tokens_BT, attention=mode, rngs={'selection': key}
    )
  )
  tokens_BT = jnp.zeros((1, T), jnp.int32)
  layers = [
    trace.indices_BTK
    for trace in apply(
      tiny_configs.variables(cfg), tokens_BT, jax.random.key(0)
    ).trace_L
  ]
  assert not np.array_equal(layers[1], layers[2])
  assert not np.array_equal(layers[0], layers[1])
