"""Every figure of the selection's quality against plain float64 loops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax.config.model import DENSE
from dsv32_jax.evaluation import selection_recall
from dsv32_jax.modules.rope import softmax_scale
from dsv32_jax.modules.transformer import DeepSeekV32
from tests.support import tiny_configs

# Two indexer heads: scores of exactly 0, and ties, at the boundary.
# No experts: they have no part in it and cost time to compile.
CFG = tiny_configs.config(index_n_heads=2, first_k_dense_replace=2)
K = 9
ROWS = tiny_configs.rows([[20], [11, 9], [3, 12]])
KEY = jax.random.key(5)


@functools.lru_cache
def _actual():
  return selection_recall.selection_quality(
    DeepSeekV32(CFG),
    tiny_configs.variables(CFG),
    jnp.asarray(ROWS['tokens']),
    jnp.asarray(ROWS['segment_ids']),
    KEY,
    k=K,
  )


def _keys(b, t):
  """Valid keys of a query: its document up to itself."""
  segments = ROWS['segment_ids'][b]
  if segments[t] == 0:
    return []
  return [s for s in range(t + 1) if segments[s] == segments[t]]


def _row(q_HX, k_SHX, scores_S, draw_S):
  """Figures of one query over its valid keys."""
  logits_HS = softmax_scale(CFG) * np.einsum('hx,shx->hs', q_HX, k_SHX)
  mass_HS = np.exp(logits_HS - logits_HS.max(-1, keepdims=True))
  p_S = (mass_HS / mass_HS.sum(-1, keepdims=True)).mean(0)
  count = len(p_S)

  def best(values):
    return sorted(range(count), key=lambda s: (-values[s], s))[:K]

  sets = {
    'indexer': best(scores_S),
    'oracle': best(p_S),
    'window': list(range(count))[-K:],
    'random': best(draw_S),
  }
  mine = set(sets['indexer'])
  kth = min(scores_S[s] for s in mine)
  log_q = scores_S - scores_S.max()
  log_q = log_q - np.log(np.exp(log_q).sum())
  figures = {f'mass/{name}': p_S[keys].sum() for name, keys in sets.items()}
  recent = set(list(range(count))[-(K // 8) :])
  return figures | {
    'overlap': len(mine & set(sets['oracle'])) / K,
    'kl': np.sum(p_S * (np.log(p_S) - log_q)),
    'tie': any(scores_S[s] == kth for s in set(range(count)) - mine),
    'zero_boundary': kth == 0,
    'zero_scores': np.mean(scores_S == 0),
    'first_kept': 0 in mine,
    'self_kept': count - 1 in mine,
    'recent_kept': len(mine & recent) / len(recent),
    'first_mass': p_S[0],
    'recent_mass': p_S[list(recent)].sum(),
  }


def test_selection_quality_matches_float64_loops():
  traces = tiny_configs.forward(CFG, dataclasses.replace(DENSE, trace=True))(
    tiny_configs.variables(CFG),
    jnp.asarray(ROWS['tokens']),
    segment_ids_BT=jnp.asarray(ROWS['segment_ids']),
  ).trace_L
  actual, counted = _actual(), 0
  for layer, trace in enumerate(traces):
    draw_BTS = jax.random.uniform(
      jax.random.fold_in(jax.random.fold_in(KEY, layer), 0), (3, 20, 20)
    )
    q, k, qi, ki, wi, draw = (
      np.asarray(x, np.float64)
      for x in (
        trace.q_BTHX,
        trace.k_BSHX,
        trace.q_index_BTJI,
        trace.k_index_BSI,
        trace.w_index_BTJ,
        draw_BTS,
      )
    )
    total, counted = {}, 0
    for b, t in np.ndindex(3, 20):
      keys = _keys(b, t)
      if len(keys) <= K:
        continue
      counted += 1
      dots_SJ = np.einsum('ji,si->sj', qi[b, t], ki[b, keys])
      scores_S = np.maximum(dots_SJ, 0) @ wi[b, t]
      figures = _row(q[b, t], k[b, keys], scores_S, draw[b, t, keys])
      for name, value in figures.items():
        total[name] = total.get(name, 0.0) + float(value)
    assert set(total) == set(actual.sums)
    for name, value in total.items():
      np.testing.assert_allclose(
        actual.sums[name][layer], value, rtol=1e-4, atol=1e-5, err_msg=name
      )
    # The rows are such that no figure is trivially 0 or 1.
    for name in ('tie', 'zero_boundary', 'overlap', 'first_kept', 'self_kept'):
      assert 0 < total[name] < counted, name
  assert actual.rows == counted == 11 + 2 + 3


def test_selection_quality_oracle_keeps_the_most_mass():
  means = _actual().means()
  for name in ('indexer', 'window', 'random'):
    for mass, most in zip(
      means[f'mass/{name}'], means['mass/oracle'], strict=True
    ):
      assert 0 < mass < most < 1


def test_selection_quality_adds_up_over_batches():
  twice = _actual() + _actual()
  assert twice.rows == 2 * _actual().rows
  for name, values in _actual().means().items():
    np.testing.assert_allclose(twice.means()[name], values, rtol=1e-6)
    assert len(values) == CFG.num_hidden_layers


def test_selection_quality_means_of_no_row_are_zero_not_nan():
  empty = jax.tree.map(jnp.zeros_like, _actual())
  assert all(v == 0 for row in empty.means().values() for v in row)
