import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.modules import indexer
from tests.support import tiny_configs, tolerances

CFG = tiny_configs.config()
R = CFG.qk_rope_head_dim
B, T = 2, 9


def _inputs():
  generator = np.random.default_rng(0)
  x_BTD = generator.standard_normal((B, T, CFG.hidden_size))
  c_q_BTQ = generator.standard_normal((B, T, CFG.q_lora_rank))
  positions_BT = np.stack([np.arange(T), np.arange(T) + 3])
  return (
    jnp.asarray(x_BTD, jnp.float32),
    jnp.asarray(c_q_BTQ, jnp.float32),
    jnp.asarray(positions_BT, jnp.int32),
  )


@functools.lru_cache
def _parameters():
  params = tiny_configs.variables(CFG)['params']
  return jax.tree.map(
    lambda leaf: leaf[0],
    params['dense_layers']['layers']['attention']['indexer'],
  )


def _project(cfg=CFG, inputs=None):
  return indexer.LightningIndexer(cfg).apply(
    {'params': _parameters()}, *(inputs or _inputs())
  )


def _scores(projections):
  q, k, w = (
    np.asarray(x, np.float64)
    for x in (
      projections.q_index_BTJI,
      projections.k_index_BTI,
      projections.w_index_BTJ,
    )
  )
  dots = np.einsum('btji,bsi->btjs', q, k)
  return np.einsum('btj,btjs->bts', w, np.maximum(dots, 0))


def _half_split(x, positions_BT):
  """Pairs (x_i, x_{i + R/2}) of the first R channels, section 3.4 item 3."""
  angle = np.asarray(positions_BT)[..., None] * CFG.rope_theta ** (
    -np.arange(0, R, 2) / R
  )
  while angle.ndim < x.ndim:
    angle = angle[:, :, None]
  low, high = x[..., : R // 2], x[..., R // 2 : R]
  turned = (low + 1j * high) * np.exp(1j * angle)
  return np.concatenate([turned.real, turned.imag, x[..., R:]], axis=-1)


def test_indexer_projections_match_section_3_4_in_float64():
  params = jax.tree.map(lambda p: np.asarray(p, np.float64), _parameters())
  x, c_q, positions = _inputs()
  x, c_q = np.asarray(x, np.float64), np.asarray(c_q, np.float64)
  raw = x @ params['w_ik']
  centred = raw - raw.mean(-1, keepdims=True)
  normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
  k_norm = params['k_norm']
  projections = _project()
  tolerances.assert_close(
    projections.k_index_BTI,
    _half_split(normed * k_norm['scale'] + k_norm['bias'], positions),
    gradient=True,
  )
  tolerances.assert_close(
    projections.q_index_BTJI,
    _half_split(np.einsum('btq,qji->btji', c_q, params['w_iq']), positions),
    gradient=True,
  )
  tolerances.assert_close(
    projections.w_index_BTJ,
    x @ params['w_iw'] / np.sqrt(CFG.index_n_heads * CFG.index_head_dim),
    gradient=True,
  )


def test_indexer_hadamard_rotation_leaves_the_scores():
  """T3: orthogonal on both sides, so only low precision can tell."""
  rotated = _project(tiny_configs.config(index_hadamard=True))
  plain = _project()
  assert np.abs(rotated.k_index_BTI - plain.k_index_BTI).max() > 0.1
  np.testing.assert_allclose(_scores(rotated), _scores(plain), atol=1e-5)


def test_indexer_rope_layout_changes_the_scores():
  """T2: interleaved pairs are another function, so no silent default."""
  other = _project(tiny_configs.config(indexer_rope_interleave=True))
  assert np.abs(_scores(other) - _scores(_project())).max() > 0.05


def test_indexer_scores_depend_on_distance_not_on_position():
  x, c_q, positions = _inputs()
  shifted = _project(inputs=(x, c_q, positions + 11))
  np.testing.assert_allclose(_scores(shifted), _scores(_project()), atol=1e-5)


def test_indexer_head_weights_are_float32_in_a_bfloat16_model():
  from dsv32_jax.config.model import Precision

  cfg = tiny_configs.config(precision=Precision(compute='bfloat16'))
  x, c_q, positions = _inputs()
  inputs = (x.astype(jnp.bfloat16), c_q.astype(jnp.bfloat16), positions)
  projections = _project(cfg, inputs)
  assert projections.w_index_BTJ.dtype == jnp.float32
  assert projections.q_index_BTJI.dtype == jnp.bfloat16
  assert projections.k_index_BTI.dtype == jnp.bfloat16
  exact = inputs[0].astype(jnp.float32) @ _parameters()['w_iw']
  tolerances.assert_close(
    projections.w_index_BTJ,
    exact / np.sqrt(CFG.index_n_heads * CFG.index_head_dim),
    gradient=True,
  )


@pytest.mark.parametrize('argument', [0, 1])
def test_indexer_inputs_are_detached(argument):
  """No gradient to x nor to the query latent, in any mode."""
  inputs = list(_inputs())

  def total(value):
    inputs[argument] = value
    projections = _project(inputs=tuple(inputs))
    return sum(
      jnp.sum(jnp.sin(leaf.astype(jnp.float32)))
      for leaf in jax.tree.leaves(projections)
    )

  gradient = jax.grad(total)(inputs[argument])
  np.testing.assert_array_equal(gradient, 0)
