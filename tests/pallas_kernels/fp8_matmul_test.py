"""Tests of the float8 matrix product: every implementation, the kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic
from pallas_kernels.fp8_matmul import api, fp8_matmul, pallas_mosaic_gpu
from pallas_kernels.lightning_indexer import quantization

needs_api = pytest.mark.skipif(
  not mosaic.has_api(), reason='Mosaic GPU kernels need jax 0.11'
)


def make(rows, depth, outputs, *, seed=0, dtype=jnp.bfloat16):
  """(x_MK, w_OK, w_scale_GO) in groups of 128."""
  names = jax.random.split(jax.random.key(seed))
  x = jax.random.normal(names[0], (rows, depth), dtype)
  w = jax.random.normal(names[1], (outputs, depth // 128, 128))
  values, scale = quantization.quantize(w)
  return x, values.reshape(outputs, depth), scale.T


def desired_product(x, w, w_scale, *, power_of_two=True):
  """In float64, of the rounded values."""
  groups = len(w_scale)
  x8, x_scale = quantization.quantize(
    x.reshape(len(x), groups, -1), power_of_two=power_of_two
  )
  x8, x_scale, w8, w_scale = (
    np.asarray(a.astype(jnp.float32)).astype(np.float64)
    for a in (x8, x_scale, w.reshape(len(w), groups, -1), w_scale)
  )
  scaled = x8 * x_scale[..., None], w8 * w_scale.T[..., None]
  return np.einsum('mgk,ogk->mo', *scaled)


def assert_norm(actual, desired, *, limit):
  actual = np.asarray(actual, np.float32)
  error = np.linalg.norm(actual - desired)
  assert error <= limit * np.linalg.norm(desired), error


@pytest.mark.parametrize('name', ['xla', 'reference'])
@pytest.mark.parametrize('scale_format', ['ue8m0', 'float32'])
def test_product_is_the_float64_one_of_the_rounded_values(name, scale_format):
  arrays = make(7, 384, 40, dtype=jnp.float32)
  y = fp8_matmul(*arrays, scale_format=scale_format, implementation=name)
  desired = desired_product(*arrays, power_of_two=scale_format == 'ue8m0')
  assert_norm(y, desired, limit=1e-6)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'x_MK': jnp.ones((2, 128), jnp.float16)}, 'x_MK is float16'),
    ({'w_OK': jnp.ones((64, 128))}, 'w_OK is float32'),
    ({'w_scale_GO': jnp.ones((3, 64))}, r'w_scale_GO is float32\[3, 64\]'),
    ({'scale_format': 'e8m0'}, "scale_format='e8m0'"),
  ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
  x, w, w_scale = make(2, 128, 64)
  arguments = {'x_MK': x, 'w_OK': w, 'w_scale_GO': w_scale}
  arguments |= {'scale_format': 'ue8m0', **change}
  with pytest.raises(ValueError, match=message):
    api.check_arguments(**arguments)


# Five rows as in decoding, and more than one tile of them.
@needs_api
@pytest.mark.parametrize('rows', [5, pytest.param(130, marks=pytest.mark.slow)])
def test_kernel_interpreted_matches_float64_and_has_no_races(rows):
  arrays = make(rows, 384, 128)
  y = pallas_mosaic_gpu.fp8_matmul(
    *arrays,
    power_of_two=True,
    out_dtype=jnp.bfloat16,
    target=mosaic.Target.INTERPRET_RACES,
  )
  assert y.shape == (rows, 128)
  assert_norm(y, desired_product(*arrays), limit=2.5e-3)


@needs_api
@pytest.mark.parametrize(
  ('rows', 'depth', 'outputs'),
  [(16, 16384, 7168), (4096, 1536, 24576), (4096, 7168, 576)],
)
def test_kernel_lowers_for_cuda(rows, depth, outputs):
  run = functools.partial(
    pallas_mosaic_gpu.fp8_matmul,
    power_of_two=True,
    out_dtype=jnp.bfloat16,
    target=mosaic.Target.LOWER,
  )
  traced = jax.jit(run).trace(
    jax.ShapeDtypeStruct((rows, depth), jnp.bfloat16),
    jax.ShapeDtypeStruct((outputs, depth), jnp.float8_e4m3fn),
    jax.ShapeDtypeStruct((depth // 128, outputs), jnp.float32),
  )
  text = traced.lower(lowering_platforms=('cuda',)).as_text()
  assert 'mosaic_gpu' in text


@needs_api
@pytest.mark.parametrize(
  ('depth', 'outputs', 'group', 'message'),
  [(192, 64, 64, '3 groups'), (256, 72, 128, '72 outputs')],
)
def test_kernel_refuses_what_it_does_not_support(
  depth, outputs, group, message
):
  arguments = (
    jnp.ones((4, depth), jnp.bfloat16),
    jnp.ones((outputs, depth), jnp.float8_e4m3fn),
    jnp.ones((depth // group, outputs)),
  )
  with pytest.raises(NotImplementedError, match=message):
    pallas_mosaic_gpu.fp8_matmul(
      *arguments,
      power_of_two=True,
      out_dtype=jnp.bfloat16,
      target=mosaic.Target.LOWER,
    )


@pytest.mark.gpu
@needs_api
@pytest.mark.parametrize('rows', [1, 16, 65, 300])
def test_kernel_on_gpu_matches_float64(rows):
  arrays = make(rows, 1536, 576)
  y = fp8_matmul(*arrays, implementation='mosaic_gpu')
  # Beside bfloat16, the product's own sums keep fewer bits than float32.
  assert_norm(y, desired_product(*arrays), limit=4e-3)
