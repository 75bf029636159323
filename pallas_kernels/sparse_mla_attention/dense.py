"""Attention of a few queries to every key of a range, in MQA mode.

The dense way to decode. On a GPU it is the kernel of sparse attention with
every key selected: its rows come by number, so they may lie in pages, and it
shares the keys of a query out over the multiprocessors (docs/kernels.md has how
close that comes to what the machine can do).

Letters: B batch, T queries, S keys, H heads, X = latent width + rope width,
P pages of a pool, N pages of a row.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels import dispatch
from pallas_kernels.sparse_mla_attention import api, pages


def dense_mla_decode(
  q_BTHX: Float[Array, 'B T H X'],
  kv_BSX: Float[Array, '_B _S X'],
  *,
  key_start_BT: Int32[Array, 'B T'],
  key_end_BT: Int32[Array, 'B T'],
  latent_dim: int,
  scale: int | float,
  pages_BN: Int[Array, 'B N'] | None = None,
  implementation: dispatch.Implementation = None,
) -> api.SparseAttentionOutput:
  """`sparse_mla_attention` over all keys of a range; for a few queries.

  Takes 4 S bytes a query for the numbers of the keys, and the time of S keys
  for every query, however short its range: for decoding, not for prefill.

  Example:
    >>> q, kv = jnp.ones((1, 1, 4, 6)), jnp.ones((1, 3, 6))
    >>> one = jnp.ones((1, 1), jnp.int32)
    >>> dense_mla_decode(
    ...   q, kv, key_start_BT=0 * one, key_end_BT=3 * one, latent_dim=4, scale=1
    ... ).out_BTHC.shape
    (1, 1, 4, 4)

  Args:
    q_BTHX: absorbed queries.
    kv_BSX: rows [c_kv ; k_rope]; with `pages_BN` a pool [P, page, X].
    key_start_BT: first key of each query.
    key_end_BT: one past the last.
    latent_dim: as in `sparse_mla_attention`.
    scale: likewise.
    pages_BN: pages of each row in order.
    implementation: see `pallas_kernels.dispatch`.

  Returns:
    `SparseAttentionOutput`.

  Raises:
    ValueError: as `sparse_mla_attention`.
  """
  batch, queries = q_BTHX.shape[:2]
  page = kv_BSX.shape[1]
  num_keys = page if pages_BN is None else page * pages_BN.shape[1]
  key_11S = jnp.arange(num_keys, dtype=jnp.int32)[None, None]
  inside_BTS = (key_11S >= key_start_BT[..., None]) & (
    key_11S < key_end_BT[..., None]
  )
  indices_BTS = jnp.where(inside_BTS, key_11S, -1)
  if pages_BN is None:
    return api.sparse_mla_attention(
      q_BTHX,
      kv_BSX,
      indices_BTS,
      latent_dim=latent_dim,
      scale=scale,
      implementation=implementation,
    )
  indices_BTS = pages.physical_indices(indices_BTS, pages_BN, page=page)
  attended = api.sparse_mla_attention(
    q_BTHX.reshape(1, -1, *q_BTHX.shape[2:]),
    kv_BSX.reshape(1, -1, kv_BSX.shape[2]),
    indices_BTS.reshape(1, -1, num_keys),
    latent_dim=latent_dim,
    scale=scale,
    implementation=implementation,
  )
  return api.SparseAttentionOutput(
    attended.out_BTHC.reshape(batch, queries, *attended.out_BTHC.shape[2:]),
    attended.lse_BTH.reshape(batch, queries, -1),
  )
