"""Sequence-wise balance loss of the routed experts.

Letters: B sequences, T tokens, E experts, K_r experts a token.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dsv32_jax.functional import routing


def sequence_balance(
  scores_BTE: Float[Array, 'B T E'],
  valid_BT: Bool[Array, 'B T'] | None = None,
  *,
  num_experts_per_tok: int,
) -> Float[Array, ' B']:
  """sum_e f_e P_e of every sequence: 1 at perfect balance.

  arXiv:2412.19437, Eq. 17-20, T being the number of valid tokens:
    f_e = E / (K_r T) * #{t : e among the K_r best of the unbiased s_t}
    P_e = mean_t s_te / sum_j s_tj
  f counts the choice that the scores alone would make, without bias and
  groups (as Eq. 18 says), and is constant; the gradient runs through P.

  Args:
    scores_BTE: unbiased, non-negative router scores.
    valid_BT: tokens that count, None for all.
    num_experts_per_tok: K_r.

  Returns:
    float32 [B]; 0 for a sequence without a valid token.

  Raises:
    ValueError: num_experts_per_tok is not in 1..E.
  """
  num_experts = scores_BTE.shape[-1]
  if not 1 <= num_experts_per_tok <= num_experts:
    raise ValueError(
      f'num_experts_per_tok={num_experts_per_tok} must lie in '
      f'1..{num_experts}, the number of experts'
    )
  scores_BTE = scores_BTE.astype(jnp.float32)
  if valid_BT is None:
    valid_BT = jnp.ones(scores_BTE.shape[:2], jnp.bool_)
  # 1 instead of 0 tokens: the sums above it are 0 then, without a NaN.
  tokens_B = jnp.maximum(jnp.sum(valid_BT, axis=1), 1).astype(jnp.float32)

  best_BTK = routing.top_experts(
    jax.lax.stop_gradient(scores_BTE), k=num_experts_per_tok
  )
  expert_E = jnp.arange(num_experts, dtype=best_BTK.dtype)
  hit_BTKE = best_BTK[..., None] == expert_E[None, None, None, :]
  hit_BTKE = hit_BTKE & valid_BT[:, :, None, None]
  count_BE = jnp.sum(hit_BTKE, axis=(1, 2)).astype(jnp.float32)
  f_BE = count_BE * (num_experts / num_experts_per_tok) / tokens_B[:, None]

  total_BT1 = jnp.sum(scores_BTE, axis=-1, keepdims=True)
  share_BTE = scores_BTE / (total_BT1 + 1e-20)
  share_BTE = jnp.where(valid_BT[:, :, None], share_BTE, 0.0)
  p_BE = jnp.sum(share_BTE, axis=1) / tokens_B[:, None]
  return jnp.sum(f_BE * p_BE, axis=-1)


def sequence_balance_loss(
  scores_BTE: Float[Array, 'B T E'],
  valid_BT: Bool[Array, 'B T'] | None = None,
  *,
  num_experts_per_tok: int,
  alpha: int | float,
) -> Float[Array, '']:
  """Alpha * the mean of `sequence_balance`: alpha at perfect balance.

  Args:
    scores_BTE: unbiased router scores.
    valid_BT: tokens that count, None for all. Sequences without one are left
      out of the mean.
    num_experts_per_tok: K_r.
    alpha: coefficient (1e-4 in DeepSeek-V3).

  Returns:
    float32 scalar.
  """
  balance_B = sequence_balance(
    scores_BTE, valid_BT, num_experts_per_tok=num_experts_per_tok
  )
  if valid_BT is None:
    return alpha * jnp.mean(balance_B)
  num_sequences = jnp.sum(jnp.any(valid_BT, axis=1))
  return alpha * jnp.sum(balance_B) / jnp.maximum(num_sequences, 1)
