"""The 8-bit cache: its bytes, and attention that reads them."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import mosaic
from pallas_kernels.sparse_mla_attention import (
  api,
  fp8_cache,
  pallas_mosaic_gpu,
  reference,
  xla,
)
from pallas_kernels.sparse_mla_attention import config as config_lib
from tests.pallas_kernels import sparse_mla_attention_cases as cases
from tests.support import tolerances

_SCALE = 576**-0.5
# A NaN in every part of a row: e4m3's, float32's and bfloat16's.
_POISON = 0x7F


def _flash_mla_bytes(kv):
  """FlashMLA's quantiser in numpy: rows of its `V32_FP8Sparse` layout."""
  kv = np.asarray(kv, np.float32)
  blocks = kv[..., :512].reshape(*kv.shape[:-1], 4, 128)
  scales = np.maximum(np.abs(blocks).max(-1) / np.float32(448), 1e-4)
  scales = np.exp2(np.ceil(np.log2(scales.astype(float)))).astype('<f4')
  values = (blocks / scales[..., None]).astype(ml_dtypes.float8_e4m3fn)
  rope = kv[..., 512:].astype(ml_dtypes.bfloat16)
  parts = [values.reshape(*kv.shape[:-1], 512), scales, rope]
  return np.concatenate([x.view(np.uint8) for x in parts], axis=-1)


def _inputs(key, *, batch, num_keys, num_heads, topk, num_queries=1):
  spec = cases.spec_of(
    batch=batch,
    num_queries=num_queries,
    num_keys=num_keys,
    num_heads=num_heads,
    latent_dim=512,
    rope_dim=64,
    topk=topk,
  )
  q, kv, _, indices = cases.inputs(key, spec)
  return q, pk.pack_fp8_cache(kv), indices


def _poisoned(cache, indices):
  """The cache with NaN in every row that no query selects."""
  selected = np.zeros(cache.shape[:2], bool)
  for b, t, k in np.argwhere(np.asarray(indices) >= 0):
    selected[b, indices[b, t, k]] = True
  assert not selected.all()
  return jnp.where(selected[..., None], cache, jnp.uint8(_POISON))


def _with_other_scales(cache):
  """The cache with scales that are no powers of two, as others write them."""
  cache = np.array(cache)
  scales = cache[..., 512:528].copy().view('<f4')
  scales *= np.linspace(0.55, 0.95, scales.size).reshape(scales.shape)
  cache[..., 512:528] = scales.astype('<f4').view(np.uint8)
  return jnp.asarray(cache)


def _in_float32(q, cache, indices):
  """Attention over the rows as the tensor cores get them, in bfloat16."""
  return cases.gathered(
    q,
    pk.unpack_fp8_cache(cache).astype(jnp.bfloat16),
    indices,
    latent_dim=512,
    scale=_SCALE,
  )


def test_fp8_cache_keeps_three_bits_of_latents_and_all_of_rope(key):
  kv = jax.random.normal(key, (2, 30, 576), jnp.bfloat16)
  kv = kv.at[0, 0].set(0)
  cache = pk.pack_fp8_cache(kv)
  assert cache.shape == (2, 30, 656)
  unpacked = np.asarray(pk.unpack_fp8_cache(cache))
  kv = np.asarray(kv, np.float32)
  np.testing.assert_array_equal(unpacked[..., 512:], kv[..., 512:])
  error = np.abs(unpacked - kv)[..., :512]
  blocks = np.abs(kv[..., :512]).reshape(2, 30, 4, 128).max(-1)
  # Half a step of 3 bits, or of the smallest step that the block's scale has.
  limit = np.maximum(
    np.abs(kv[..., :512]) / 16, np.repeat(blocks, 128, -1) / 448 / 512
  )
  assert np.all(error <= 1.001 * limit)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('magnitude', [1e-6, 1.0, 1e6])
def test_fp8_cache_bytes_equal_flash_mla(key, dtype, magnitude):
  spread = jnp.exp2(jnp.arange(40.0) / 4)[None, :, None]
  kv = magnitude * spread * jax.random.normal(key, (1, 40, 576))
  kv = kv.at[0, 0].set(0).at[0, 1, :128].set(448.0).astype(dtype)
  cache = np.asarray(jax.jit(pk.pack_fp8_cache)(kv))
  np.testing.assert_array_equal(cache, _flash_mla_bytes(kv))


