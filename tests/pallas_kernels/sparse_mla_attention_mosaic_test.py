"""The Mosaic GPU kernels: interpreted and lowered here, run on a Hopper GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic
from pallas_kernels.sparse_mla_attention import config as config_lib
from pallas_kernels.sparse_mla_attention import (
  pallas_mosaic_gpu,
  reference,
)
from tests.pallas_kernels import sparse_mla_attention_cases as cases

TINY = cases.spec_of(
  batch=2,
  num_queries=1,
  num_keys=72,
  num_heads=8,
  latent_dim=128,
  rope_dim=32,
  topk=64,
)
INTERPRETED_SPECS = {
  'tiny': TINY,
  # The backward kernel sums over two 64s of heads; warpgroups share columns.
  'many_heads': cases.spec_of(
    batch=1,
    num_queries=1,
    num_keys=40,
    num_heads=72,
    latent_dim=256,
    rope_dim=32,
    topk=60,
  ),
}
HOPPER_SPECS = {
  'v32': cases.spec_of(
    batch=1,
    num_queries=96,
    num_keys=4096,
    num_heads=128,
    latent_dim=512,
    rope_dim=64,
    topk=2048,
  ),
  'batched': cases.spec_of(
    batch=3,
    num_queries=37,
    num_keys=1000,
    num_heads=16,
    latent_dim=512,
    rope_dim=64,
    topk=192,
  ),
  'small': cases.spec_of(
    batch=2,
    num_queries=40,
    num_keys=700,
    num_heads=64,
    latent_dim=256,
    rope_dim=32,
    topk=512,
  ),
  'mini': cases.spec_of(
    batch=1,
    num_queries=130,
    num_keys=300,
    num_heads=8,
    latent_dim=128,
    rope_dim=32,
    topk=256,
  ),
  'many_heads': cases.spec_of(
    batch=2,
    num_queries=20,
    num_keys=400,
    num_heads=192,
    latent_dim=256,
    rope_dim=64,
    topk=200,
  ),
  'decode': cases.spec_of(
    batch=8,
    num_queries=1,
    num_keys=3000,
    num_heads=128,
    latent_dim=512,
    rope_dim=64,
    topk=2048,
  ),
}


@cases.needs_api
@pytest.mark.parametrize(
  'name', ['tiny', pytest.param('many_heads', marks=pytest.mark.slow)]
)
def test_mosaic_interpreted_matches_reference(key, name):
  spec = INTERPRETED_SPECS[name]
  q, kv, d_out, indices = cases.inputs(key, spec)
  kernel = functools.partial(
    pallas_mosaic_gpu.sparse_mla_attention,
    target=mosaic.Target.INTERPRET,
  )
  actual = cases.values_and_gradients(kernel, spec, q, kv, indices, d_out)
  desired = cases.values_and_gradients(
    reference.sparse_mla_attention,
    spec,
    *cases.float32(q, kv),
    indices,
    *cases.float32(d_out),
  )
  cases.assert_close(actual, desired)


@cases.needs_api
@pytest.mark.slow
def test_mosaic_interpreted_split_keys_match_reference(key):
  q, kv, _, indices = cases.inputs(key, TINY)
  sizes = {'latent_dim': TINY.latent_dim, 'scale': TINY.scale}
  actual = pallas_mosaic_gpu.sparse_mla_attention(
    q,
    kv,
    indices,
    config=config_lib.MosaicConfig(splits=2),
    target=mosaic.Target.INTERPRET,
    **sizes,
  )
  desired = reference.sparse_mla_attention(
    *cases.float32(q, kv), indices, **sizes
  )
  cases.assert_close(actual, desired)


@cases.needs_api
@pytest.mark.slow
def test_mosaic_interpreted_has_no_races(key):
  spec = cases.spec_of(
    batch=1,
    num_queries=1,
    num_keys=40,
    num_heads=8,
    latent_dim=128,
    rope_dim=32,
    topk=192,
  )
  q, kv, d_out, indices = cases.inputs(key, spec)
  kernel = functools.partial(
    pallas_mosaic_gpu.sparse_mla_attention,
    target=mosaic.Target.INTERPRET_RACES,
  )
  actual = cases.values_and_gradients(kernel, spec, q, kv, indices, d_out)
  desired = cases.values_and_gradients(
    cases.gathered, spec, *cases.float32(q, kv), indices, *cases.float32(d_out)
  )
  cases.assert_close(actual, desired)


@cases.needs_api
@pytest.mark.parametrize('name', HOPPER_SPECS)
def test_mosaic_lowers_for_cuda(name):
  spec = HOPPER_SPECS[name]
  kernel = functools.partial(
    pallas_mosaic_gpu.sparse_mla_attention,
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
    return cases.values_and_gradients(kernel, spec, q, kv, indices, d_out)

  arguments = [jax.ShapeDtypeStruct(*x) for x in shapes]
  lowered = jax.jit(both).trace(*arguments).lower(lowering_platforms=('cuda',))
  text = lowered.as_text()
  assert 'sparse_mla_attention_forward' in text
  assert 'sparse_mla_attention_backward' in text


@cases.needs_api
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
@pytest.mark.parametrize('name', HOPPER_SPECS)
def test_mosaic_on_hopper_matches_float32(key, name):
  spec = HOPPER_SPECS[name]
  q, kv, d_out, indices = cases.inputs(key, spec)
  actual = _on_hopper(spec, q, kv, indices, d_out)
  desired = _in_float32(spec, q, kv, indices, d_out)
  cases.assert_close(actual, desired)


@pytest.mark.gpu
def test_mosaic_on_hopper_split_keys_match_float32(key):
  spec = HOPPER_SPECS['decode']
  q, kv, _, indices = cases.inputs(key, spec)
  sizes = {'latent_dim': spec.latent_dim, 'scale': spec.scale}
  attend = functools.partial(
    pallas_mosaic_gpu.sparse_mla_attention,
    config=config_lib.MosaicConfig(splits=8),
    **sizes,
  )
  desired = cases.gathered(q, kv, indices, **sizes)
  cases.assert_close(jax.jit(attend)(q, kv, indices), desired)


@pytest.mark.gpu
@pytest.mark.parametrize('case', ['huge', 'plateau', 'duplicates', 'empty'])
def test_mosaic_on_hopper_adversarial_matches_float32(key, case):
  spec = HOPPER_SPECS['batched']
  q, kv, d_out, indices = cases.inputs(key, spec)
  if case == 'huge':
    q = 100 * q
  elif case == 'plateau':
    q = jnp.zeros_like(q)
  elif case == 'duplicates':
    indices = jnp.where(indices < 0, -1, indices % 3)
  else:
    indices = jnp.full_like(indices, -1)
  actual = _on_hopper(spec, q, kv, indices, d_out)
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
  cases.assert_close(actual, desired)


def _on_hopper(spec, *arrays):
  return _compiled(pallas_mosaic_gpu.sparse_mla_attention, spec)(*arrays)


def _in_float32(spec, q, kv, indices, d_out):
  q, kv, d_out = cases.float32(q, kv, d_out)
  return _compiled(cases.gathered, spec)(q, kv, indices, d_out)


@functools.cache
def _compiled(function, spec):
  return jax.jit(functools.partial(cases.values_and_gradients, function, spec))
