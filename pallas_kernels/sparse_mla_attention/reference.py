"""The definition of sparse MLA attention: whole score tensor, float32.

Letters: B batch, T queries, S keys, H heads, C latent width, X = C + rope
width, K selected keys, Z bytes of a row.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8


def sparse_mla_attention(
  q_BTHX: Float[Array, 'B T H X'],
  kv_BSX: Float[Array, 'B S X'],
  indices_BTK: Int[Array, 'B T K'],
  *,
  latent_dim: int,
  scale: int | float,
) -> tuple[Float[Array, 'B T H C'], Float[Array, 'B T H']]:
  """arXiv:2512.02556, Eq. 2: softmax attention over S_t; see `api`."""
  kv = kv_BSX.astype(jnp.float32)
  keys_111S = jnp.arange(kv.shape[1])[None, None, None]
  valid_B1TS = jnp.any(indices_BTK[..., None] == keys_111S, axis=2)[:, None]
  scores_BHTS = scale * jnp.einsum(
    'bthx,bsx->bhts', q_BTHX.astype(jnp.float32), kv, precision='highest'
  )
  # A row with no key keeps finite scores, so that its gradient is 0, not NaN.
  row_B1T1 = jnp.any(valid_B1TS, axis=-1, keepdims=True)
  scores_BHTS = jnp.where(valid_B1TS | ~row_B1T1, scores_BHTS, -jnp.inf)
  p_BHTS = jnp.where(row_B1T1, jax.nn.softmax(scores_BHTS, axis=-1), 0.0)
  out_BTHC = jnp.einsum(
    'bhts,bsc->bthc', p_BHTS, kv[..., :latent_dim], precision='highest'
  )
  lse_BHT = jax.nn.logsumexp(jax.lax.stop_gradient(scores_BHTS), axis=-1)
  lse_BHT = jnp.where(row_B1T1[..., 0], lse_BHT, -jnp.inf)
  return out_BTHC.astype(q_BTHX.dtype), jnp.swapaxes(lse_BHT, 1, 2)


def sparse_mla_attention_fp8_cache(
  q_BTHX: Float[Array, 'B T H X'],
  cache_BSZ: UInt8[Array, 'B S Z'],
  indices_BTK: Int[Array, 'B T K'],
  *,
  scale: int | float,
) -> tuple[Float[Array, 'B T H C'], Float[Array, 'B T H']]:
  """The same over rows of 512 e4m3, 4 float32 and 64 bfloat16; see `api`."""

  def view(start, stop, dtype):
    x = cache_BSZ[..., start:stop]
    x = x.reshape(*x.shape[:2], -1, jnp.dtype(dtype).itemsize)
    x = x[..., 0] if x.shape[-1] == 1 else x
    return jax.lax.bitcast_convert_type(x, dtype).astype(jnp.float32)

  latents_BSC = view(0, 512, jnp.float8_e4m3fn)
  latents_BSC *= jnp.repeat(view(512, 528, jnp.float32), 128, axis=-1)
  kv_BSX = jnp.concatenate([latents_BSC, view(528, 656, jnp.bfloat16)], axis=-1)
  return sparse_mla_attention(
    q_BTHX, kv_BSX, indices_BTK, latent_dim=512, scale=scale
  )
