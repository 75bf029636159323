import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax.modules import feed_forward, norms
from tests.support import tiny_configs, tolerances

CFG = tiny_configs.config()


def _random(*shape, seed=0, dtype=jnp.float32):
  values = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(values, dtype)


def test_swiglu_module_matches_float64():
  x_BTD = _random(2, 3, CFG.hidden_size)
  weights = {
    'w_gate': _random(CFG.hidden_size, 5, seed=1),
    'w_up': _random(CFG.hidden_size, 5, seed=2),
    'w_down': _random(5, CFG.hidden_size, seed=3),
  }
  actual = feed_forward.SwiGLU(CFG, 5).apply({'params': weights}, x_BTD)
  x, gate, up, down = (
    np.asarray(v, np.float64) for v in (x_BTD, *weights.values())
  )
  product = x @ gate
  desired = (product / (1 + np.exp(-product)) * (x @ up)) @ down
  tolerances.assert_close(actual, desired, gradient=True)


def test_swiglu_bfloat16_is_rounded_once():
  """The product is formed in float32, not from rounded factors."""
  gate, up = (_random(4096, seed=s, dtype=jnp.bfloat16) for s in (4, 5))
  actual = feed_forward.swiglu(gate, up)
  assert actual.dtype == jnp.bfloat16
  wide = [np.asarray(x, np.float64) for x in (gate, up)]
  exact = wide[0] / (1 + np.exp(-wide[0])) * wide[1]
  np.testing.assert_allclose(
    np.asarray(actual, np.float64), exact, rtol=2**-8, atol=1e-30
  )


def test_norm_modules_start_as_plain_norms_with_float32_weights():
  x = 3 + 2 * _random(4, 8, dtype=jnp.bfloat16)
  for module, names in (
    (norms.RMSNorm(8, 1e-6), {'scale'}),
    (norms.LayerNorm(8), {'scale', 'bias'}),
  ):
    variables = jax.tree.map(
      lambda box: box.value,
      module.init(jax.random.key(0), x),
      is_leaf=lambda leaf: hasattr(leaf, 'value'),
    )
    assert set(variables['params']) == names
    assert all(v.dtype == jnp.float32 for v in variables['params'].values())
    y = module.apply(variables, x)
    assert y.dtype == x.dtype
    wide = np.asarray(x, np.float64)
    if 'bias' in names:
      wide = wide - wide.mean(-1, keepdims=True)
    desired = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    tolerances.assert_close(y, desired, dtype=jnp.bfloat16)