def test_fp8_cache_latents_are_exact_in_bfloat16(key):
  unpacked = pk.unpack_fp8_cache(
    pk.pack_fp8_cache(jax.random.normal(key, (1, 20, 576)))
  )
  np.testing.assert_array_equal(
    unpacked, unpacked.astype(jnp.bfloat16).astype(jnp.float32)
  )


def test_fp8_cache_reads_the_documented_bytes():
  row = np.zeros(656, np.uint8)
  row[0], row[1], row[127], row[128] = 0x38, 0xC4, 0x01, 0x7E  # e4m3
  row[512:528] = np.array([3.0, 0.5, 1.0, 1.0], '<f4').view(np.uint8)
  row[528:530], row[654:656] = (0x80, 0x3F), (0x00, 0xC0)  # 1 and -2
  unpacked = np.asarray(pk.unpack_fp8_cache(jnp.asarray(row[None, None])))[0, 0]
  expected = np.zeros(576)
  expected[[0, 1, 127, 128]] = 3 * 1.0, 3 * -3.0, 3 * 2.0**-9, 0.5 * 448
  expected[[512, 575]] = 1.0, -2.0
  np.testing.assert_array_equal(unpacked, expected.astype(np.float32))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('block_queries', [None, 3])
def test_fp8_cache_xla_matches_reference(key, dtype, block_queries):
  q, cache, indices = _inputs(
    key, batch=3, num_queries=8, num_keys=70, num_heads=3, topk=24
  )
  q, cache = q.astype(dtype), _with_other_scales(cache)
  config = block_queries and config_lib.XlaConfig(
    form='gather',
    block_queries=block_queries,
    block_keys=1,
    sorted_scatter=False,
  )
  actual = jax.jit(
    functools.partial(
      xla.sparse_mla_attention_fp8_cache, scale=_SCALE, config=config
    )
  )(q, cache, indices)
  expected = reference.sparse_mla_attention_fp8_cache(
    q, cache, indices, scale=_SCALE
  )
  assert [x.dtype for x in actual] == [q.dtype, jnp.float32]
  tolerances.assert_close(actual, expected, dtype=dtype)


@pytest.mark.parametrize('implementation', [None, 'xla', 'reference'])
def test_fp8_cache_public_call_matches_unpacked_rows(key, implementation):
  q, cache, indices = _inputs(
    key, batch=2, num_queries=4, num_keys=30, num_heads=2, topk=9
  )
  q = q.astype(jnp.float32)
  output = pk.sparse_mla_attention_fp8_cache(
    q, cache, indices, scale=_SCALE, implementation=implementation
  )
  expected = reference.sparse_mla_attention(
    q, pk.unpack_fp8_cache(cache), indices, latent_dim=512, scale=_SCALE
  )
  tolerances.assert_close((output.out_BTHC, output.lse_BTH), expected)


def test_fp8_cache_xla_unselected_bytes_have_no_influence(key):
  q, cache, indices = _inputs(
    key, batch=2, num_queries=5, num_keys=200, num_heads=2, topk=20
  )
  # The row that -1 reads is among those poisoned.
  indices = jnp.where(indices == 0, -1, indices)
  attend = jax.jit(
    functools.partial(xla.sparse_mla_attention_fp8_cache, scale=_SCALE)
  )
  expected = attend(q, cache, indices)
  actual = attend(q, _poisoned(cache, indices), indices)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_fp8_cache_xla_row_without_keys_is_zero(key):
  q, cache, indices = _inputs(
    key, batch=2, num_queries=4, num_keys=30, num_heads=2, topk=9
  )
  out, lse = xla.sparse_mla_attention_fp8_cache(q, cache, indices, scale=1.0)
  empty = np.all(np.asarray(indices) < 0, axis=-1)
  assert empty.any()
  assert not empty.all()
  assert np.all(np.asarray(out)[empty] == 0)
  assert np.all(np.asarray(lse)[empty] == -np.inf)
  assert np.all(np.isfinite(np.asarray(lse)[~empty]))


def test_fp8_cache_xla_mask_form_raises(key):
  q, cache, indices = _inputs(key, batch=1, num_keys=8, num_heads=1, topk=4)
  config = config_lib.XlaConfig(
    form='mask', block_queries=1, block_keys=8, sorted_scatter=False
  )
  with pytest.raises(ValueError, match="form='mask'"):
    xla.sparse_mla_attention_fp8_cache(
      q, cache, indices, scale=1.0, config=config
    )


