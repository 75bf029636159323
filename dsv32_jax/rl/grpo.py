"""Group relative policy optimisation with the stabilisers of DeepSeek-V3.2.

Source: arXiv:2512.02556, section 3.1, Eq. 5-9; spec sections 2.1-2.3. One
pi_old everywhere: the sampler's recorded log-probabilities, so that ratio, KL
and mask see staleness and the mismatch of sampler and trainer alike.

Letters: B rows, T tokens, N responses.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsv32_jax.config.rl import GRPOConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Objective:
  """The loss of a minibatch, and what it is made of.

  Attributes:
    loss: -J of Eq. 9, to be minimised.
    policy: the policy term of J.
    penalty: the KL term of J, strengths included.
    log_ratio_BT: log r, 0 where nothing was sampled.
    is_clipped_BT: where clipping decides.
    kl_BT: D, 0 where nothing was sampled.
    is_masked_N: responses that are left out of the policy term.
  """

  loss: Any
  policy: Any
  penalty: Any
  log_ratio_BT: Any
  is_clipped_BT: Any
  kl_BT: Any
  is_masked_N: Any


def objective(
  logprob_BT: Float[Array, 'B T'],
  *,
  sampling_logprob_BT: Float[Array, 'B T'],
  ref_logprob_BT: Float[Array, 'B T'] | None,
  advantage_BT: Float[Array, 'B T'],
  weight_BT: Float[Array, 'B T'],
  kl_strength_BT: Float[Array, 'B T'],
  response_BT: Int[Array, 'B T'],
  num_responses: int,
  config: GRPOConfig,
  kl_logprob_BT: Float[Array, 'B T'] | None = None,
) -> Objective:
  """-J = -SUM_it w_it [min(r A, clip(r) A) M_i - beta D] over sampled tokens.

  Args:
    logprob_BT: lp_th of each target under the policy that learns;
      differentiable.
    sampling_logprob_BT: lp_old, as the sampler recorded it.
    ref_logprob_BT: lp_ref, of the KL's anchor; None has no KL term.
    advantage_BT: A of the response.
    weight_BT: 1 / |o_i| over the number of responses; 0 where nothing was
      sampled. Sums to 1 over a minibatch.
    kl_strength_BT: beta of the response's domain.
    response_BT: which response a sampled target belongs to, -1 elsewhere.
    num_responses: N, static.
    config: epsilon, delta and the switches.
    kl_logprob_BT: lp_th for the KL term, where that is taken over another set
      of tokens than the ratio's; None: the same.

  Returns:
    An `Objective`; its parts are not differentiated.
  """
  is_policy_BT = response_BT >= 0

  def on_policy_tokens(x_BT: Array) -> Array:
    # Before any exponential, so that elsewhere nothing can overflow.
    return jnp.where(is_policy_BT, x_BT, 0.0)

  log_ratio_BT = on_policy_tokens(logprob_BT - sampling_logprob_BT)
  ratio_BT = jnp.exp(log_ratio_BT)
  policy_BT = clipped_objective(
    ratio_BT, advantage_BT, clip_epsilon=config.clip_epsilon
  )
  is_masked_N = jnp.zeros((num_responses,), jnp.bool)
  if config.off_policy_sequence_mask:
    is_masked_N = off_policy_sequence_mask(
      log_ratio_BT,
      advantage_BT,
      response_BT,
      num_responses=num_responses,
      delta=config.mask_delta,
    )
    is_masked_BT = is_masked_N[jnp.maximum(response_BT, 0)] & is_policy_BT
    policy_BT = jnp.where(is_masked_BT, 0.0, policy_BT)
  policy = jnp.sum(weight_BT * policy_BT)
  penalty, kl_BT = jnp.zeros_like(policy), jnp.zeros_like(log_ratio_BT)
  if ref_logprob_BT is not None:
    kl_ratio_BT = ratio_BT
    if kl_logprob_BT is None:
      kl_logprob_BT = logprob_BT
    else:
      kl_ratio_BT = jnp.exp(
        on_policy_tokens(kl_logprob_BT - sampling_logprob_BT)
      )
    log_ref_BT = on_policy_tokens(ref_logprob_BT - kl_logprob_BT)
    kl_BT = on_policy_tokens(
      unbiased_kl(log_ref_BT, kl_ratio_BT)
      if config.unbiased_kl
      else plain_kl(log_ref_BT)
    )
    penalty = jnp.sum(weight_BT * kl_strength_BT * kl_BT)
  parts = jax.lax.stop_gradient(
    (
      policy,
      penalty,
      log_ratio_BT,
      is_clipped(ratio_BT, advantage_BT, clip_epsilon=config.clip_epsilon)
      & is_policy_BT,
      kl_BT,
      is_masked_N,
    )
  )
  return Objective(penalty - policy, *parts)


def clipped_objective(
  ratio: Float[Array, '*batch'],
  advantage: Float[Array, '*batch'],
  *,
  clip_epsilon: int | float,
) -> Float[Array, '*batch']:
  """min(r A, clip(r, 1 - eps, 1 + eps) A), Eq. 5."""
  clipped = jnp.clip(ratio, 1 - clip_epsilon, 1 + clip_epsilon)
  return jnp.minimum(ratio * advantage, clipped * advantage)


def is_clipped(
  ratio: Float[Array, '*batch'],
  advantage: Float[Array, '*batch'],
  *,
  clip_epsilon: int | float,
) -> Bool[Array, '*batch']:
  """Where the clipped branch is the smaller one: no gradient comes from it."""
  return jnp.where(
    advantage > 0,
    ratio > 1 + clip_epsilon,
    (advantage < 0) & (ratio < 1 - clip_epsilon),
  )


def unbiased_kl(
  log_ref_ratio: Float[Array, '*batch'], ratio: Float[Array, '*batch']
) -> Float[Array, '*batch']:
  """D = r (e^x - x - 1), Eq. 7: K3 corrected for who sampled the token.

  The ratio is differentiated. Then grad D = r log(pi_th / pi_ref) grad lp_th,
  whose expectation under pi_old is the gradient of KL(pi_th || pi_ref). With a
  constant ratio, and with plain K3 even on-policy, it is not.

  Args:
    log_ref_ratio: x = lp_ref - lp_th.
    ratio: r = exp(lp_th - lp_old), not detached.
  """
  return ratio * plain_kl(log_ref_ratio)


def plain_kl(log_ref_ratio: Float[Array, '*batch']) -> Float[Array, '*batch']:
  """K3 = e^x - x - 1 of x = lp_ref - lp_th (Schulman, 2020)."""
  return jnp.expm1(log_ref_ratio) - log_ref_ratio


def off_policy_sequence_mask(
  log_ratio_BT: Float[Array, 'B T'],
  advantage_BT: Float[Array, 'B T'],
  response_BT: Int[Array, 'B T'],
  *,
  num_responses: int,
  delta: int | float,
) -> Bool[Array, ' N']:
  """Responses for which M_i = 0, Eq. 8-9; a constant for autodiff.

  M_i = 0 if A_i < 0 and (1 / |o_i|) SUM_t (lp_old - lp_th) > delta: bad
  responses that the policy has moved away from already. Good ones always count.

  Args:
    log_ratio_BT: lp_th - lp_old.
    advantage_BT: A of the response.
    response_BT: response of each sampled target, -1 elsewhere.
    num_responses: N, static.
    delta: mean log-ratio above which a response is left out.
  """
  log_ratio_BT = jax.lax.stop_gradient(log_ratio_BT)
  is_policy_BT = response_BT >= 0

  def total_N(x_BT: Array) -> Array:
    return per_response(x_BT, response_BT, num_responses=num_responses)

  count_N = total_N(is_policy_BT.astype(log_ratio_BT.dtype))
  drift_N = -total_N(log_ratio_BT) / jnp.maximum(count_N, 1)
  is_negative_N = total_N((advantage_BT < 0).astype(count_N.dtype)) > 0
  return is_negative_N & (drift_N > delta)


def per_response(
  x_BT: Float[Array, 'B T'],
  response_BT: Int[Array, 'B T'],
  *,
  num_responses: int,
) -> Float[Array, ' N']:
  """Sums over the sampled tokens of each response."""
  # A row past the last one takes what belongs to no response.
  index_BT = jnp.where(response_BT >= 0, response_BT, num_responses)
  return jax.ops.segment_sum(
    x_BT.reshape(-1), index_BT.reshape(-1), num_segments=num_responses + 1
  )[:num_responses]
