"""Who chooses the attended tokens: the indexer, or a control of equal budget.

The controls spend the same k as the indexer: `oracle` takes the top-k of the
dense attention itself (the best any selector of this kind can do), `window`
the k most recent tokens, `random` a uniform draw. All work on chunks of
queries, so no [B, T, S] array is held.

Letters: B batch, T query tokens, S key tokens, H heads, X head width,
K selected tokens.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import pallas_kernels

_CHUNK = 128


def window(
  key_start_BT: Int[Array, 'B T'], key_end_BT: Int[Array, 'B T'], *, k: int
) -> Int[Array, 'B T K']:
  """The k most recent valid keys of each query, -1 where there are fewer."""
  indices_BTK = key_end_BT[:, :, None] - k + jnp.arange(k)[None, None, :]
  return jnp.where(
    indices_BTK >= key_start_BT[:, :, None], indices_BTK, -1
  ).astype(jnp.int32)


def oracle(
  q_BTHX: Float[Array, 'B T H X'],
  k_BSHX: Float[Array, 'B S H X'],
  key_start_BT: Int[Array, 'B T'],
  key_end_BT: Int[Array, 'B T'],
  *,
  k: int,
  scale: float,
  head_axis: tuple[str, ...] | None = None,
) -> Int[Array, 'B T K']:
  """Top-k of the head-summed dense attention probabilities.

  `head_axis` names the mesh axes over which the heads are cut, if they are.
  """
  S = k_BSHX.shape[1]

  def select(q_BtHX, start_Bt, end_Bt):
    probs_BtS = head_mean_attention(
      q_BtHX, k_BSHX, start_Bt, end_Bt, scale=scale
    )
    if head_axis is not None:
      probs_BtS = jax.lax.pmean(probs_BtS, head_axis)
    key_S = jnp.arange(S)[None, None, :]
    valid = (key_S >= start_Bt[:, :, None]) & (key_S < end_Bt[:, :, None])
    scores = jnp.where(valid, probs_BtS, -jnp.inf)
    return pallas_kernels.select_topk(scores, k=k).indices_BTK

  return map_query_chunks(select, q_BTHX, key_start_BT, key_end_BT)


def random(
  key: Array,
  key_start_BT: Int[Array, 'B T'],
  key_end_BT: Int[Array, 'B T'],
  *,
  k: int,
  num_keys: int,
  number_BT: Int[Array, 'B T'] | None = None,
) -> Int[Array, 'B T K']:
  """A uniform draw of k valid keys a query.

  Args:
    key: seeds the draws.
    key_start_BT: first valid key of each query.
    key_end_BT: one past the last.
    k: keys to draw.
    num_keys: S.
    number_BT: seeds the draw of each query together with `key`, so that it is
      the same wherever the query is computed; None counts all queries.
  """
  if number_BT is None:
    number_BT = jnp.arange(key_start_BT.size, dtype=jnp.int32)
    number_BT = number_BT.reshape(key_start_BT.shape)

  def draw(number):
    return jax.random.uniform(jax.random.fold_in(key, number), (num_keys,))

  def select(start_Bt, end_Bt, number_Bt):
    key_S = jnp.arange(num_keys)[None, None, :]
    valid = (key_S >= start_Bt[:, :, None]) & (key_S < end_Bt[:, :, None])
    scores = jnp.where(valid, jax.vmap(jax.vmap(draw))(number_Bt), -jnp.inf)
    return pallas_kernels.select_topk(scores, k=k).indices_BTK

  return map_query_chunks(select, key_start_BT, key_end_BT, number_BT)


def head_mean_attention(
  q_BTHX: Float[Array, 'B T H X'],
  k_BSHX: Float[Array, 'B S H X'],
  key_start_BT: Int[Array, 'B T'],
  key_end_BT: Int[Array, 'B T'],
  *,
  scale: float,
) -> Float[Array, 'B T S']:
  """p[t, :] of Eq. 3: dense attention, summed over heads, L1-normalised.

  Holds [B, H, T, S]: call it on a chunk of queries.
  """
  logits_BHTS = scale * jnp.einsum(
    'bthx,bshx->bhts', q_BTHX, k_BSHX, preferred_element_type=jnp.float32
  )
  key_S = jnp.arange(k_BSHX.shape[1])[None, None, :]
  valid_BTS = (key_S >= key_start_BT[:, :, None]) & (
    key_S < key_end_BT[:, :, None]
  )
  valid_BHTS = valid_BTS[:, None]
  top = jnp.max(
    jnp.where(valid_BHTS, logits_BHTS, -1e30), axis=-1, keepdims=True
  )
  weights = jnp.where(valid_BHTS, jnp.exp(logits_BHTS - top), 0.0)
  total = jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)
  return jnp.mean(weights / total, axis=1)


def map_query_chunks(
  function: Callable[..., Any], *operands: Array, chunk: int = _CHUNK
) -> Any:
  """Applies `function` to chunks along axis 1 and joins the results.

  Args:
    function: maps [B, t, ...] operands to a pytree of [B, t, ...] arrays.
    *operands: [B, T, ...] arrays of equal T.
    chunk: t; T is padded with zeros up to a multiple of it.

  Returns:
    The pytree of [B, T, ...] results.
  """
  B, T = operands[0].shape[:2]
  chunk = min(chunk, T)
  num_chunks = -(-T // chunk)
  if num_chunks == 1:
    return function(*operands)

  def split(x):
    pad = [(0, 0), (0, num_chunks * chunk - T)] + [(0, 0)] * (x.ndim - 2)
    parts = jnp.pad(x, pad).reshape(B, num_chunks, chunk, *x.shape[2:])
    return jnp.moveaxis(parts, 1, 0)

  results = jax.lax.map(
    lambda parts: function(*parts), tuple(split(x) for x in operands)
  )

  def join(parts):
    whole = jnp.moveaxis(parts, 0, 1)
    return whole.reshape(B, num_chunks * chunk, *whole.shape[3:])[:, :T]

  return jax.tree.map(join, results)
