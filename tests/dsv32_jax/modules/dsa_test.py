"""One attention layer in every mode.

The tests share one batch: a full row, and one of two documents with padding.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.config.model import (
  DENSE,
  DENSE_WARMUP,
  SPARSE,
  SPARSE_TRAINING,
  AttentionMode,
)
from dsv32_jax.functional import masking
from dsv32_jax.modules import dsa, selectors
from dsv32_jax.modules.rope import softmax_scale
from tests.support import tiny_configs, tolerances

CFG = tiny_configs.config()
K, T = CFG.index_topk, tiny_configs.LENGTH
SEGMENTS = tiny_configs.rows([[T], [11, 7]])['segment_ids']
# The two programs that most tests read.
WARMUP = DENSE_WARMUP
TRAINING = dataclasses.replace(SPARSE_TRAINING, trace=True)
# T4 of the specification.
ABSORBED_TOLERANCE = 1e-5


def _context(segment_ids_BT):
  segment_ids_BT = jnp.asarray(segment_ids_BT)
  start_BT, end_BT = masking.key_ranges(segment_ids_BT)
  valid_BT = (segment_ids_BT > 0).astype(jnp.float32)
  return dsa.AttentionContext(
    positions_BT=jnp.maximum(end_BT - 1 - start_BT, 0),
    key_start_BT=start_BT,
    key_end_BT=end_BT,
    row_weight_BT=valid_BT / jnp.sum(valid_BT),
  )


@functools.lru_cache
def _parameters(cfg):
  layer = dsa.DeepSeekSparseAttention(cfg, DENSE)
  x_BTD = jnp.zeros((1, 2, cfg.hidden_size))
  shapes = jax.eval_shape(
    lambda: jax.tree.map(
      lambda box: box.value,
      layer.init(jax.random.key(0), x_BTD, _context(jnp.ones((1, 2), int))),
      is_leaf=lambda leaf: hasattr(leaf, 'value'),
    )
  )
  return tiny_configs.random_tree(shapes)


@functools.lru_cache
def _x(cfg, seed=0):
  generator = np.random.default_rng(seed)
  return jnp.asarray(
    generator.standard_normal((*SEGMENTS.shape, cfg.hidden_size)), jnp.float32
  )


@functools.lru_cache
def _run(mode, cfg=CFG):
  """Output and report of one mode on the shared batch."""
  layer = dsa.DeepSeekSparseAttention(cfg, mode)
  apply = tiny_configs.jit(
    lambda variables, x_BTD, context: layer.apply(
      variables, x_BTD, context, rngs={'selection': jax.random.key(7)}
    )
  )
  return apply(_parameters(cfg), _x(cfg), _context(SEGMENTS))


def _valid_sets(context):
  """Every query's valid keys, as sets."""
  start_BT, end_BT = context.key_start_BT, context.key_end_BT
  return [
    [set(range(s, e)) for s, e in zip(starts, ends, strict=True)]
    for starts, ends in zip(start_BT.tolist(), end_BT.tolist(), strict=True)
  ]


def _selected_sets(indices_BTK):
  return [
    [{i for i in row if i >= 0} for row in rows]
    for rows in np.asarray(indices_BTK).tolist()
  ]


@pytest.mark.parametrize('mode', [WARMUP, TRAINING], ids=['dense', 'sparse'])
def test_dsa_absorbed_mode_matches_mha_mode(mode):
  """T4, outputs and the indexer loss, whose target is built either way.

  None stands for MHA mode if dense and absorbed mode if sparse.
  """
  results = [
    _run(dataclasses.replace(mode, absorbed=absorbed))
    for absorbed in (None, mode.selector == 'all')
  ]
  (u_BTD, aux), (other_BTD, other) = results
  assert float(jnp.std(u_BTD)) > 0.5
  np.testing.assert_allclose(u_BTD, other_BTD, atol=ABSORBED_TOLERANCE, rtol=0)
  assert float(aux.indexer_kl) > 0.01
  np.testing.assert_allclose(
    aux.indexer_kl, other.indexer_kl, atol=ABSORBED_TOLERANCE
  )


def test_dsa_rows_before_k_equal_dense_and_later_rows_differ():
  """T6: a query with at most k valid keys selects them all."""
  sparse_BTD, _ = _run(TRAINING)
  dense_BTD, _ = _run(WARMUP)
  context = _context(SEGMENTS)
  count_BT = np.asarray(context.key_end_BT - context.key_start_BT)
  short, full = count_BT <= K, count_BT > K
  assert short.sum() > 2 * K
  np.testing.assert_allclose(
    sparse_BTD[short], dense_BTD[short], atol=ABSORBED_TOLERANCE
  )
  difference_BT = np.abs(sparse_BTD - dense_BTD).max(-1)
  assert (difference_BT[full] > 1e-3).all()


