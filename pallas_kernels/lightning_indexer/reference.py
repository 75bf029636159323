"""The definition of the lightning indexer. Holds [B, T, J, S]: small sizes.

Letters: B batch, T query tokens, S key tokens, J indexer heads, I index head
dim.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32


def lightning_indexer(
  q_index_BTJI: Float[Array, 'B T J I'],
  k_index_BSI: Float[Array, '_B _S I'],
  w_index_BTJ: Float[Array, 'B T J'],
  *,
  key_start_BT: Int32[Array, 'B T'] | None = None,
  key_end_BT: Int32[Array, 'B T'] | None = None,
  quantized: bool = False,
  k_scale_BS: Float32[Array, '_B _S'] | None = None,
  pages_BN: Int32[Array, 'B N'] | None = None,
  scale_format: str = 'float32',
) -> Float32[Array, 'B T S']:
  """I[t,s] = sum_j w[t,j] ReLU(q[t,j] . k[s]); arXiv:2512.02556, Eq. 1."""
  q, k, w = (
    x.astype(jnp.float32) for x in (q_index_BTJI, k_index_BSI, w_index_BTJ)
  )
  if quantized:
    q, k = _to_float8(q, scale_format), _to_float8(k, scale_format)
  if k_scale_BS is not None:
    q, k = _to_float8(q, scale_format), k * k_scale_BS[..., None]
  if pages_BN is not None:
    k = k[jnp.clip(pages_BN, 0, k.shape[0] - 1)]
    k = k.reshape(k.shape[0], -1, k.shape[3])
  T, S = q.shape[1], k.shape[1]
  if key_start_BT is None or key_end_BT is None:
    key_end_BT = (jnp.arange(T) + 1 + S - T)[None]
    key_start_BT = jnp.zeros_like(key_end_BT)
  dots_BTJS = jnp.einsum('btji,bsi->btjs', q, k, precision='highest')
  scores_BTS = jnp.einsum(
    'btj,btjs->bts', w, jax.nn.relu(dots_BTJS), precision='highest'
  )
  scores_BTS = jnp.where(scores_BTS == 0, 0.0, scores_BTS)  # no -0.0
  s = jnp.arange(S)[None, None]
  valid_BTS = (s >= key_start_BT[..., None]) & (s < key_end_BT[..., None])
  return jnp.where(valid_BTS, scores_BTS, -jnp.inf)


def _to_float8(x: Array, scale_format: str) -> Array:
  """x rounded to float8_e4m3fn, each vector scaled so that its largest is 448.

  The scales are positive and commute with ReLU, so the scores are those of
  the float8 values with the scales multiplied in. The derivative is 1.
  """
  amax = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
  scale = jnp.maximum(amax, 1e-4) / 448
  if scale_format == 'ue8m0':  # the next power of two, from the bits
    bits = jax.lax.bitcast_convert_type(scale, jnp.int32)
    bits = (bits + 0x7FFFFF) & 0x7F800000
    scale = jax.lax.bitcast_convert_type(bits, jnp.float32)
  x8 = jnp.clip(x / scale, -448, 448)
  # Not by a cast there and back, which XLA drops. float8_e4m3fn has three bits
  # after the leading one, and steps of 2^-9 below 2^-6.
  x8 = jnp.where(
    jnp.abs(x8) < 2.0**-6,
    jnp.round(x8 * 512) / 512,
    jax.lax.reduce_precision(x8, exponent_bits=8, mantissa_bits=3),
  )
  x8 *= scale
  return jax.lax.stop_gradient(x8) + (x - jax.lax.stop_gradient(x))
