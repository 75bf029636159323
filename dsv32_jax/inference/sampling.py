"""From logits to the next token, for a batch of independent requests.

Every request has settings of its own, which are arrays: one compiled program
serves them all, and pays for a sort only while some row's settings ask for one.

Letters: B requests, T positions, V vocabulary, X any leading dimensions.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Key

import pallas_kernels
from dsv32_jax.sharding import parallel

_ALL = 0  # top_k of a request without one.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How one request's tokens are drawn.

  The truncations apply in this order, each to what the one before left and
  renormalised.

  Attributes:
    temperature: divides the logits; 0 takes the most likely token, and then
      nothing below matters.
    top_k: keep this many of the most likely tokens; None keeps all.
    top_p: keep the fewest most likely tokens of at least this total
      probability (nucleus sampling, arXiv:1904.09751); 1 keeps all.
    min_p: keep the tokens of at least this times the most likely token's
      probability (arXiv:2407.01082); 0 keeps all.
  """

  temperature: int | float = 1.0
  top_k: int | None = None
  top_p: int | float = 1.0
  min_p: int | float = 0.0

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
    if not 0 <= self.min_p <= 1:
      raise ValueError(f'min_p: got {self.min_p}, expected 0 <= min_p <= 1')


GREEDY = Sampling(temperature=0.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """The settings of a batch; see `Sampling` for each.

  Attributes:
    temperature_B: float32; 0 is greedy.
    top_k_B: int32; 0 keeps all.
    top_p_B: float32; 1 keeps all.
    min_p_B: float32; 0 keeps all.
  """

  temperature_B: Any
  top_k_B: Any
  top_p_B: Any
  min_p_B: Any


def stack(samplings: Sequence[Sampling]) -> SamplingParams:
  """Settings of one request each, as host arrays of the batch."""
  temperature_B = np.array([s.temperature for s in samplings], np.float32)
  # A number this small may be flushed to 0, and 0 / 0 is no logit.
  temperature_B[temperature_B < np.finfo(np.float32).tiny] = 0
  return SamplingParams(
    temperature_B=temperature_B,
    top_k_B=np.array(
      [_ALL if s.top_k is None else min(s.top_k, 2**31 - 1) for s in samplings],
      np.int32,
    ),
    top_p_B=np.array([s.top_p for s in samplings], np.float32),
    min_p_B=np.array([s.min_p for s in samplings], np.float32),
  )


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
    target_BV: the log-weights it was drawn from (`target_logits`).
  """

  token_B: Any
  logprob_B: Any
  sampling_logprob_B: Any
  target_BV: Any

  @property
  def kept_BV(self) -> Bool[Array, 'B V']:
    """The tokens that could have been drawn."""
    return self.target_BV > -jnp.inf


def sample(
  logits_BV: Float[Array, 'B V'],
  key_B: Key[Array, ' B'],
  params: SamplingParams,
  *,
  most_kept: int = 0,
) -> Sampled:
  """Draws each request's next token with its own key.

  A request's draw depends on its own logits, key and settings only, never on
  what else is in the batch. Among equal logits the lowest token id counts as
  the more likely one.

  Args:
    logits_BV: any float type; computed in float32.
    key_B: one key a request; of no effect if greedy.
    params: how to draw.
    most_kept: see `target_logits`.
  """
  target_BV = target_logits(logits_BV, params, most_kept=most_kept)
  # Noise for a whole vocabulary is the dearest part of an easy draw.
  token_B = jax.lax.cond(
    jnp.any(params.temperature_B > 0),
    draw,
    lambda target_BV, _: jnp.argmax(target_BV, axis=-1).astype(jnp.int32),
    target_BV,
    key_B,
  )
  return Sampled(
    token_B=token_B,
    logprob_B=logprobs_of(logits_BV, token_B),
    sampling_logprob_B=logprobs_of(target_BV, token_B),
    target_BV=target_BV,
  )


def target_logits(
  logits: Float[Array, 'B *T V'],
  params: SamplingParams,
  *,
  most_kept: int = 0,
) -> Float[Array, 'B *T V']:
  """The log-weights that tokens are drawn from; float32.

  Logits divided by the temperature, shifted so that the best token has 0, and
  -inf for every token that the truncations drop. A greedy row has 0 at its
  most likely token and -inf elsewhere.

  Args:
    logits: after one position of each request or after several.
    params: one setting a request, for all of its positions.
    most_kept: no row that top-p truncates has a larger top_k, and none is
      without one; 0 if there may be such rows. Then only so many tokens need
      be sorted, not the vocabulary; the result is the same. Static.
  """
  if logits.ndim == 3:
    B, T, V = logits.shape
    params_BT = jax.tree.map(lambda x_B: jnp.repeat(x_B, T), params)
    target = target_logits(
      logits.reshape(B * T, V), params_BT, most_kept=most_kept
    )
    return target.reshape(B, T, V)
  logits_BV = logits.astype(jnp.float32)
  temperature_B1 = jnp.asarray(params.temperature_B)[:, None]
  top_k_B1 = jnp.asarray(params.top_k_B)[:, None]
  top_p_B1 = jnp.asarray(params.top_p_B)[:, None]
  min_p_B1 = jnp.asarray(params.min_p_B)[:, None]
  V = logits_BV.shape[-1]
  is_greedy_B1 = temperature_B1 == 0
  # Shifted first: at a tiny temperature the best token stays 0, not inf - inf.
  best_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
  scaled_BV = (logits_BV - best_B1) / jnp.where(is_greedy_B1, 1, temperature_B1)

  needs_k_B1 = (top_k_B1 != _ALL) & (top_k_B1 < V) & ~is_greedy_B1
  needs_p_B1 = (top_p_B1 < 1) & ~is_greedy_B1
  top_k_B1 = jnp.where(needs_k_B1, top_k_B1, V)
  top_p_B1 = jnp.where(needs_p_B1, top_p_B1, jnp.inf)
  kept_BV = jax.lax.cond(
    jnp.any(needs_k_B1 | needs_p_B1),
    functools.partial(_most_likely, most_kept=most_kept),
    lambda scaled_BV, *_: jnp.ones(scaled_BV.shape, jnp.bool),
    scaled_BV,
    top_k_B1,
    top_p_B1,
  )
  # The best token's log-weight is 0 and no truncation drops it.
  kept_BV = kept_BV & (scaled_BV >= jnp.log(min_p_B1))
  first_B1 = jnp.argmax(logits_BV, axis=-1, keepdims=True)
  is_first_BV = jnp.arange(V)[None, :] == first_B1
  kept_BV = jnp.where(is_greedy_B1, is_first_BV, kept_BV)
  return jnp.where(kept_BV, jnp.where(is_greedy_B1, 0.0, scaled_BV), -jnp.inf)


def draw(
  target_BV: Float[Array, 'B V'], key_B: Key[Array, ' B']
) -> Int[Array, ' B']:
  """One token a row, in proportion to the exponentials of the log-weights."""
  token_B = jax.vmap(jax.random.categorical)(key_B, target_BV)
  return token_B.astype(jnp.int32)


def logprobs_of(
  weights_XV: Float[Array, '*X V'], token_X: Int[Array, '*X']
) -> Float[Array, '*X']:
  """Log-probability of one token a row under normalised log-weights.

  Logits give its probability under the model, `target_logits` the one that it
  was drawn with.
  """
  weights_XV = weights_XV.astype(jnp.float32)
  # Shifted first, so that large logits cost no digits.
  best_X1 = jnp.max(weights_XV, axis=-1, keepdims=True)
  total_X = jnp.sum(jnp.exp(weights_XV - best_X1), axis=-1)
  picked_X1 = jnp.take_along_axis(weights_XV, token_X[..., None], axis=-1)
  return (picked_X1 - best_X1)[..., 0] - jnp.log(total_X)


def request_keys(seed_B: Integer[Array, ' B']) -> Key[Array, ' B']:
  """One key a request, from its seed alone."""
  return jax.vmap(jax.random.key)(seed_B)


def step_keys(
  key_B: Key[Array, ' B'], step: Integer[Array, '*B']
) -> Key[Array, ' B']:
  """The keys of the step-th new token; one step for all, or one a request."""
  in_axes = (0, 0 if jnp.ndim(step) else None)
  return jax.vmap(jax.random.fold_in, in_axes=in_axes)(key_B, step)


def _most_likely(
  scaled_BV: Array, top_k_B1: Array, top_p_B1: Array, *, most_kept: int
) -> Array:
  """The tokens that top-k and then top-p keep; at least one a row.

  C candidates, which are the whole vocabulary without a bound.
  """
  V = scaled_BV.shape[1]
  id_BV = jnp.broadcast_to(jnp.arange(V, dtype=jnp.int32), scaled_BV.shape)
  score_BC, id_BC = scaled_BV, id_BV
  if 0 < most_kept < V:
    # In the order of their ids; -1 where less are above -inf.
    id_BC = most_likely_ids(scaled_BV, most_kept)
    score_BC = jnp.take_along_axis(scaled_BV, jnp.maximum(id_BC, 0), axis=-1)
    score_BC = jnp.where(id_BC < 0, -jnp.inf, score_BC)
  # Stable, so equal logits stay in the order of their ids.
  negated_BC, order_BC = jax.lax.sort(
    (-score_BC, id_BC), dimension=-1, num_keys=1, is_stable=True
  )
  C = score_BC.shape[1]
  rank_1C = jnp.arange(C)[None, :]
  is_in_BC = rank_1C < top_k_B1
  probs_BC = jax.nn.softmax(jnp.where(is_in_BC, -negated_BC, -jnp.inf), axis=-1)
  # What the better tokens cover; the best has 0 before it.
  before_BC = jnp.cumsum(probs_BC, axis=-1) - probs_BC
  is_in_BC = is_in_BC & ((before_BC < top_p_B1) | (rank_1C == 0))
  # The kept ones come first in the order: whatever is at least as good as the
  # last of them, the lower id first, is kept. Saves sorting back.
  is_out_BC = ~is_in_BC
  num_kept_B1 = jnp.where(
    jnp.any(is_out_BC, axis=-1, keepdims=True),
    jnp.argmax(is_out_BC, axis=-1, keepdims=True),
    C,
  )
  last_B1 = num_kept_B1 - 1
  worst_B1 = -jnp.take_along_axis(negated_BC, last_B1, axis=-1)
  worst_id_B1 = jnp.take_along_axis(order_BC, last_B1, axis=-1)
  is_kept_BV = (scaled_BV > worst_B1) | (
    (scaled_BV == worst_B1) & (id_BV <= worst_id_B1)
  )
  return is_kept_BV | (top_k_B1 >= V) & (top_p_B1 >= 1)


def most_likely_ids(
  weights_XV: Float[Array, '*X V'], count: int
) -> Int[Array, '*X {count}']:
  """Ids of the tokens of highest weight, ascending, then -1.

  Of equal weights the lowest id comes first; -inf and NaN never do.
  """
  weights_1XV = weights_XV.reshape(1, -1, weights_XV.shape[-1])
  # The kernels are for one device's arrays.
  implementation = None if parallel.active() is None else 'xla'
  ids_1XK = pallas_kernels.select_topk(
    weights_1XV, k=count, implementation=implementation
  ).indices_BTK
  return ids_1XK.reshape(*weights_XV.shape[:-1], count)