def test_dsa_k_at_least_length_equals_dense_warmup():
  """T6 and T11: with every key selected, Eq. 4 is Eq. 3."""
  u_BTD, aux = _run(TRAINING, dataclasses.replace(CFG, index_topk=3 * T))
  dense_BTD, dense = _run(WARMUP)
  np.testing.assert_allclose(u_BTD, dense_BTD, atol=ABSORBED_TOLERANCE)
  np.testing.assert_allclose(aux.indexer_kl, dense.indexer_kl, rtol=1e-5)
  assert aux.num_pairs == dense.num_pairs


def test_dsa_padded_rows_are_zero_and_everything_is_finite():
  for mode in (WARMUP, TRAINING):
    u_BTD, aux = _run(mode)
    assert np.isfinite(u_BTD).all()
    assert np.isfinite(aux.indexer_kl)
    np.testing.assert_array_equal(u_BTD[SEGMENTS == 0], 0)
    assert (np.abs(u_BTD[SEGMENTS > 0]).max(-1) > 0).all()


def test_dsa_number_of_pairs_counts_what_is_attended():
  valid = _valid_sets(_context(SEGMENTS))
  counts = [len(keys) for row in valid for keys in row]
  assert _run(WARMUP)[1].num_pairs == sum(counts)
  assert _run(TRAINING)[1].num_pairs == sum(min(n, K) for n in counts)


def test_dsa_indexer_selection_is_top_k_of_float64_scores():
  """Eq. 1 and 2 written out on the operands that the trace gives."""
  _, aux = _run(TRAINING)
  trace = jax.tree.map(lambda x: np.asarray(x, np.float64), aux.trace)
  dots = np.einsum('btji,bsi->btjs', trace.q_index_BTJI, trace.k_index_BSI)
  scores = np.einsum('btj,btjs->bts', trace.w_index_BTJ, np.maximum(dots, 0))
  selected = _selected_sets(aux.trace.indices_BTK)
  for b, row in enumerate(_valid_sets(_context(SEGMENTS))):
    for t, keys in enumerate(row):
      best = sorted(keys, key=lambda s: (-scores[b, t, s], s))[:K]
      assert selected[b][t] == set(best), (b, t)


def test_dsa_controls_select_what_their_functions_say():
  context = _context(SEGMENTS)
  ranges = (context.key_start_BT, context.key_end_BT)

  def indices(selector):
    _, aux = _run(AttentionMode(selector=selector, trace=True))
    return aux.trace

  window = indices('window')
  np.testing.assert_array_equal(
    window.indices_BTK, selectors.window(*ranges, k=K)
  )
  oracle = indices('oracle')
  desired = selectors.oracle(
    oracle.q_BTHX, oracle.k_BSHX, *ranges, k=K, scale=softmax_scale(CFG)
  )
  np.testing.assert_array_equal(oracle.indices_BTK, desired)
  random = _selected_sets(indices('random').indices_BTK)
  for b, row in enumerate(_valid_sets(context)):
    for t, keys in enumerate(row):
      assert random[b][t] <= keys
      assert len(random[b][t]) == min(K, len(keys))
  assert random != _selected_sets(window.indices_BTK)


def test_dsa_without_q_latent_is_dense_only():
  cfg = dataclasses.replace(CFG, q_lora_rank=None)
  u_BTD, _ = _run(DENSE, cfg)
  assert np.isfinite(u_BTD).all()
  assert 'indexer' not in _parameters(cfg)['params']
  for mode in (SPARSE, DENSE_WARMUP, dataclasses.replace(DENSE, trace=True)):
    with pytest.raises(ValueError, match='q_lora_rank: got None, expected'):
      _run(mode, cfg)
  # A control needs no indexer.
  u_BTD, _ = _run(AttentionMode(selector='window'), cfg)
  assert np.isfinite(u_BTD).all()


def test_dsa_dense_mode_matches_a_plain_float64_layer():
  """Sections 3.2 and 3.3, token by token and head by head."""
  weights = jax.tree.map(
    lambda x: np.asarray(x, np.float64), _parameters(CFG)['params']['mla']
  )
  x_BTD = np.asarray(_x(CFG), np.float64)
  R, N = CFG.qk_rope_head_dim, CFG.qk_nope_head_dim

  def norm(x, scale):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * scale

  def rotate(x, position):
    angle = position * CFG.rope_theta ** (-np.arange(0, R, 2) / R)
    pairs = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
    return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)

  def token(x_D, position):
    c_q = norm(x_D @ weights['w_dq'], weights['q_norm']['scale'])
    c_kv = norm(x_D @ weights['w_dkv'], weights['kv_norm']['scale'])
    k_rope = rotate(x_D @ weights['w_kr'], position)
    q_rope = rotate(np.einsum('q,qhr->hr', c_q, weights['w_qr']), position)
    k_nope = np.einsum('c,chn->hn', c_kv, weights['w_uk'])
    return (
      np.concatenate(
        [np.einsum('q,qhn->hn', c_q, weights['w_uq']), q_rope], -1
      ),
      np.concatenate([k_nope, np.broadcast_to(k_rope, (len(k_nope), R))], -1),
      np.einsum('c,chu->hu', c_kv, weights['w_uv']),
    )

  u_BTD, _ = _run(WARMUP)
  context = _context(SEGMENTS)
  for b, t in ((0, T - 1), (0, 3), (1, 10), (1, 16)):
    start = int(context.key_start_BT[b, t])
    parts = [token(x_BTD[b, s], s - start) for s in range(start, t + 1)]
    q_HX = parts[-1][0]
    scores_SH = np.stack(
      [np.sum(q_HX * k_HX, -1) for _, k_HX, _ in parts]
    ) / np.sqrt(N + R)
    p_SH = np.exp(scores_SH) / np.exp(scores_SH).sum(0)
    out_HU = sum(
      p[:, None] * v_HU for p, (_, _, v_HU) in zip(p_SH, parts, strict=True)
    )
    desired_D = np.einsum('hu,hud->d', out_HU, weights['w_o'])
    np.testing.assert_allclose(u_BTD[b, t], desired_D, rtol=2e-5, atol=2e-5)


