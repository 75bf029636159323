"""From logits to the next token, for a batch of independent requests.

Letters: B requests, V vocabulary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer, Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How a token is drawn; static, so that greedy decoding never sorts.

  The truncations apply in this order, each to what the one before left and
  renormalised.

  Attributes:
    temperature: divides the logits; 0 takes the most likely token.
    top_k: keep this many of the most likely tokens; None keeps all.
    top_p: keep the fewest most likely tokens of at least this total
      probability (nucleus sampling, arXiv:1904.09751); 1 keeps all.
  """

  temperature: int | float = 1.0
  top_k: int | None = None
  top_p: int | float = 1.0

  def __post_init__(self):
    # `not >=` also refuses NaN.
    if not 0 <= self.temperature < float('inf'):
      raise ValueError(
        f'temperature: got {self.temperature}, expected a finite number of at '
        'least 0'
      )
    if self.top_k is not None and self.top_k < 1:
      raise ValueError(f'top_k: got {self.top_k}, expected at least 1 or None')
    if not 0 < self.top_p <= 1:
      raise ValueError(f'top_p: got {self.top_p}, expected 0 < top_p <= 1')


GREEDY = Sampling(temperature=0.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampled:
  """One token a request.

  Attributes:
    token_B: int32.
    logprob_B: log-probability under the model itself: temperature 1, the whole
      vocabulary; float32.
    sampling_logprob_B: log-probability under the distribution it was drawn
      from; 0 if greedy.
    kept_BV: the tokens that could have been drawn.
  """

  token_B: Any
  logprob_B: Any
  sampling_logprob_B: Any
  kept_BV: Any


def sample(
  logits_BV: Float[Array, 'B V'],
  key_B: Key[Array, ' B'],
  *,
  sampling: Sampling,
) -> Sampled:
  """Draws each request's next token with its own key.

  A request's draw depends on its own logits and key only, never on what else
  is in the batch. Among equal logits the lowest token id counts as the more
  likely one.

  Args:
    logits_BV: any float type; computed in float32.
    key_B: one key a request; unused if greedy.
    sampling: how to draw.
  """
  logits_BV = logits_BV.astype(jnp.float32)
  logprobs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
  if sampling.temperature == 0:
    token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    drawn_from_BV = None
    kept_BV = jax.nn.one_hot(token_B, logits_BV.shape[-1], dtype=jnp.bool)
  else:
    kept_BV = kept_tokens(logits_BV, sampling=sampling)
    drawn_from_BV = jnp.where(
      kept_BV, logits_BV / sampling.temperature, -jnp.inf
    )
    token_B = jax.vmap(jax.random.categorical)(key_B, drawn_from_BV)
    token_B = token_B.astype(jnp.int32)
  sampling_logprob_B = jnp.zeros(token_B.shape, jnp.float32)
  if drawn_from_BV is not None:
    sampling_logprob_B = _pick(
      jax.nn.log_softmax(drawn_from_BV, axis=-1), token_B
    )
  return Sampled(
    token_B=token_B,
    logprob_B=_pick(logprobs_BV, token_B),
    sampling_logprob_B=sampling_logprob_B,
    kept_BV=kept_BV,
  )


def kept_tokens(
  logits_BV: Float[Array, 'B V'], *, sampling: Sampling
) -> Bool[Array, 'B V']:
  """The tokens that temperature, top-k and top-p leave; at least one."""
  V = logits_BV.shape[-1]
  keeps_all_k = sampling.top_k is None or sampling.top_k >= V
  if keeps_all_k and sampling.top_p >= 1:
    return jnp.ones(logits_BV.shape, jnp.bool)
  scaled_BV = logits_BV.astype(jnp.float32) / sampling.temperature
  # Stable, so equal logits stay in the order of their ids.
  order_BV = jnp.argsort(-scaled_BV, axis=-1, stable=True)
  rank_V = jnp.arange(V)[None, :]
  kept_BV = jnp.ones(logits_BV.shape, jnp.bool)
  if sampling.top_k is not None:
    kept_BV = kept_BV & (rank_V < sampling.top_k)
  if sampling.top_p < 1:
    sorted_BV = jnp.take_along_axis(scaled_BV, order_BV, axis=-1)
    probs_BV = jax.nn.softmax(jnp.where(kept_BV, sorted_BV, -jnp.inf), axis=-1)
    # What the better tokens leave to be covered; the best has 0 before it.
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    kept_BV = kept_BV & ((before_BV < sampling.top_p) | (rank_V == 0))
  rank_of_token_BV = jnp.argsort(order_BV, axis=-1)
  return jnp.take_along_axis(kept_BV, rank_of_token_BV, axis=-1)


def request_keys(seed_B: Integer[Array, ' B']) -> Key[Array, ' B']:
  """One key a request, from its seed alone."""
  return jax.vmap(jax.random.key)(seed_B)


def step_keys(
  key_B: Key[Array, ' B'], step: Int[Array, '']
) -> Key[Array, ' B']:
  """The keys of the step-th new token."""
  return jax.vmap(jax.random.fold_in, in_axes=(0, None))(key_B, step)


def _pick(values_BV: Array, token_B: Array) -> Array:
  return jnp.take_along_axis(values_BV, token_B[:, None], axis=-1)[:, 0]
