"""Sparse MLA attention in plain XLA: forward and backward, any platform.

Two formulations of one function, chosen by `config`: 'gather' (here) reads the
selected rows of a block of queries; 'mask' (`xla_mask`) multiplies with whole
key blocks and drops what is not selected. Both hold one step's scores only,
and the backward pass recomputes them from the saved output and normaliser.

Letters: B batch, T queries, S keys, H heads, C latent width, X = C + rope
width, K selected keys, P queries of a step.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.sparse_mla_attention import config as config_lib
from pallas_kernels.sparse_mla_attention import (
  fp8_cache,
  selection,
  varying,
  xla_mask,
)


def sparse_mla_attention(
  q_BTHX: Float[Array, 'B T H X'],
  kv_BSX: Float[Array, 'B S X'],
  indices_BTK: Int[Array, 'B T K'],
  *,
  latent_dim: int,
  scale: int | float,
  config: config_lib.XlaConfig | None = None,
) -> tuple[Float[Array, 'B T H C'], Float[Array, 'B T H']]:
  """Output and normaliser; see `api`.

  The residuals of the backward pass are named for `jax.checkpoint` policies:
  'attention_out' and 'attention_lse'.
  """
  if config is None:
    config = config_lib.xla_config(
      batch=q_BTHX.shape[0],
      num_queries=q_BTHX.shape[1],
      num_keys=kv_BSX.shape[1],
      num_heads=q_BTHX.shape[2],
      width=kv_BSX.shape[2],
      topk=indices_BTK.shape[2],
    )
  out_BTHC, lse_BTH = _attention(
    *varying.together(q_BTHX, kv_BSX, indices_BTK),
    latent_dim,
    float(scale),
    config,
  )
  return out_BTHC, lax.stop_gradient(lse_BTH)


def sparse_mla_attention_fp8_cache(
  q_BTHX: Float[Array, 'B T H X'],
  cache_BSZ: UInt8[Array, 'B S Z'],
  indices_BTK: Int[Array, 'B T K'],
  *,
  scale: int | float,
  config: config_lib.XlaConfig | None = None,
) -> tuple[Float[Array, 'B T H C'], Float[Array, 'B T H']]:
  """Output and normaliser; see `api`. Unpacks the rows that it gathers.

  Raises:
    ValueError: `config` asks for another form than 'gather'.
  """
  if config is None:
    config = config_lib.xla_config(
      batch=q_BTHX.shape[0],
      num_queries=q_BTHX.shape[1],
      num_keys=cache_BSZ.shape[1],
      num_heads=q_BTHX.shape[2],
      width=fp8_cache.WIDTH,
      topk=indices_BTK.shape[2],
      form='gather',
    )
  if config.form != 'gather':
    raise ValueError(
      f"form={config.form!r}: the 8-bit cache is read in the form 'gather'"
    )

  def gather(cache_BSZ, indices_BPK):
    rows_BPKZ = selection.gather_rows(cache_BSZ, indices_BPK)
    # -1 gives some row, whose bytes may be anything, NaN too.
    rows_BPKZ = jnp.where(indices_BPK[..., None] >= 0, rows_BPKZ, 0)
    return fp8_cache.unpack_rows(rows_BPKZ).astype(q_BTHX.dtype)

  out_BTHC, lse_BTH = _forward(
    q_BTHX,
    cache_BSZ,
    indices_BTK,
    latent_dim=fp8_cache.LATENT_DIM,
    scale=float(scale),
    config=config,
    gather=gather,
  )
  return out_BTHC, lse_BTH


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _attention(q_BTHX, kv_BSX, indices_BTK, latent_dim, scale, config):
  forward = _forward if config.form == 'gather' else xla_mask.forward
  out_BTHC, lse_BTH = forward(
    q_BTHX,
    kv_BSX,
    indices_BTK,
    latent_dim=latent_dim,
    scale=scale,
    config=config,
  )
  return out_BTHC.astype(q_BTHX.dtype), lse_BTH


def _attention_forward(q_BTHX, kv_BSX, indices_BTK, latent_dim, scale, config):
  out_BTHC, lse_BTH = _attention(
    q_BTHX, kv_BSX, indices_BTK, latent_dim, scale, config
  )
  out_BTHC = checkpoint_name(out_BTHC, 'attention_out')
  lse_BTH = checkpoint_name(lse_BTH, 'attention_lse')
  residuals = (q_BTHX, kv_BSX, indices_BTK, out_BTHC, lse_BTH)
  return (out_BTHC, lse_BTH), residuals


def _attention_backward(latent_dim, scale, config, residuals, cotangents):
  q_BTHX, kv_BSX, indices_BTK, out_BTHC, lse_BTH = residuals
  d_out_BTHC = cotangents[0]
  # sum_s p dp = out . d_out, without a second pass over the keys.
  delta_BTH = jnp.sum(
    out_BTHC.astype(jnp.float32) * d_out_BTHC.astype(jnp.float32), axis=-1
  )
  # exp(score - lse) of an empty row: 0 with any finite stand-in.
  lse_BTH = jnp.where(lse_BTH == -jnp.inf, 0.0, lse_BTH)
  backward = _backward if config.form == 'gather' else xla_mask.backward
  d_q_BTHX, d_kv_BSX = backward(
    q_BTHX,
    kv_BSX,
    indices_BTK,
    lse_BTH,
    delta_BTH,
    d_out_BTHC,
    latent_dim=latent_dim,
    scale=scale,
    config=config,
  )
  return d_q_BTHX.astype(q_BTHX.dtype), d_kv_BSX.astype(kv_BSX.dtype), None


_attention.defvjp(_attention_forward, _attention_backward)


def _forward(
  q_BTHX,
  kv_BSX,
  indices_BTK,
  *,
  latent_dim,
  scale,
  config,
  gather=selection.gather_rows,
):
  block = config.block_queries

  def step(inputs):
    q_BPHX, indices_BPK = inputs
    rows_BPKX = gather(kv_BSX, indices_BPK)
    scores_BPHK = scale * _product('bphx,bpkx->bphk', q_BPHX, rows_BPKX)
    scores_BPHK = jnp.where(indices_BPK[:, :, None] >= 0, scores_BPHK, -jnp.inf)
    highest_BPH = jnp.max(scores_BPHK, axis=-1)
    highest_BPH = jnp.where(highest_BPH == -jnp.inf, 0.0, highest_BPH)
    p_BPHK = jnp.exp(scores_BPHK - highest_BPH[..., None])
    total_BPH = jnp.sum(p_BPHK, axis=-1)
    out_BPHC = _product(
      'bphk,bpkc->bphc',
      p_BPHK.astype(rows_BPKX.dtype),
      rows_BPKX[..., :latent_dim],
    )
    out_BPHC /= jnp.where(total_BPH == 0, 1.0, total_BPH)[..., None]
    # log(0) = -inf is the normaliser of an empty row.
    return out_BPHC.astype(q_BTHX.dtype), highest_BPH + jnp.log(total_BPH)

  outputs = lax.map(
    step,
    (
      selection.split_queries(q_BTHX, block),
      selection.split_queries(indices_BTK, block, -1),
    ),
  )
  return [selection.join_queries(x, q_BTHX.shape[1]) for x in outputs]


def _backward(
  q_BTHX,
  kv_BSX,
  indices_BTK,
  lse_BTH,
  delta_BTH,
  d_out_BTHC,
  *,
  latent_dim,
  scale,
  config,
):
  block = config.block_queries
  dtype = kv_BSX.dtype
  no_rope = kv_BSX.shape[2] - latent_dim

  def step(d_kv_BSX, inputs):
    q_BPHX, indices_BPK, lse_BPH, delta_BPH, d_out_BPHC = inputs
    rows_BPKX = selection.gather_rows(kv_BSX, indices_BPK)
    scores_BPHK = scale * _product('bphx,bpkx->bphk', q_BPHX, rows_BPKX)
    p_BPHK = jnp.where(
      indices_BPK[:, :, None] >= 0,
      jnp.exp(scores_BPHK - lse_BPH[..., None]),
      0.0,
    )
    d_p_BPHK = _product(
      'bphc,bpkc->bphk', d_out_BPHC, rows_BPKX[..., :latent_dim]
    )
    d_scores_BPHK = scale * p_BPHK * (d_p_BPHK - delta_BPH[..., None])
    p_BPHK, d_scores_BPHK = p_BPHK.astype(dtype), d_scores_BPHK.astype(dtype)
    d_q_BPHX = _product('bphk,bpkx->bphx', d_scores_BPHK, rows_BPKX)
    # A row is key and value at once: one product over both roles' heads.
    d_value_BPHX = jnp.pad(d_out_BPHC, [(0, 0)] * 3 + [(0, no_rope)])
    d_rows_BPKX = _product(
      'bphk,bphx->bpkx',
      jnp.concatenate([d_scores_BPHK, p_BPHK], axis=2),
      jnp.concatenate([q_BPHX, d_value_BPHX], axis=2),
    )
    d_kv_BSX = selection.add_rows(
      d_kv_BSX,
      indices_BPK,
      d_rows_BPKX,
      in_sorted_order=config.sorted_scatter,
    )
    return d_kv_BSX, d_q_BPHX.astype(q_BTHX.dtype)

  (zeros_BSX,) = varying.along(
    varying.axes(kv_BSX), jnp.zeros(kv_BSX.shape, jnp.float32)
  )
  d_kv_BSX, d_q = lax.scan(
    step,
    zeros_BSX,
    (
      selection.split_queries(q_BTHX, block),
      selection.split_queries(indices_BTK, block, -1),
      selection.split_queries(lse_BTH, block),
      selection.split_queries(delta_BTH, block),
      selection.split_queries(d_out_BTHC, block),
    ),
  )
  return selection.join_queries(d_q, q_BTHX.shape[1]), d_kv_BSX


def _product(equation, x, y):
  return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)
