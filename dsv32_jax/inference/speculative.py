"""Which drafted tokens stand: speculative sampling, exact in distribution.

Letters: B requests, D drafted tokens, T = D + 1 positions, V vocabulary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dsv32_jax.inference import sampling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Verified:
  """What a round of drafts comes to: the accepted ones, then one more token.

  Attributes:
    num_accepted_B: drafts that stand, 0 to D; int32.
    token_B: the token after them, drawn by the model itself; int32.
  """

  num_accepted_B: Any
  token_B: Any


def verify(
  target_BTV: Float[Array, 'B T V'],
  draft_BDV: Float[Array, 'B D V'],
  draft_tokens_BD: Int[Array, 'B D'],
  key_B: Key[Array, ' B'],
) -> Verified:
  """Accepts drafts so that the tokens follow the target distribution exactly.

  With p the target's and q the draft's distribution at a position, the draft x
  stands with probability min(1, p(x) / q(x)). The first one that falls is
  replaced by a draw from max(p - q, 0), normalised; when all stand, the next
  token is drawn from the target's last position (speculative sampling,
  arXiv:2211.17192 and arXiv:2302.01318). Rows of a greedy request have one
  token each, so a draft stands if it is the target's.

  Args:
    target_BTV: log-weights (`sampling.target_logits`) after the token before
      the drafts, and after each draft.
    draft_BDV: log-weights that each draft was drawn from.
    draft_tokens_BD: the drafts.
    key_B: a key a request, used for nothing else: neither for the drafts nor
      for another round.
  """
  D = draft_BDV.shape[1]
  target_BTV = target_BTV.astype(jnp.float32)
  draft_BDV = draft_BDV.astype(jnp.float32)
  key_accept_B, key_next_B = _split(key_B)
  p_BD = jnp.exp(sampling.logprobs_of(target_BTV[:, :D], draft_tokens_BD))
  q_BD = jnp.exp(sampling.logprobs_of(draft_BDV, draft_tokens_BD))
  u_BD = jax.vmap(lambda key: jax.random.uniform(key, (D,)))(key_accept_B)
  # u is below 1, so p = q always stands, and p = 0 never does.
  stands_BD = u_BD * q_BD < p_BD
  num_accepted_B = jnp.sum(
    jnp.cumprod(stands_BD.astype(jnp.int32), axis=-1), axis=-1
  )
  p_BV = _distribution(target_BTV, num_accepted_B)
  if D:
    q_BV = _distribution(draft_BDV, jnp.minimum(num_accepted_B, D - 1))
    residual_BV = jnp.where(
      (num_accepted_B < D)[:, None], jnp.maximum(p_BV - q_BV, 0), p_BV
    )
    # All zero only if p = q, and then rounding alone refused the draft.
    is_empty_B1 = jnp.max(residual_BV, axis=-1, keepdims=True) <= 0
    p_BV = jnp.where(is_empty_B1, p_BV, residual_BV)
  token_B = sampling.draw(jnp.log(p_BV), key_next_B)
  return Verified(num_accepted_B=num_accepted_B, token_B=token_B)


def _split(key_B: Array) -> tuple[Array, Array]:
  keys_B2 = jax.vmap(jax.random.split)(key_B)
  return keys_B2[:, 0], keys_B2[:, 1]


def _distribution(weights_BTV: Array, position_B: Array) -> Array:
  weights_BV = jnp.take_along_axis(
    weights_BTV, position_B[:, None, None], axis=1
  )[:, 0]
  return jax.nn.softmax(weights_BV, axis=-1)
