"""Rotary position embedding with YaRN frequencies.

Letters: B batch, T tokens, H heads, R rotary width, r = R / 2 frequencies.

The two layouts pair different channels of the same vector and are not
interchangeable: DeepSeek-V3.2 rotates the MLA queries and keys interleaved
and those of the lightning indexer half-split.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def inverse_frequencies(
  dim: int,
  *,
  theta: int | float,
  factor: int | float | None = None,
  beta_fast: int | float = 32.0,
  beta_slow: int | float = 1.0,
  original_max_position_embeddings: int | None = None,
) -> Float[Array, ' r']:
  """Returns the angle per position of every channel pair.

  Without `factor` these are theta^(-2i/dim). With it YaRN (arXiv:2309.00071,
  Eq. 17-23, as DeepSeek-V2 sets it up) divides the frequencies that turn fewer
  than `beta_slow` times over the original context by `factor`, keeps those
  that turn more than `beta_fast` times and blends linearly between the two.

  Args:
    dim: rotary width R, even.
    theta: base of the geometric series.
    factor: context extension factor of YaRN, None for plain RoPE.
    beta_fast: turns from which a frequency is kept as it is.
    beta_slow: turns below which a frequency is fully interpolated.
    original_max_position_embeddings: context length before the extension;
      needed with `factor`.

  Returns:
    float32 [dim / 2].

  Raises:
    ValueError: dim is not positive and even, theta is not above 1, or YaRN is
      asked for without a positive original length or with a factor below 1.
  """
  if dim <= 0 or dim % 2:
    raise ValueError(f'dim={dim} must be positive and even')
  if theta <= 1:
    raise ValueError(f'theta={theta} must be above 1')
  # Host floats are double precision, which float32 on the device is not.
  frequencies = [theta ** (-2 * i / dim) for i in range(dim // 2)]
  if factor is not None:
    length = original_max_position_embeddings
    if length is None or length <= 0:
      raise ValueError(
        f'original_max_position_embeddings={length} must be positive when '
        f'factor={factor} asks for YaRN'
      )
    if factor < 1:
      raise ValueError(f'factor={factor} must be at least 1')

    def channel_of(turns: float) -> float:
      """The (fractional) pair that turns this often over the old context."""
      wavelength = length / (turns * 2 * math.pi)
      return dim * math.log(wavelength) / (2 * math.log(theta))

    low = max(math.floor(channel_of(beta_fast)), 0)
    high = min(math.ceil(channel_of(beta_slow)), dim - 1)
    width = high - low if high != low else 0.001
    ramp = [min(max((i - low) / width, 0.0), 1.0) for i in range(dim // 2)]
    frequencies = [
      f * (1 - t) + f / factor * t
      for f, t in zip(frequencies, ramp, strict=True)
    ]
  return jnp.asarray(frequencies, jnp.float32)


def softmax_scale(
  qk_head_dim: int,
  *,
  factor: int | float | None = None,
  mscale_all_dim: int | float = 0.0,
) -> float:
  """Returns the attention scale, with YaRN's temperature folded in.

  qk_head_dim^-1/2 * m^2, m = 0.1 * mscale_all_dim * ln(factor) + 1. DeepSeek
  puts the temperature here and leaves cos and sin alone (their factor is
  mscale / mscale_all_dim = 1); scaling both would count it twice.

  Args:
    qk_head_dim: width of a query head, N + R.
    factor: YaRN factor, None or at most 1 for no temperature.
    mscale_all_dim: strength of the temperature; 0 turns it off.
  """
  m = 1.0
  if factor is not None and factor > 1:
    m = 0.1 * mscale_all_dim * math.log(factor) + 1.0
  return qk_head_dim**-0.5 * m * m


def apply(
  x: Float[Array, 'B T *H R'],
  positions_BT: Int[Array, 'B T'],
  inv_freq: Float[Array, ' r'],
  *,
  interleaved: bool,
) -> Float[Array, 'B T *H R']:
  """Rotates every channel pair of `x` by position * frequency.

  Args:
    x: [B, T, H, R] or [B, T, R] (one shared head), any float type.
    positions_BT: position of each token in its document.
    inv_freq: [R / 2] from `inverse_frequencies`.
    interleaved: pairs are (x_2i, x_2i+1) if true (MLA), (x_i, x_{i+R/2}) if
      false (indexer). The output keeps the layout of the input.

  Returns:
    The rotated array in x's type; the rotation itself runs in float32.

  Raises:
    ValueError: `inv_freq` does not hold R / 2 frequencies.
  """
  num_pairs = inv_freq.shape[0]
  if x.shape[-1] != 2 * num_pairs:
    raise ValueError(
      f'x.shape={x.shape} needs {x.shape[-1] / 2:g} frequencies, '
      f'inv_freq has {num_pairs}'
    )
  head_axes = tuple(range(2, x.ndim - 1))
  angles = (
    positions_BT[:, :, None].astype(jnp.float32) * inv_freq[None, None, :]
  )
  cos = jnp.expand_dims(jnp.cos(angles), head_axes)
  sin = jnp.expand_dims(jnp.sin(angles), head_axes)
  x_f32 = x.astype(jnp.float32)
  if interleaved:
    a, b = x_f32[..., 0::2], x_f32[..., 1::2]
  else:
    a, b = jnp.split(x_f32, 2, axis=-1)
  rotated = (a * cos - b * sin, b * cos + a * sin)
  if interleaved:
    out = jax.lax.reshape(jnp.stack(rotated, axis=-1), x.shape)
  else:
    out = jnp.concatenate(rotated, axis=-1)
  return out.astype(x.dtype)
