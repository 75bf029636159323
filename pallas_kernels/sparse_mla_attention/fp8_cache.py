"""The 8-bit cache of latent rows: 656 bytes a key, as FlashMLA reads them.

  bytes      holds
  0..511     512 latents in float8 e4m3 (`jnp.float8_e4m3fn`)
  512..527   4 float32 scales, one for each 128 latents
  528..655   64 rotary keys in bfloat16, which aren't quantised

Numbers are little-endian; a latent is its float8 value times its scale. `pack`
rounds scales up to powers of two, as FlashMLA's own quantiser does: e4m3 loses
nothing by it (its steps are relative), a latent is then exact in bfloat16, and
kernels that keep only a scale's exponent read the same values. Reading takes
any scale. FlashMLA's least scale, 2**-13, is kept too, so the bytes are equal.

Letters: B batch, S keys, X = 512 latents + 64 rotary keys, Z = 656 bytes.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

LATENT_DIM = 512
ROPE_DIM = 64
WIDTH = LATENT_DIM + ROPE_DIM
BLOCK = 128  # Latents that share a scale.
SCALES_START = LATENT_DIM
ROPE_START = SCALES_START + 4 * LATENT_DIM // BLOCK
ROW_BYTES = ROPE_START + 2 * ROPE_DIM
_LARGEST = 448.0  # Of e4m3; beyond it a cast gives NaN.
_SMALLEST_SCALE = 1e-4  # Before it is rounded up, to 2**-13.


def pack_fp8_cache(kv_BSX: Float[Array, 'B S X']) -> UInt8[Array, 'B S Z']:
  """Quantises rows [latents ; rotary keys] to rows of 656 bytes.

  Args:
    kv_BSX: finite, float32 or bfloat16, X = 576.

  Returns:
    uint8 rows, for `sparse_mla_attention_fp8_cache`.

  Raises:
    ValueError: rows of another width or type.

  Example:
    >>> pack_fp8_cache(jnp.ones((1, 3, 576))).shape
    (1, 3, 656)
  """
  if kv_BSX.ndim != 3 or kv_BSX.shape[2] != WIDTH:
    raise ValueError(
      f'kv_BSX.shape={kv_BSX.shape} must be [B, S, {WIDTH}]: {LATENT_DIM} '
      f'latents and {ROPE_DIM} rotary keys'
    )
  if kv_BSX.dtype not in (jnp.float32, jnp.bfloat16):
    raise ValueError(f'kv_BSX.dtype={kv_BSX.dtype} must be float32 or bfloat16')
  rows = kv_BSX.shape[:2]
  blocks = kv_BSX[..., :LATENT_DIM].astype(jnp.float32)
  blocks = blocks.reshape(*rows, -1, BLOCK)
  highest = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
  scales = _round_up_to_power_of_two(
    jnp.maximum(highest / _LARGEST, _SMALLEST_SCALE)
  )
  parts = (
    (blocks / scales).astype(jnp.float8_e4m3fn),
    scales,
    kv_BSX[..., LATENT_DIM:].astype(jnp.bfloat16),
  )
  as_bytes = [lax.bitcast_convert_type(x, jnp.uint8) for x in parts]
  return jnp.concatenate([x.reshape(*rows, -1) for x in as_bytes], axis=-1)


def unpack_fp8_cache(cache_BSZ: UInt8[Array, 'B S Z']) -> Float[Array, 'B S X']:
  """The float32 rows [latents ; rotary keys] that bytes stand for.

  Raises:
    ValueError: not uint8, or rows of another width.
  """
  require_cache(cache_BSZ)
  return unpack_rows(cache_BSZ)


def require_cache(cache_BSZ: jax.Array) -> None:
  """Raises ValueError if this isn't a cache of 656-byte rows."""
  if cache_BSZ.ndim != 3 or cache_BSZ.shape[2] != ROW_BYTES:
    raise ValueError(
      f'cache_BSZ.shape={cache_BSZ.shape} must be [B, S, {ROW_BYTES}]: see '
      '`pack_fp8_cache`'
    )
  if cache_BSZ.dtype != jnp.uint8:
    raise ValueError(f'cache_BSZ.dtype={cache_BSZ.dtype} must be uint8')


def unpack_rows(rows: jax.Array) -> jax.Array:
  """uint8 [..., Z] to float32 [..., X], of any rank."""
  leading = rows.shape[:-1]
  latents = lax.bitcast_convert_type(
    rows[..., :SCALES_START], jnp.float8_e4m3fn
  ).astype(jnp.float32)
  scales = lax.bitcast_convert_type(
    rows[..., SCALES_START:ROPE_START].reshape(*leading, -1, 4), jnp.float32
  )
  rope = lax.bitcast_convert_type(
    rows[..., ROPE_START:].reshape(*leading, ROPE_DIM, 2), jnp.bfloat16
  )
  latents = latents.reshape(*leading, -1, BLOCK) * scales[..., None]
  return jnp.concatenate(
    [latents.reshape(*leading, LATENT_DIM), rope.astype(jnp.float32)], axis=-1
  )


def _round_up_to_power_of_two(x: jax.Array) -> jax.Array:
  """The least power of two that is not below a positive, normal float32."""
  bits = lax.bitcast_convert_type(x, jnp.int32)
  has_fraction = (bits & 0x7FFFFF) != 0
  return lax.bitcast_convert_type(
    (bits & ~0x7FFFFF) + jnp.where(has_fraction, 1 << 23, 0), jnp.float32
  )