def test_dsa_gradient_of_dense_modes_agrees():
  """MHA and absorbed mode, through every MLA weight."""

  def gradient(absorbed):
    layer = dsa.DeepSeekSparseAttention(
      CFG, dataclasses.replace(DENSE, absorbed=absorbed)
    )

    def loss(params, x_BTD):
      u_BTD, _ = layer.apply({'params': params}, x_BTD, _context(SEGMENTS))
      return jnp.sum(u_BTD * jnp.cos(x_BTD))

    return tiny_configs.jit(jax.grad(loss))(_parameters(CFG)['params'], _x(CFG))

  mha, absorbed = gradient(False), gradient(True)
  tolerances.assert_close(absorbed['mla'], mha['mla'], gradient=True)
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(mha['mla']))
  assert all(np.abs(g).max() == 0 for g in jax.tree.leaves(mha['indexer']))


@pytest.mark.parametrize(
  ('query_chunk', 'selector'),
  [
    (7, 'indexer'),
    pytest.param(8, 'indexer', marks=pytest.mark.slow),
    pytest.param(7, 'window', marks=pytest.mark.slow),
    pytest.param(8, 'window', marks=pytest.mark.slow),
  ],
)
def test_dsa_in_chunks_of_queries_equals_the_whole(query_chunk, selector):
  """Values, indexer loss and every gradient; 7 divides no length."""
  mode = dataclasses.replace(SPARSE_TRAINING, selector=selector)
  context = _context(SEGMENTS)

  @tiny_configs.jit
  def run(params, x_BTD):
    def loss(params, x_BTD, cfg):
      layer = dsa.DeepSeekSparseAttention(cfg, mode)
      u_BTD, aux = layer.apply({'params': params}, x_BTD, context)
      total = jnp.sum(u_BTD * jnp.cos(x_BTD)) + aux.indexer_kl
      return total, (u_BTD, aux.indexer_kl, aux.num_pairs)

    return [
      jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x_BTD, cfg)
      for cfg in (CFG, dataclasses.replace(CFG, query_chunk=query_chunk))
    ]

  whole, chunked = run(_parameters(CFG)['params'], _x(CFG))
  (_, (u, kl, pairs)), gradients = whole
  (_, (chunked_u, chunked_kl, chunked_pairs)), chunked_gradients = chunked
  tolerances.assert_close(chunked_u, u)
  np.testing.assert_allclose(chunked_kl, kl, rtol=1e-5)
  assert chunked_pairs == pairs
  tolerances.assert_close(chunked_gradients, gradients, gradient=True)
  assert kl > 0
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))


@pytest.mark.slow
def test_dsa_in_chunks_holds_per_head_queries_of_one_chunk_only():
  """Chunked, the step grows by what is held a token, not a token and head."""
  cfg = dataclasses.replace(CFG, num_attention_heads=64, remat='full')

  def temporary_bytes(query_chunk, length):
    layer = dsa.DeepSeekSparseAttention(
      dataclasses.replace(cfg, query_chunk=query_chunk), SPARSE_TRAINING
    )
    context = _context(np.ones((1, length), int))

    def loss(params, x_BTD):
      u_BTD, aux = layer.apply({'params': params}, x_BTD, context)
      return jnp.sum(u_BTD) + aux.indexer_kl

    x_BTD = jnp.zeros((1, length, cfg.hidden_size))
    compiled = (
      jax.jit(jax.grad(loss)).lower(_parameters(cfg)['params'], x_BTD).compile()
    )
    return compiled.memory_analysis().temp_size_in_bytes

  whole = temporary_bytes(0, 1024) - temporary_bytes(0, 512)
  chunked = temporary_bytes(64, 1024) - temporary_bytes(64, 512)
  assert chunked < whole / 4
