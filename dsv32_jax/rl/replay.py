"""Log-probabilities over the token sets that sampling drew from.

Keep Sampling Mask (arXiv:2512.02556, section 3.1; spec section 2.5): rollouts
are drawn from truncated distributions (top-p, top-k). Scored over the whole
vocabulary, the ratio would be off by the mass of what was kept, and computing
the truncation again is not enough, since the logits have changed: the recorded
set is replayed. Its members' logits are gathered; no mask over the vocabulary
is made.

Letters: B rows, T tokens, t tokens of a chunk, n chunks, D hidden_size, V
vocabulary, K most tokens of a set, C candidates (K or V).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv32_jax.functional import precision


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenScores:
  """What a policy thinks of tokens that were drawn.

  Attributes:
    logprob_BT: of each target, normalised over its set (over the vocabulary
      where it has none); at least float32.
    vocabulary_logprob_BT: normalised over the vocabulary.
    entropy_BT: of the distribution that `logprob_BT` is of; not differentiated.
  """

  logprob_BT: Any
  vocabulary_logprob_BT: Any
  entropy_BT: Any


def sampling_mask_logprobs(
  logits_BTV: Float[Array, 'B T V'],
  targets_BT: Int[Array, 'B T'],
  kept_BTK: Int[Array, 'B T K'] | None,
  temperature_BT: Float[Array, 'B T'],
) -> Float[Array, 'B T']:
  """z_a / tau - logsumexp_{j in S} z_j / tau.

  Args:
    logits_BTV: any float type.
    targets_BT: a, a member of its set.
    kept_BTK: S, filled up with -1; a row of -1 alone is the whole vocabulary,
      and so is None.
    temperature_BT: tau.

  Example:
    >>> import numpy as np
    >>> logits_BTV = jnp.array([[[2.0, 0.5, 1.0, -1.0, 0.0]]])
    >>> kept_BTK = jnp.array([[[0, 2, 4]]])
    >>> lp = sampling_mask_logprobs(
    ...   logits_BTV, jnp.array([[2]]), kept_BTK, jnp.ones((1, 1))
    ... )
    >>> np.round(lp, 6).tolist()
    [[-1.407606029510498]]
  """
  return token_scores(
    logits_BTV, targets_BT, kept_BTK, temperature_BT
  ).logprob_BT


def token_scores(
  logits_BTV: Float[Array, 'B T V'],
  targets_BT: Int[Array, 'B T'],
  kept_BTK: Int[Array, 'B T K'] | None,
  temperature_BT: Float[Array, 'B T'],
) -> TokenScores:
  """`sampling_mask_logprobs`, and what else a step wants of the logits."""
  logits_BTV = logits_BTV.astype(precision.accumulator(logits_BTV.dtype))
  temperature_BT = temperature_BT.astype(logits_BTV.dtype)
  target_BT = _gathered(logits_BTV, targets_BT[..., None])[..., 0]
  logprob_BT, entropy_BT = _scores(target_BT, logits_BTV, temperature_BT)
  if kept_BTK is None:
    return TokenScores(logprob_BT, logprob_BT, entropy_BT)
  is_kept_BTK = kept_BTK >= 0
  kept_BTC = _gathered(logits_BTV, jnp.maximum(kept_BTK, 0))
  # Without a set the target stands in, so that nothing is infinite.
  has_set_BT = jnp.any(is_kept_BTK, axis=-1)
  kept_BTC = jnp.where(has_set_BT[..., None], kept_BTC, target_BT[..., None])
  is_kept_BTK = is_kept_BTK | ~has_set_BT[..., None]
  kept_BTC = jnp.where(is_kept_BTK, kept_BTC, -jnp.inf)
  kept_logprob_BT, kept_entropy_BT = _scores(
    target_BT, kept_BTC, temperature_BT
  )
  return TokenScores(
    jnp.where(has_set_BT, kept_logprob_BT, logprob_BT),
    logprob_BT,
    jnp.where(has_set_BT, kept_entropy_BT, entropy_BT),
  )


def chunked_token_scores(
  head: Callable[[Any, Array], Array],
  head_params: Any,
  hidden_BTD: Float[Array, 'B T D'],
  targets_BT: Int[Array, 'B T'],
  kept_BTK: Int[Array, 'B T K'] | None,
  temperature_BT: Float[Array, 'B T'],
  *,
  chunk: int,
) -> TokenScores:
  """`token_scores` of `chunk` tokens of every row at a time.

  The logits of a chunk are made again in the backward pass, so that [B, T, V]
  is never held: for V3.2's vocabulary that is 0.5 MB a token.

  Args:
    head: (head_params, hidden [B, t, D]) -> logits [B, t, V].
    head_params: its arrays; differentiated, summed at least in float32.
    hidden_BTD: after the final norm.
    targets_BT: see `token_scores`.
    kept_BTK: likewise.
    temperature_BT: likewise.
    chunk: most tokens of a row at a time; 0 takes all at once.
  """
  T = targets_BT.shape[1]
  if not 0 < chunk < T:
    return token_scores(
      head(head_params, hidden_BTD), targets_BT, kept_BTK, temperature_BT
    )
  n = -(-T // chunk)

  def split(x_BT: Array) -> Array:
    # Every n-th token: where devices share a row in blocks, all of them keep
    # busy in every chunk, and nothing travels.
    x_BT = jnp.pad(x_BT, [(0, 0), (0, -T % n)] + [(0, 0)] * (x_BT.ndim - 2))
    x_Btn = x_BT.reshape(x_BT.shape[0], -1, n, *x_BT.shape[2:])
    return jnp.moveaxis(x_Btn, 2, 0)

  def join(x_nBt: Array) -> Array:
    x_Btn = jnp.moveaxis(x_nBt, 0, 2)
    return x_Btn.reshape(x_Btn.shape[0], -1)[:, :T]

  # What the scan closes over has its gradients summed in its type.
  types = jax.tree.map(lambda x: x.dtype, head_params)
  wide = jax.tree.map(
    lambda x: x.astype(precision.accumulator(x.dtype)), head_params
  )

  def step(_, part):
    hidden_BtD, targets_Bt, kept_BtK, temperature_Bt = part
    params = jax.tree.map(lambda x, t: x.astype(t), wide, types)
    # Divided by below: what rows were filled up with has temperature 0.
    temperature_Bt = jnp.where(temperature_Bt > 0, temperature_Bt, 1.0)
    return None, token_scores(
      head(params, hidden_BtD), targets_Bt, kept_BtK, temperature_Bt
    )

  parts = jax.tree.map(
    split, (hidden_BTD, targets_BT, kept_BTK, temperature_BT)
  )
  step = jax.checkpoint(step, prevent_cse=False)
  return jax.tree.map(join, jax.lax.scan(step, None, parts)[1])


def _gathered(logits_BTV: Array, index_BTC: Array) -> Array:
  return jnp.take_along_axis(logits_BTV, index_BTC.astype(jnp.int32), axis=-1)


def _scores(
  target_BT: Array, logits_BTC: Array, temperature_BT: Array
) -> tuple[Array, Array]:
  """Log-probability of the target among candidates, and their entropy.

  Shifted by the best candidate before the division, as the sampler does, so
  that large logits cost no digits.
  """
  best_BT = jnp.max(jax.lax.stop_gradient(logits_BTC), axis=-1)
  scaled_BTC = (logits_BTC - best_BT[..., None]) / temperature_BT[..., None]
  weight_BTC = jnp.exp(scaled_BTC)
  total_BT = jnp.sum(weight_BTC, axis=-1)
  logprob_BT = (target_BT - best_BT) / temperature_BT - jnp.log(total_BT)
  weight_BTC, scaled_BTC, total_BT = jax.lax.stop_gradient(
    (weight_BTC, scaled_BTC, total_BT)
  )
  # Finite, for 0 times that of those that are left out; without a mask.
  least = jnp.finfo(scaled_BTC.dtype).min
  mean_BT = jnp.sum(weight_BTC * jnp.maximum(scaled_BTC, least), axis=-1)
  return logprob_BT, jnp.log(total_BT) - mean_BT / total_BT
