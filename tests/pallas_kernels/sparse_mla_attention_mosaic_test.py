"""The Mosaic GPU kernels: interpreted and lowered here, run on a Hopper GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic
from pallas_kernels.sparse_mla_attention import (
  arg_specs,
  mosaic_fp8,
  pallas_mosaic_gpu,
  reference,
)
from pallas_kernels.sparse_mla_attention import config as config_lib

needs_api = pytest.mark.skipif(
  not mosaic.has_api(), reason='needs the Mosaic GPU API of jax 0.11'
)

# Relative norms; bfloat16 keeps 8 bits, 2e-3 of an element on average.
_VALUE_ERROR = 4e-3
_GRADIENT_ERROR = 1e-2


def _spec(**sizes):
  return arg_specs.ArgSpec(dtype='bfloat16', **sizes)


CONFIGS = {
  'in_turns': config_lib.MosaicConfig(overlapped=False, full_lines=False),
  'overlapped': config_lib.MosaicConfig(),
}
TINY = _spec(
  batch=2,
  num_queries=1,
  num_keys=72,
  num_heads=8,
  latent_dim=128,
  rope_dim=32,
  topk=64,
)
HOPPER_SPECS = {
  'v32': _spec(
    batch=1,
    num_queries=96,
    num_keys=4096,
    num_heads=128,
    latent_dim=512,
    rope_dim=64,
    topk=2048,
  ),
  'batched': _spec(
    batch=3,
    num_queries=37,
    num_keys=1000,
    num_heads=16,
    latent_dim=512,
    rope_dim=64,
    topk=192,
  ),
  'small': _spec(
    batch=2,
    num_queries=40,
    num_keys=700,
    num_heads=64,
    latent_dim=256,
    rope_dim=32,
    topk=512,
  ),
  'mini': _spec(
    batch=1,
    num_queries=130,
    num_keys=300,
    num_heads=8,
    latent_dim=128,
    rope_dim=32,
    topk=256,
  ),
  'decode': _spec(
    batch=8,
    num_queries=1,
    num_keys=3000,
    num_heads=128,
    latent_dim=512,
    rope_dim=64,
    topk=2048,
  ),
}


def _inputs(key, spec, *, magnitude=1.0):
  keys = jax.random.split(key, 4)
  width = spec.latent_dim + spec.rope_dim
  rows = (spec.batch, spec.num_queries, spec.num_heads)
  q = magnitude * jax.random.normal(keys[0], (*rows, width), spec.dtype)
  shape = (spec.batch, spec.num_keys, width)
  kv = jax.random.normal(keys[1], shape, spec.dtype)
  d_out = jax.random.normal(keys[2], (*rows, spec.latent_dim), spec.dtype)
  return q, kv, d_out, _selection(keys[3], spec)


def _selection(key, spec):
  """Rows of every length, empty ones too, -1 in between."""
  seed = int(jax.random.randint(key, (), 0, 2**30))
  rng = np.random.default_rng(seed)
  shape = (spec.batch, spec.num_queries, spec.topk)
  indices = np.full(shape, -1, np.int32)
  for number, (b, t) in enumerate(np.ndindex(*shape[:2])):
    most = min(spec.topk, spec.num_keys)
    count = (most, 0, 1, int(rng.integers(most)))[number % 4]
    chosen = rng.choice(spec.num_keys, count, replace=False)
    row = np.concatenate([chosen, np.full(spec.topk - count, -1)])
    indices[b, t] = rng.permutation(row)
  return jnp.asarray(indices)


def _gathered(q, kv, indices, *, latent_dim, scale):
  """`reference` on the selected rows only: it fits at real sizes.

  A key that is named twice counts twice, as in the kernels.
  """
  q, kv = q.astype(jnp.float32), kv.astype(jnp.float32)
  rows = jax.vmap(lambda rows, i: rows[jnp.maximum(i, 0)])(kv, indices)
  scores = scale * jnp.einsum('bthx,btkx->bthk', q, rows, precision='highest')
  scores = jnp.where((indices >= 0)[:, :, None], scores, -jnp.inf)
  highest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
  highest = jnp.where(highest == -jnp.inf, 0.0, highest)
  p = jnp.exp(scores - highest)
  total = jnp.sum(p, axis=-1, keepdims=True)
  p /= jnp.where(total == 0, 1.0, total)
  out = jnp.einsum(
    'bthk,btkc->bthc', p, rows[..., :latent_dim], precision='highest'
  )
  return out, (highest + jnp.log(total))[..., 0]


def _values_and_gradients(function, spec, q, kv, indices, d_out):
  attend = functools.partial(
    function, latent_dim=spec.latent_dim, scale=spec.scale
  )
  (out, lse), pullback = jax.vjp(lambda q, kv: attend(q, kv, indices), q, kv)
  return out, lse, *pullback((d_out.astype(out.dtype), jnp.zeros_like(lse)))


def _relative_error(actual, desired):
  actual, desired = np.asarray(actual, float), np.asarray(desired, float)
  assert np.all(np.isfinite(actual))
  return np.linalg.norm(actual - desired) / np.linalg.norm(desired)


def _assert_close(actual, desired):
  out, lse, *gradients = actual
  desired_out, desired_lse, *desired_gradients = desired
  assert _relative_error(out, desired_out) < _VALUE_ERROR
  lse, desired_lse = np.asarray(lse), np.asarray(desired_lse)
  np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(desired_lse))
  finite = np.isfinite(desired_lse)
  np.testing.assert_allclose(
    lse[finite], desired_lse[finite], atol=1e-4, rtol=1e-4
  )
  for x, y in zip(gradients, desired_gradients, strict=True):
    assert _relative_error(x, y) < _GRADIENT_ERROR


def _float32(*arrays):
  return tuple(x.astype(jnp.float32) for x in arrays)


@needs_api
@pytest.mark.parametrize('config', CONFIGS)
def test_mosaic_interpreted_matches_reference(key, config):
  q, kv, d_out, indices = _inputs(key, TINY)
  kernel = functools.partial(
    pallas_mosaic_gpu.sparse_mla_attention,
    config=CONFIGS[config],
    target=mosaic.Target.INTERPRET,
  )
  actual = _values_and_gradients(kernel, TINY, q, kv, indices, d_out)
  desired = _values_and_gradients(
    reference.sparse_mla_attention,
    TINY,
    *_float32(q, kv),
    indices,
    *_float32(d_out),
  )
  _assert_close(actual, desired)


@needs_api
def test_mosaic_interpreted_split_keys_match_reference(key):
  q, kv, _, indices = _inputs(key, TINY)
  sizes = {'latent_dim': TINY.latent_dim, 'scale': TINY.scale}
  actual = pallas_mosaic_gpu.sparse_mla_attention(
    q,
    kv,
    indices,
    config=config_lib.MosaicConfig(splits=2),
    target=mosaic.Target.INTERPRET,
    **sizes,
  )
  desired = reference.sparse_mla_attention(*_float32(q, kv), indices, **sizes)
  _assert_close(actual, desired)


@needs_api
@pytest.mark.parametrize('config', CONFIGS)
def test_mosaic_interpreted_has_no_races(key, config):
  spec = _spec(
    batch=1,
    num_queries=1,
    num_keys=40,
    num_heads=8,
    latent_dim=128,
    rope_dim=32,
    topk=192,
  )
  q, kv, d_out, indices = _inputs(key, spec)
  kernel = functools.partial(
    pallas_mosaic_gpu.sparse_mla_attention,
    config=CONFIGS[config],
    target=mosaic.Target.INTERPRET_RACES,
  )
  if config == 'in_turns':
    actual = _values_and_gradients(kernel, spec, q, kv, indices, d_out)
  else:  # The backward kernel is the same, when it is interpreted.
    actual = kernel(
      q, kv, indices, latent_dim=spec.latent_dim, scale=spec.scale
    )
  desired = _values_and_gradients(
    _gathered, spec, *_float32(q, kv), indices, *_float32(d_out)
  )
  _assert_close(actual, desired[: len(actual)])


def _fp8_inputs(key, *, batch, num_keys, num_heads, topk):
  spec = _spec(
    batch=batch,
    num_queries=1,
    num_keys=num_keys,
    num_heads=num_heads,
    latent_dim=512,
    rope_dim=64,
    topk=topk,
  )
  q, kv, _, indices = _inputs(key, spec)
  cache = mosaic_fp8.pack(kv)
  desired = functools.partial(
    _gathered, latent_dim=spec.latent_dim, scale=spec.scale
  )(q, mosaic_fp8.unpack(cache).astype(jnp.bfloat16), indices)
  return q, cache, indices, spec.scale, desired


def test_fp8_cache_keeps_three_bits_of_latents_and_all_of_rope(key):
  kv = jax.random.normal(key, (2, 30, 576), jnp.bfloat16)
  kv = kv.at[0, 0].set(0)
  cache = mosaic_fp8.pack(kv)
  assert cache.shape == (2, 30, 656)
  unpacked = np.asarray(mosaic_fp8.unpack(cache))
  kv = np.asarray(kv, np.float32)
  np.testing.assert_array_equal(unpacked[..., 512:], kv[..., 512:])
  error = np.abs(unpacked - kv)[..., :512]
  blocks = np.abs(kv[..., :512]).reshape(2, 30, 4, 128).max(-1)
  # Half a step of 3 bits, or of the smallest step that the block's scale has.
  limit = np.maximum(
    np.abs(kv[..., :512]) / 16, np.repeat(blocks, 128, -1) / 448 / 512
  )
  assert np.all(error <= 1.001 * limit)


@needs_api
def test_mosaic_fp8_interpreted_matches_unpacked_cache(key):
  q, cache, indices, scale, desired = _fp8_inputs(
    key, batch=2, num_keys=40, num_heads=8, topk=64
  )
  out, lse = pallas_mosaic_gpu.attend_to_fp8_cache(
    q, cache, indices, scale=scale, target=mosaic.Target.INTERPRET
  )
  _assert_close((out, lse), desired)


@pytest.mark.gpu
def test_mosaic_fp8_on_hopper_matches_unpacked_cache(key):
  q, cache, indices, scale, desired = _fp8_inputs(
    key, batch=32, num_keys=3000, num_heads=128, topk=2048
  )
  attend = functools.partial(pallas_mosaic_gpu.attend_to_fp8_cache, scale=scale)
  _assert_close(jax.jit(attend)(q, cache, indices), desired)


@needs_api
@pytest.mark.parametrize('config', CONFIGS)
@pytest.mark.parametrize('name', HOPPER_SPECS)
def test_mosaic_lowers_for_cuda(name, config):
  spec = HOPPER_SPECS[name]
  kernel = functools.partial(
    pallas_mosaic_gpu.sparse_mla_attention,
    config=CONFIGS[config],
    target=mosaic.Target.LOWER,
  )
  width = spec.latent_dim + spec.rope_dim
  rows = (spec.batch, spec.num_queries, spec.num_heads)
  shapes = (
    ((*rows, width), jnp.bfloat16),
    ((spec.batch, spec.num_keys, width), jnp.bfloat16),
    ((spec.batch, spec.num_queries, spec.topk), jnp.int32),
    ((*rows, spec.latent_dim), jnp.bfloat16),
  )

  def both(q, kv, indices, d_out):
    return _values_and_gradients(kernel, spec, q, kv, indices, d_out)

  arguments = [jax.ShapeDtypeStruct(*x) for x in shapes]
  lowered = jax.jit(both).trace(*arguments).lower(lowering_platforms=('cuda',))
  text = lowered.as_text()
  assert 'sparse_mla_attention_forward' in text
  assert 'sparse_mla_attention_backward' in text


@needs_api
@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'latent_dim': 96}, 'latent_dim=96'),
    ({'rope_dim': 128}, 'rope width of 128'),
    ({'dtype': 'float32'}, 'float32'),
  ],
)
def test_mosaic_unsupported_inputs_raise(change, message):
  sizes = {'latent_dim': 128, 'rope_dim': 32, 'dtype': 'bfloat16'} | change
  width = sizes['latent_dim'] + sizes['rope_dim']
  with pytest.raises(NotImplementedError, match=message):
    pallas_mosaic_gpu.sparse_mla_attention(
      jnp.zeros((1, 2, 8, width), sizes['dtype']),
      jnp.zeros((1, 4, width), sizes['dtype']),
      jnp.zeros((1, 2, 64), jnp.int32),
      latent_dim=sizes['latent_dim'],
      scale=1.0,
      target=mosaic.Target.LOWER,
    )


def test_key_splits_fill_the_gpu_with_few_queries():
  def splits(num_rows, topk=2048):
    return config_lib.key_splits(num_rows, 128, topk, 132)

  assert splits(4096) == 1
  assert splits(33) == 2
  assert splits(8) == 8
  assert splits(1) == 16
  assert splits(1, topk=256) == 2


@pytest.mark.gpu
@pytest.mark.parametrize('config', CONFIGS)
@pytest.mark.parametrize('name', HOPPER_SPECS)
def test_mosaic_on_hopper_matches_float32(key, name, config):
  spec = HOPPER_SPECS[name]
  q, kv, d_out, indices = _inputs(key, spec)
  actual = _on_hopper(spec, config, q, kv, indices, d_out)
  desired = _in_float32(spec, q, kv, indices, d_out)
  _assert_close(actual, desired)


@pytest.mark.gpu
@pytest.mark.parametrize('overlapped', [False, True])
def test_mosaic_on_hopper_split_keys_match_float32(key, overlapped):
  spec = HOPPER_SPECS['decode']
  q, kv, _, indices = _inputs(key, spec)
  sizes = {'latent_dim': spec.latent_dim, 'scale': spec.scale}
  attend = functools.partial(
    pallas_mosaic_gpu.sparse_mla_attention,
    config=config_lib.MosaicConfig(splits=8, overlapped=overlapped),
    **sizes,
  )
  desired = _gathered(q, kv, indices, **sizes)
  _assert_close(jax.jit(attend)(q, kv, indices), desired)


@pytest.mark.gpu
@pytest.mark.parametrize('config', CONFIGS)
@pytest.mark.parametrize('case', ['huge', 'plateau', 'duplicates', 'empty'])
def test_mosaic_on_hopper_adversarial_matches_float32(key, case, config):
  spec = HOPPER_SPECS['batched']
  q, kv, d_out, indices = _inputs(key, spec)
  if case == 'huge':
    q = 100 * q
  elif case == 'plateau':
    q = jnp.zeros_like(q)
  elif case == 'duplicates':
    indices = jnp.where(indices < 0, -1, indices % 3)
  else:
    indices = jnp.full_like(indices, -1)
  actual = _on_hopper(spec, config, q, kv, indices, d_out)
  if case == 'empty':
    out, lse, *gradients = actual
    assert np.all(np.isneginf(np.asarray(lse)))
    for x in (out, *gradients):
      assert not np.any(np.asarray(x, float))
    return
  desired = _in_float32(spec, q, kv, indices, d_out)
  if case == 'huge':
    # Each row has one key left, and d_p - delta is rounding alone.
    actual, desired = list(actual), list(desired)
    assert np.all(np.isfinite(np.asarray(actual.pop(2), float)))
    del desired[2]
  _assert_close(actual, desired)


def _on_hopper(spec, config, *arrays):
  return _compiled(_kernel(config), spec)(*arrays)


def _in_float32(spec, q, kv, indices, d_out):
  q, kv, d_out = _float32(q, kv, d_out)
  return _compiled(_gathered, spec)(q, kv, indices, d_out)


@functools.cache
def _kernel(config):
  return functools.partial(
    pallas_mosaic_gpu.sparse_mla_attention, config=CONFIGS[config]
  )


@functools.cache
def _compiled(function, spec):
  return jax.jit(functools.partial(_values_and_gradients, function, spec))
