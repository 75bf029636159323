import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.losses import language_model
from tests.support import tolerances


def _inputs(dtype=jnp.float32, factor=1):
  generator = np.random.default_rng(0)
  logits_BTV = factor * generator.standard_normal((2, 5, 11))
  targets_BT = generator.integers(0, 11, (2, 5), dtype=np.int32)
  return jnp.asarray(logits_BTV, dtype), jnp.asarray(targets_BT)


def _oracle(logits_BTV, targets_BT):
  logits = np.asarray(logits_BTV, np.float64)
  logits = logits - logits.max(-1, keepdims=True)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  picked = np.take_along_axis(log_p, np.asarray(targets_BT)[..., None], -1)
  return -picked[..., 0], np.exp(log_p)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('factor', [1, 300])
def test_cross_entropy_and_its_gradient_match_float64(dtype, factor):
  """Large logits neither overflow nor lose the small losses."""
  logits_BTV, targets_BT = _inputs(dtype, factor)
  value, gradient = jax.value_and_grad(
    lambda x: jnp.sum(language_model.cross_entropy(x, targets_BT))
  )(logits_BTV)
  ce_BT, p_BTV = _oracle(logits_BTV, targets_BT)
  actual = language_model.cross_entropy(logits_BTV, targets_BT)
  assert actual.dtype == jnp.float32
  tolerances.assert_close(actual, ce_BT)
  np.testing.assert_allclose(value, ce_BT.sum(), rtol=1e-5)
  desired = p_BTV - (np.arange(11) == np.asarray(targets_BT)[..., None])
  tolerances.assert_close(gradient, desired, dtype=dtype, gradient=True)


def test_cross_entropy_uniform_logits_give_the_log_of_the_vocabulary():
  ce_BT = language_model.cross_entropy(
    jnp.full((1, 3, 7), 4.0), jnp.asarray([[0, 3, 6]])
  )
  np.testing.assert_allclose(ce_BT, np.log(7), rtol=1e-6)


def test_weighted_mean_divides_by_the_total_that_it_is_given():
  """Two micro-batches of unequal weight add up to the whole batch's mean."""
  values = jnp.asarray([[1.0, 2.0], [3.0, 50.0]])
  weight = jnp.asarray([[1.0, 0.5], [2.0, 0.0]])
  whole = language_model.weighted_mean(values, weight, jnp.sum(weight))
  np.testing.assert_allclose(whole, (1 + 1 + 6) / 3.5, rtol=1e-6)
  parts = [
    language_model.weighted_mean(values[i : i + 1], weight[i : i + 1], 3.5)
    for i in range(2)
  ]
  np.testing.assert_allclose(sum(parts), whole, rtol=1e-6)


def test_weighted_mean_without_weight_is_zero():
  zeros = jnp.zeros((1, 2))
  assert language_model.weighted_mean(zeros + 3, zeros, 0.0) == 0
