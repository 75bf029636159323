"""The objective against hand-computed values, enumeration and its promises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.config.rl import GRPOConfig
from dsv32_jax.rl import grpo
from dsv32_jax.rl.advantages import group_advantages

# Spec section 2.6; a third token that the second response does not have.
SAMPLED = np.array([[-1.0, -0.5, -2.0], [-0.7, -1.2, 0.0]])
POLICY = np.array([[-0.6, -0.5, -2.5], [-1.1, -1.3, 0.0]])
REFERENCE = np.array([[-1.1, -0.4, -2.0], [-0.8, -1.0, 0.0]])
RESPONSE = np.array([[0, 0, 0], [1, 1, -1]], np.int32)
WEIGHT = np.array([[1 / 6] * 3, [1 / 4, 1 / 4, 0.0]])
CONFIG = GRPOConfig(clip_epsilon=0.2, kl_strength=0.1, mask_delta=0.1)


def golden(config=CONFIG, **changes):
  advantage_G = group_advantages(np.array([1.0, 0.0]))
  arrays = {
    'sampling_logprob_BT': SAMPLED,
    'ref_logprob_BT': REFERENCE,
    'advantage_BT': np.repeat(advantage_G[:, None], 3, axis=1),
    'weight_BT': WEIGHT,
    'kl_strength_BT': np.full((2, 3), config.kl_strength),
  } | changes
  arrays = {name: np.float32(value) for name, value in arrays.items()}
  logprob_BT = arrays.pop('logprob_BT', np.float32(POLICY))
  return jnp.asarray(logprob_BT), {
    **{name: jnp.asarray(value) for name, value in arrays.items()},
    'response_BT': jnp.asarray(RESPONSE),
    'num_responses': 2,
    'config': config,
  }


def test_objective_of_the_golden_vector_has_its_values():
  logprob_BT, arguments = golden()
  found = grpo.objective(logprob_BT, **arguments)
  np.testing.assert_allclose(-found.loss, 0.22767583, atol=1e-6)
  np.testing.assert_allclose(
    np.exp(found.log_ratio_BT),
    [[1.491825, 1, 0.606531], [0.670320, 0.904837, 1]],
    atol=1e-6,
  )
  np.testing.assert_allclose(
    found.kl_BT,
    [[0.158925, 0.005171, 0.090204], [0.033421, 0.045114, 0]],
    atol=1e-6,
  )
  assert found.is_masked_N.tolist() == [False, True]
  assert found.is_clipped_BT.tolist() == [
    [True, False, False],
    [True, False, False],
  ]
  np.testing.assert_allclose(found.policy - found.penalty, -found.loss)


def test_objective_of_the_golden_vector_without_the_mask():
  config = dataclasses.replace(CONFIG, off_policy_sequence_mask=False)
  logprob_BT, arguments = golden(config)
  found = grpo.objective(logprob_BT, **arguments)
  np.testing.assert_allclose(-found.loss, 0.01457116, atol=1e-6)
  assert not np.any(found.is_masked_N)


def test_clipped_objective_of_the_golden_vector():
  ratio_BT = jnp.exp(jnp.float32(POLICY - SAMPLED))
  found = grpo.clipped_objective(
    ratio_BT,
    jnp.array([[0.5] * 3, [-0.5] * 3]),
    clip_epsilon=0.2,
  )
  np.testing.assert_allclose(found[0], [0.6, 0.5, 0.303265], atol=1e-6)
  np.testing.assert_allclose(found[1, :2], [-0.4, -0.452419], atol=1e-6)


def test_a_masked_response_has_no_policy_gradient_and_a_kl_gradient():
  def gradient(name):
    logprob_BT, arguments = golden()
    if name == 'policy':
      arguments |= {'ref_logprob_BT': None}
    return jax.grad(lambda x: grpo.objective(x, **arguments).loss)(logprob_BT)

  assert np.all(gradient('policy')[1] == 0)
  assert np.all(gradient('policy')[0, 1:] != 0)
  assert np.all(np.abs(gradient('both')[1, :2]) > 1e-4)


def test_a_good_response_is_never_masked():
  logprob_BT, arguments = golden(logprob_BT=SAMPLED - 5.0)
  found = grpo.objective(logprob_BT, **arguments)
  assert found.is_masked_N.tolist() == [False, True]
  # Moved towards: a negative mean log-ratio of sampler to policy.
  logprob_BT, arguments = golden(logprob_BT=SAMPLED + 5.0)
  assert not np.any(grpo.objective(logprob_BT, **arguments).is_masked_N)


def test_a_masked_response_stays_in_the_denominators():
  """J of the other response is what it is without the mask."""
  logprob_BT, arguments = golden()
  with_mask = grpo.objective(logprob_BT, **arguments)
  arguments['weight_BT'] = arguments['weight_BT'].at[1].set(0.0)
  alone = grpo.objective(logprob_BT, **arguments)
  np.testing.assert_allclose(with_mask.policy, alone.policy)


def test_what_is_not_sampled_can_hold_anything():
  logprob_BT, arguments = golden()
  huge = {
    name: arguments[name].at[1, 2].set(value)
    for name, value in (
      ('sampling_logprob_BT', -1e30),
      ('ref_logprob_BT', 1e30),
      ('advantage_BT', 1e30),
    )
  }
  expected = jax.value_and_grad(lambda x: grpo.objective(x, **arguments).loss)(
    logprob_BT
  )
  found = jax.value_and_grad(
    lambda x: grpo.objective(x, **(arguments | huge)).loss
  )(logprob_BT)
  assert np.all(np.isfinite(found[1]))
  np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize('kind', ['unbiased', 'stopped', 'plain'])
@pytest.mark.parametrize('on_policy', [False, True])
def test_kl_gradient_over_all_tokens_is_that_of_the_kl(kind, on_policy):
  """E_old[grad D] summed over a vocabulary of 6, in float64."""
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    logits, old, ref = jnp.asarray(1.2 * rng.standard_normal((3, 6)))
    if on_policy:
      old = logits
    lp_old, lp_ref = jax.nn.log_softmax(old), jax.nn.log_softmax(ref)

    def exact(logits):
      lp = jax.nn.log_softmax(logits)
      return jnp.sum(jnp.exp(lp) * (lp - lp_ref))

    def estimate(logits):
      lp = jax.nn.log_softmax(logits)
      ratio = jnp.exp(lp - lp_old)
      match kind:
        case 'unbiased':
          d = grpo.unbiased_kl(lp_ref - lp, ratio)
        case 'stopped':
          d = grpo.unbiased_kl(lp_ref - lp, jax.lax.stop_gradient(ratio))
        case 'plain':
          d = grpo.plain_kl(lp_ref - lp)
      return jnp.sum(jnp.exp(lp_old) * d)

    value, gradient = jax.value_and_grad(exact)(logits)
    found, found_gradient = jax.value_and_grad(estimate)(logits)
    error = np.max(np.abs(found_gradient - gradient))
    print(kind, on_policy, float(value), float(found), error)
    if kind == 'unbiased':
      assert error < 1e-10
      np.testing.assert_allclose(found, value, rtol=1e-12)
    else:
      assert error > 0.05
    # On-policy the values of all agree: it is the gradients that are wrong.
    assert (abs(found - value) < 1e-12) == (kind != 'plain' or on_policy)


def test_kl_switch_takes_the_plain_estimate():
  config = dataclasses.replace(CONFIG, unbiased_kl=False)
  logprob_BT, arguments = golden(config)
  found = grpo.objective(logprob_BT, **arguments)
  x = REFERENCE - POLICY
  expected = np.where(RESPONSE >= 0, np.exp(x) - x - 1, 0)
  np.testing.assert_allclose(found.kl_BT, expected, atol=1e-6)


def test_kl_over_other_log_probabilities_has_their_ratio():
  logprob_BT, arguments = golden()
  whole_BT = logprob_BT - 0.1
  found = grpo.objective(logprob_BT, kl_logprob_BT=whole_BT, **arguments)
  x = REFERENCE - np.asarray(whole_BT)
  expected = np.exp(np.asarray(whole_BT) - SAMPLED) * (np.exp(x) - x - 1)
  np.testing.assert_allclose(
    found.kl_BT, np.where(RESPONSE >= 0, expected, 0), atol=1e-6
  )
  np.testing.assert_array_equal(
    found.policy, grpo.objective(logprob_BT, **arguments).policy
  )


def test_kl_strength_of_zero_has_no_penalty():
  logprob_BT, arguments = golden(kl_strength_BT=np.zeros((2, 3)))
  found = grpo.objective(logprob_BT, **arguments)
  assert found.penalty == 0
  assert np.all(found.kl_BT[RESPONSE >= 0] > 0)
