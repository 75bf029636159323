"""Next-token cross-entropy and its masked mean.

Letters: B batch, T tokens, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
  logits_BTV: Float[Array, 'B T V'], targets_BT: Int[Array, 'B T']
) -> Float[Array, 'B T']:
  """-log p(target), in float32.

  Args:
    logits_BTV: unnormalised log-probabilities, any float dtype.
    targets_BT: target ids in [0, V).

  Returns:
    float32 nats a token.
  """
  logits_BTV = logits_BTV.astype(jnp.float32)
  log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
  # A masked sum, not a gather: its gradient is elementwise, a gather's is a
  # scatter, which is slow on every backend.
  vocabulary = jnp.arange(logits_BTV.shape[-1], dtype=targets_BT.dtype)
  hit_BTV = targets_BT[:, :, None] == vocabulary[None, None, :]
  return log_z_BT - jnp.sum(jnp.where(hit_BTV, logits_BTV, 0.0), axis=-1)


def weighted_mean(
  values_BT: Float[Array, 'B T'],
  weight_BT: Float[Array, 'B T'],
  total: Float[Array, ''] | float,
) -> Float[Array, '']:
  """Sum of weight * value over a total given from outside.

  The total is that of the whole batch, so that micro-batches add up to the
  same loss however the batch is cut.

  Args:
    values_BT: one value a token.
    weight_BT: its weight, 0 for tokens that do not count.
    total: sum of the weights over the whole batch.
  """
  return jnp.sum(values_BT * weight_BT) / jnp.maximum(total, 1e-6)