def test_fp8_cache_gradient_raises(key):
  q, cache, indices = _inputs(key, batch=1, num_keys=8, num_heads=1, topk=4)

  def loss(q):
    output = pk.sparse_mla_attention_fp8_cache(q, cache, indices, scale=1.0)
    return jnp.sum(output.out_BTHC)

  with pytest.raises(NotImplementedError, match='has no gradients'):
    jax.grad(loss)(q.astype(jnp.float32))


def _unchecked(function):
  # Types and sizes are checked by jaxtyping first where it is switched on.
  return getattr(function, '__wrapped__', function)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'q': (1, 2, 4, 512)}, 'X=576'),
    ({'q_dtype': jnp.float16}, 'float16'),
    ({'cache': (1, 8, 576)}, '656'),
    ({'cache': (2, 8, 656)}, 'share B'),
    ({'cache_dtype': jnp.int8}, 'must be uint8'),
    ({'indices': (1, 3, 4)}, 'share B and T'),
    ({'indices': (1, 2, 0)}, 'must not be empty'),
    ({'cache': (8, 656)}, '3 dimensions'),
  ],
)
def test_fp8_cache_bad_arguments_raise(change, message):
  with pytest.raises(ValueError, match=message):
    _unchecked(api.sparse_mla_attention_fp8_cache)(
      jnp.zeros(
        change.get('q', (1, 2, 4, 576)), change.get('q_dtype', jnp.bfloat16)
      ),
      jnp.zeros(
        change.get('cache', (1, 8, 656)), change.get('cache_dtype', jnp.uint8)
      ),
      jnp.zeros(change.get('indices', (1, 2, 4)), jnp.int32),
      scale=1.0,
    )


def test_fp8_cache_packing_bad_arguments_raise():
  pack = _unchecked(fp8_cache.pack_fp8_cache)
  with pytest.raises(ValueError, match='576'):
    pack(jnp.zeros((1, 2, 512)))
  with pytest.raises(ValueError, match='int32'):
    pack(jnp.zeros((1, 2, 576), jnp.int32))
  with pytest.raises(ValueError, match='656'):
    _unchecked(fp8_cache.unpack_fp8_cache)(jnp.zeros((1, 2, 576), jnp.uint8))


@cases.needs_api
def test_fp8_cache_mosaic_interpreted_matches_float32(key):
  q, cache, indices = _inputs(key, batch=2, num_keys=40, num_heads=8, topk=64)
  cache = _with_other_scales(cache)
  actual = pallas_mosaic_gpu.sparse_mla_attention_fp8_cache(
    q,
    _poisoned(cache, indices),
    indices,
    scale=_SCALE,
    target=mosaic.Target.INTERPRET,
  )
  assert np.any(np.asarray(indices) < 0)
  assert np.any(np.all(np.asarray(indices) < 0, axis=-1))
  cases.assert_close(actual, _in_float32(q, cache, indices))


@cases.needs_api
def test_fp8_cache_mosaic_lowers_for_cuda():
  attend = functools.partial(
    pallas_mosaic_gpu.sparse_mla_attention_fp8_cache,
    scale=_SCALE,
    target=mosaic.Target.LOWER,
  )
  arguments = (
    jax.ShapeDtypeStruct((8, 1, 128, 576), jnp.bfloat16),
    jax.ShapeDtypeStruct((8, 3000, 656), jnp.uint8),
    jax.ShapeDtypeStruct((8, 1, 2048), jnp.int32),
  )
  traced = jax.jit(attend).trace(*arguments)
  text = traced.lower(lowering_platforms=('cuda',)).as_text()
  assert 'sparse_mla_attention_forward' in text


@pytest.mark.gpu
@pytest.mark.parametrize('scales', ['ours', 'others'])
def test_fp8_cache_mosaic_on_hopper_matches_float32(key, scales):
  q, cache, indices = _inputs(
    key, batch=32, num_keys=3000, num_heads=128, topk=2048
  )
  if scales == 'others':
    cache = _with_other_scales(cache)
  desired = _in_float32(q, cache, indices)

  @jax.jit
  def attend(q, cache, indices):
    return pk.sparse_mla_attention_fp8_cache(
      q, cache, indices, scale=_SCALE, implementation='mosaic_gpu'
    )

  output = attend(q, _poisoned(cache, indices), indices)
  cases.assert_close((output.out_BTHC, output.lse_BTH), desired)
