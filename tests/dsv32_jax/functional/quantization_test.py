"""FP8 goldens, edge blocks, and the Hadamard rotation."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv32_jax.functional import quantization
from tests.support import tolerances


def _sylvester(n: int) -> np.ndarray:
  matrix = np.ones((1, 1))
  while matrix.shape[0] < n:
    matrix = np.block([[matrix, matrix], [matrix, -matrix]])
  return matrix / np.sqrt(n)


@pytest.mark.parametrize('dim', [1, 2, 16, 128])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_hadamard_rotation_matches_sylvester_matrix(key, dim, dtype):
  x = jax.random.normal(key, (3, 4, dim), dtype)
  actual = quantization.hadamard_rotation(x)
  desired = np.asarray(x.astype(jnp.float32), np.float64) @ _sylvester(dim)
  assert actual.dtype == x.dtype
  tolerances.assert_close(actual, desired, dtype=dtype)


def test_hadamard_rotation_on_both_sides_keeps_dot_products(key):
  q, k = jax.random.normal(key, (2, 64, 128))
  rotate = quantization.hadamard_rotation
  tolerances.assert_close(rotate(q) @ rotate(k).T, q @ k.T)
  one_sided = rotate(q) @ k.T
  assert np.abs(one_sided - q @ k.T).max() > 1.0


def test_hadamard_rotation_of_odd_width_is_refused():
  with pytest.raises(ValueError, match='power of two'):
    quantization.hadamard_rotation(jnp.zeros((2, 96)))


@pytest.mark.parametrize(
  ('amax', 'scale'),
  [
    (0.0, 2.0**-22),
    (1e-4, 2.0**-22),
    (1.0, 2.0**-8),
    (3.5, 2.0**-7),
    (448.0, 1.0),
    (449.0, 2.0),
  ],
)
def test_block_scale_ue8m0_matches_goldens(amax, scale):
  actual = jax.jit(quantization.block_scale)(jnp.float32(amax))
  assert float(actual) == scale


def test_block_scale_float32_is_the_quotient():
  actual = quantization.block_scale(
    jnp.array([0.0, 3.5, 449.0]), scale_format='float32'
  )
  np.testing.assert_allclose(
    actual, np.array([1e-4, 3.5, 449.0]) / 448, rtol=1e-6
  )


def _quantize_oracle(x, block):
  """Block by block in numpy, with ml_dtypes' cast."""
  x = np.asarray(x, np.float32)
  values = np.zeros(x.shape, ml_dtypes.float8_e4m3fn)
  rows, columns = -(-x.shape[0] // block[0]), -(-x.shape[1] // block[1])
  scale = np.zeros((rows, columns), np.float32)
  for i in range(rows):
    for j in range(columns):
      at = (
        slice(i * block[0], (i + 1) * block[0]),
        slice(j * block[1], (j + 1) * block[1]),
      )
      amax = max(np.abs(x[at]).max(), 1e-4)
      scale[i, j] = 2.0 ** np.ceil(np.log2(np.float64(amax) / 448))
      values[at] = np.clip(x[at] / scale[i, j], -448, 448).astype(values.dtype)
  return values, scale


@pytest.mark.parametrize('block', [(1, 128), (128, 128), (16, 48)])
def test_quantize_with_edge_blocks_matches_numpy(key, block):
  # 576 rows is kv_a_proj_with_mqa: 4.5 blocks of 128.
  x = jax.random.normal(key, (576, 200)) * jnp.linspace(0.01, 9.0, 200)[None]
  trailing = block if block[0] > 1 else block[1:]
  actual = quantization.quantize(x, block=trailing)
  values, scale = _quantize_oracle(x, block)
  assert actual.values.dtype == jnp.float8_e4m3fn
  np.testing.assert_array_equal(
    actual.values.astype(jnp.float32), values.astype(np.float32)
  )
  np.testing.assert_array_equal(actual.scale, scale)


def test_dequantize_576_rows_multiplies_by_the_block_scale():
  values = jnp.ones((576, 130), jnp.float8_e4m3fn)
  scale = jnp.arange(10, dtype=jnp.float32).reshape(5, 2)
  quantized = quantization.QuantizedArray(values, scale, block=(128, 128))
  actual = np.asarray(quantization.dequantize(quantized))
  i, j = np.indices((576, 130)) // 128
  np.testing.assert_array_equal(actual, 2 * i + j)


def test_dequantize_scale_of_another_shape_is_refused():
  quantized = quantization.QuantizedArray(
    jnp.ones((576, 130), jnp.float8_e4m3fn), jnp.ones((4, 2)), (128, 128)
  )
  with pytest.raises(ValueError, match=r'must be \(5, 2\)'):
    quantization.dequantize(quantized)


def test_fake_quantize_largest_magnitude_survives_in_every_format():
  amax = np.linspace(0.1, 2000, 4001, dtype=np.float32)
  x = jnp.asarray(np.stack([amax, -amax], axis=1))
  for scale_format in quantization.SCALE_FORMATS:
    out = quantization.fake_quantize(x, block=(2,), scale_format=scale_format)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out, x, rtol=0.07)


def test_to_e4m3_beyond_the_range_saturates():
  # The unclipped cast gives NaN here.
  assert np.isnan(np.float32(500).astype(ml_dtypes.float8_e4m3fn))
  clipped = quantization.to_e4m3(jnp.array([500.0, -1e9, 3.0]))
  assert clipped.astype(jnp.float32).tolist() == [448.0, -448.0, 3.0]


def test_fake_quantize_is_idempotent_and_passes_gradients(key):
  x = jax.random.normal(key, (4, 200), jnp.bfloat16)
  once = quantization.fake_quantize(x)
  assert once.dtype == x.dtype
  assert np.any(once != x)
  np.testing.assert_array_equal(quantization.fake_quantize(once), once)
  gradient = jax.jit(
    jax.grad(lambda x: jnp.sum(3 * quantization.fake_quantize(x)))
  )(x)
  np.testing.assert_array_equal(gradient.astype(jnp.float32), 3.0)


@pytest.mark.parametrize(
  ('block', 'scale_format', 'message'),
  [
    ((0,), 'ue8m0', r'block=\(0,\)'),
    ((1, 2, 3), 'ue8m0', 'at most one'),
    ((4,), 'e5m2', "scale_format='e5m2'"),
  ],
)
def test_quantize_impossible_arguments_are_refused(
  block, scale_format, message
):
  with pytest.raises(ValueError, match=message):
    quantization.quantize(
      jnp.ones((4, 4)), block=block, scale_format=scale_format
    )


def test_dequantize_blocks_along_one_dim_of_a_weight_with_heads():
  """As w_uq is kept: blocks of 128 rows, a scale for each head's column."""
  values = jnp.ones((2, 200, 3, 5), jnp.float8_e4m3fn)
  scale = jnp.arange(60, dtype=jnp.float32).reshape(2, 2, 3, 5)
  quantized = quantization.QuantizedArray(values, scale, block=(128, 1, 1))
  layer, row, head, column = np.indices(values.shape)
  desired = np.asarray(scale)[layer, row // 128, head, column]
  np.testing.assert_array_equal(quantization.dequantize(quantized), desired)
  assert (quantized.shape, quantized.ndim) == ((2, 200, 3, 5), 4)
