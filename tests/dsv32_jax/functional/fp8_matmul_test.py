"""Tests of matrix products with FP8 weights, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.functional import fp8_matmul as fp8
from dsv32_jax.functional import quantization


def float64(x):
  return np.asarray(x.astype(jnp.float32)).astype(np.float64)


def rounded_rows(quantised, group):
  """What flat rows are quantised to, group by group."""
  scale = np.repeat(float64(quantised.scale), group, axis=1)
  return float64(quantised.values) * scale[:, : quantised.shape[1]]


@pytest.mark.parametrize(
  ('shape', 'contract_dims', 'block', 'group', 'scale_format'),
  [
    # A down-projection in blocks of 128 x 128, both ends of which are smaller.
    ((320, 192), 1, (128, 128), 128, 'ue8m0'),
    # An up-projection with heads, a scale a column.
    ((256, 3, 24), 1, (128, 1, 1), 128, 'float32'),
    # An output projection: a head is a block of the contraction.
    ((3, 128, 40), 2, (1, 128, 128), 128, 'ue8m0'),
    # Dimensions smaller than a block: two heads in one, and all of them.
    ((4, 16, 24), 2, (2, 128, 128), 32, 'ue8m0'),
    ((48, 24), 1, (128, 128), 48, 'float32'),
    # A block of two groups.
    ((512, 24), 1, (256, 1), 128, 'ue8m0'),
  ],
)
def test_fp8_matmul_is_the_float64_product_of_the_rounded_values(
  shape, contract_dims, block, group, scale_format
):
  contracted, outputs = shape[:contract_dims], shape[contract_dims:]
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 3, *contracted)), jnp.float32)
  w = jnp.asarray(rng.normal(size=shape), jnp.float32)

  @jax.jit  # Everything in one program: compiling takes longest.
  def run(x, w):
    options = {'scale_format': scale_format}
    weight = quantization.quantize(w, block=block, **options)
    rows = x.reshape(6, -1)
    return (
      fp8.fp8_matmul(x, weight, contract_dims=contract_dims, **options),
      quantization.quantize(rows, block=(group,), **options),
      quantization.dequantize(weight),
    )

  y, quantised, columns = run(x, w)
  assert y.shape == (2, 3, *outputs)
  rows = rounded_rows(quantised, group)
  desired = rows @ float64(columns).reshape(rows.shape[1], -1)
  error = np.linalg.norm(np.asarray(y).reshape(desired.shape) - desired)
  assert error < 1e-6 * np.linalg.norm(desired)
  # And close to what it stands for.
  plain = float64(x).reshape(rows.shape) @ float64(w).reshape(rows.shape[1], -1)
  error = np.linalg.norm(desired - plain)
  assert error < 0.06 * np.linalg.norm(plain)


def test_fp8_matmul_of_a_prepared_weight_is_the_same():
  rng = np.random.default_rng(2)
  x = jnp.asarray(rng.normal(size=(5, 256)), jnp.bfloat16)
  w = jnp.asarray(rng.normal(size=(256, 64)), jnp.float32)

  @jax.jit
  def run(x, w):
    weight = quantization.quantize(w, block=(128, 128))
    prepared = fp8.prepare(weight)
    return prepared, fp8.fp8_matmul(x, prepared), fp8.fp8_matmul(x, weight)

  prepared, y, same = run(x, w)
  assert prepared.values_OK.shape == (64, 256)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y, same)


def test_fp8_matmul_of_another_width_is_refused():
  weight = quantization.quantize(jnp.ones((256, 64)), block=(128, 128))
  with pytest.raises(ValueError, match=r'must end in \(256,\)'):
    fp8.fp8_matmul(jnp.ones((2, 128)), weight)
  with pytest.raises(ValueError, match='contract_dims=2'):
    fp8.prepare(weight, contract_dims=2)


def test_fp8_matmul_has_no_gradients():
  weight = quantization.quantize(jnp.ones((128, 64)), block=(128, 128))
  with pytest.raises(NotImplementedError, match='no gradients'):
    jax.grad(lambda x: jnp.sum(fp8.fp8_matmul(x, weight)))(jnp.ones((2, 128)))
