"""Sparse MLA attention on Hopper GPUs: forward, backward and decode.

The kernels are in `mosaic_forward` and `mosaic_backward`; here are the shapes
they take, the padding that other shapes need, and the custom VJP.

Unlike `xla`, the gradient of kv is summed by atomic additions, in an order
that differs from run to run, and so do its last bits.

Letters: B batch, T queries, S keys, H heads, C latent width, X = C + rope
width, K selected keys, N = B * T, P = H padded, W = X padded.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels import mosaic
from pallas_kernels.sparse_mla_attention import config as config_lib
from pallas_kernels.sparse_mla_attention import (
  fp8_cache,
  mosaic_backward,
  mosaic_backward_plan,
  mosaic_forward,
  selection,
  varying,
)


def sparse_mla_attention(
  q_BTHX: Float[Array, 'B T H X'],
  kv_BSX: Float[Array, 'B S X'],
  indices_BTK: Int[Array, 'B T K'],
  *,
  latent_dim: int,
  scale: int | float,
  config: config_lib.MosaicConfig | None = None,
  target: mosaic.Target = mosaic.Target.DEVICE,
) -> tuple[Float[Array, 'B T H C'], Float[Array, 'B T H']]:
  """Output and normaliser; see `api`.

  The residuals of the backward pass are named for `jax.checkpoint` policies:
  'attention_out' and 'attention_lse'.

  Raises:
    NotImplementedError: not on a Hopper GPU, or shapes and types that the
      kernels don't take.
  """
  mosaic.require(target)
  _require_supported(q_BTHX, kv_BSX, indices_BTK, latent_dim)
  if config is None:
    config = _config(q_BTHX, indices_BTK, target)
  out_BTHC, lse_BTH = _attention(
    *varying.together(q_BTHX, kv_BSX, indices_BTK),
    latent_dim,
    float(scale),
    config,
    target,
  )
  return out_BTHC, lax.stop_gradient(lse_BTH)


def sparse_mla_attention_fp8_cache(
  q_BTHX: Float[Array, 'B T H X'],
  cache_BSZ: UInt8[Array, 'B S Z'],
  indices_BTK: Int[Array, 'B T K'],
  *,
  scale: int | float,
  config: config_lib.MosaicConfig | None = None,
  target: mosaic.Target = mosaic.Target.DEVICE,
) -> tuple[Float[Array, 'B T H C'], Float[Array, 'B T H']]:
  """Output and normaliser; see `api`.

  The rows are turned into bfloat16 on their way to the tensor cores.

  Raises:
    NotImplementedError: not on a Hopper GPU, or shapes and types that the
      kernel doesn't take.
  """
  mosaic.require(target)
  latent_dim = fp8_cache.LATENT_DIM
  _require_supported(q_BTHX, cache_BSZ, indices_BTK, latent_dim)
  if config is None:
    config = _config(q_BTHX, indices_BTK, target)
  return _forward(
    q_BTHX, cache_BSZ, indices_BTK, latent_dim, float(scale), config, target
  )


def _config(q_BTHX, indices_BTK, target):
  return config_lib.mosaic_config(
    num_rows=q_BTHX.shape[0] * q_BTHX.shape[1],
    num_heads=q_BTHX.shape[2],
    topk=indices_BTK.shape[2],
    num_multiprocessors=mosaic.num_multiprocessors(target),
  )


def _require_supported(q_BTHX, kv_BSX, indices_BTK, latent_dim):
  if q_BTHX.dtype != jnp.bfloat16:
    raise NotImplementedError(
      f'q_BTHX.dtype={q_BTHX.dtype}: the Mosaic GPU kernels take bfloat16'
    )
  width = q_BTHX.shape[3]
  rope_dim = width - latent_dim
  if latent_dim not in (128, 256, 512):
    raise NotImplementedError(
      f'latent_dim={latent_dim}: the Mosaic GPU kernels take 128, 256 and 512'
    )
  if not 1 <= rope_dim <= 64 or width % 8:
    raise NotImplementedError(
      f'a rope width of {rope_dim} beside latent_dim={latent_dim}: the Mosaic '
      'GPU kernels take multiples of 8 up to 64'
    )
  num_keys = kv_BSX.shape[0] * kv_BSX.shape[1]
  if indices_BTK.size >= 2**31 or num_keys >= 2**31:
    raise NotImplementedError(
      f'indices_BTK.shape={indices_BTK.shape}, kv_BSX.shape={kv_BSX.shape}: '
      'the Mosaic GPU kernels count rows and indices in int32'
    )


def _forward(q_BTHX, kv_BSX, indices_BTK, latent_dim, scale, config, target):
  batch, num_queries, num_heads, _ = q_BTHX.shape
  q_NPW = _pad_queries(q_BTHX)
  indices_NK = indices_BTK.reshape(batch * num_queries, -1)
  # Both warpgroups of the kernel have the same number of tiles.
  granule = 2 * mosaic_forward.KEYS * config.splits
  indices_NK = selection.pad_axis(indices_NK, 1, granule, -1)
  out, lse = mosaic_forward.forward(
    q_NPW,
    kv_BSX.reshape(-1, kv_BSX.shape[2]),
    indices_NK,
    rows_per_batch=num_queries,
    keys_per_batch=kv_BSX.shape[1],
    latent_dim=latent_dim,
    scale=scale,
    splits=config.splits,
    target=target,
  )
  out, lse = varying.along(varying.axes(q_BTHX, kv_BSX, indices_BTK), out, lse)
  if config.splits > 1:
    out, lse = _combine(out, lse, config.splits)
  out_BTHC = out[:, :num_heads].reshape(*q_BTHX.shape[:3], latent_dim)
  return out_BTHC, lse[:, :num_heads].reshape(q_BTHX.shape[:3])


_attention = jax.custom_vjp(_forward, nondiff_argnums=(3, 4, 5, 6))


def _attention_forward(
  q_BTHX, kv_BSX, indices_BTK, latent_dim, scale, config, target
):
  out_BTHC, lse_BTH = _attention(
    q_BTHX, kv_BSX, indices_BTK, latent_dim, scale, config, target
  )
  out_BTHC = checkpoint_name(out_BTHC, 'attention_out')
  lse_BTH = checkpoint_name(lse_BTH, 'attention_lse')
  residuals = (q_BTHX, kv_BSX, indices_BTK, out_BTHC, lse_BTH)
  return (out_BTHC, lse_BTH), residuals


def _attention_backward(
  latent_dim, scale, config, target, residuals, cotangents
):
  del latent_dim
  q_BTHX, kv_BSX, indices_BTK, out_BTHC, lse_BTH = residuals
  d_out_BTHC = cotangents[0]
  batch, num_queries, num_heads, width = q_BTHX.shape
  # sum_s p dp = out . d_out, without a second pass over the keys.
  delta_BTH = jnp.sum(
    out_BTHC.astype(jnp.float32) * d_out_BTHC.astype(jnp.float32), axis=-1
  )
  # exp(score - lse) of an empty row: 0 with any finite stand-in.
  lse_BTH = jnp.where(lse_BTH == -jnp.inf, 0.0, lse_BTH)

  heads = mosaic_backward_plan.padded_heads(num_heads)

  def rows(x):
    x = x.reshape(batch * num_queries, *x.shape[2:])
    return selection.pad_axis(x, 1, heads)

  indices_NK = indices_BTK.reshape(batch * num_queries, -1)
  d_q, d_kv = mosaic_backward.backward(
    selection.pad_axis(rows(q_BTHX), 2, mosaic_forward.CHUNK),
    rows(d_out_BTHC.astype(q_BTHX.dtype)),
    kv_BSX.reshape(-1, width),
    selection.pad_axis(indices_NK, 1, mosaic_backward.KEYS, -1),
    rows(lse_BTH),
    rows(delta_BTH),
    rows_per_batch=num_queries,
    keys_per_batch=kv_BSX.shape[1],
    scale=scale,
    target=target,
  )
  d_q, d_kv = varying.along(varying.axes(q_BTHX), d_q, d_kv)
  d_q_BTHX = d_q[:, :num_heads, :width].reshape(q_BTHX.shape)
  d_kv_BSX = d_kv[:, :width].reshape(kv_BSX.shape)
  return d_q_BTHX, d_kv_BSX.astype(kv_BSX.dtype), None


_attention.defvjp(_attention_forward, _attention_backward)


def _pad_queries(q_BTHX):
  """[B, T, H, X] to [N, P, W]: whole tiles of heads and of columns."""
  q_NHX = q_BTHX.reshape(-1, *q_BTHX.shape[2:])
  q_NPX = selection.pad_axis(q_NHX, 1, mosaic_forward.HEADS)
  return selection.pad_axis(q_NPX, 2, mosaic_forward.CHUNK)


def _combine(out, lse, splits):
  """Outputs and normalisers of parts of the keys, to those of all keys."""
  out_NPHC = out.reshape(-1, splits, *out.shape[1:])
  lse_NPH = lse.reshape(-1, splits, *lse.shape[1:])
  highest_NH = jnp.max(lse_NPH, axis=1)
  finite_NH = jnp.where(highest_NH == -jnp.inf, 0.0, highest_NH)
  weight_NPH = jnp.exp(lse_NPH - finite_NH[:, None])
  total_NH = jnp.sum(weight_NPH, axis=1)
  lse_NH = finite_NH + jnp.log(total_NH)
  weight_NPH /= jnp.where(total_NH == 0, 1.0, total_NH)[:, None]
  out_NHC = jnp.sum(
    weight_NPH[..., None] * out_NPHC.astype(jnp.float32), axis=1
  )
  return out_NHC.astype(out.dtype), lse_NH
