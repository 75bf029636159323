"""Sparse MLA attention under `jax.shard_map`, heads split over two devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import pallas_kernels as pk
from pallas_kernels import mosaic
from pallas_kernels.sparse_mla_attention import config as config_lib
from pallas_kernels.sparse_mla_attention import pallas_mosaic_gpu, xla
from tests.pallas_kernels import sparse_mla_attention_cases as cases
from tests.support import tolerances

_HEADS = PartitionSpec(None, None, 'heads')
_ALL = PartitionSpec()
_XLA = {
  'gather': config_lib.XlaConfig(
    form='gather', block_queries=3, block_keys=1, sorted_scatter=True
  ),
  'mask': config_lib.XlaConfig(
    form='mask', block_queries=3, block_keys=16, sorted_scatter=False
  ),
}

check_vma = pytest.mark.parametrize('check_vma', [True, False])


def _mesh():
  return jax.make_mesh(
    (2,), ('heads',), devices=jax.devices()[:2], axis_types=(AxisType.Auto,)
  )


def _inputs(key, *, num_heads):
  spec = cases.spec_of(
    batch=2,
    num_queries=7,
    num_keys=72,
    num_heads=num_heads,
    latent_dim=128,
    rope_dim=32,
    topk=20,
  )
  q, kv, d_out, indices = cases.inputs(key, spec)
  return (*cases.float32(q, kv, d_out), indices)


def _sharded(attend, mesh, check_vma):
  """Attention with each device's own heads; the keys are everyone's."""
  return jax.shard_map(
    functools.partial(attend, latent_dim=128, scale=0.1),
    mesh=mesh,
    in_specs=(_HEADS, _ALL, _ALL),
    out_specs=(_HEADS, _HEADS),
    check_vma=check_vma,
  )


def _values_and_gradients(attend):
  def run(q, kv, d_out, indices):
    (out, lse), pullback = jax.vjp(lambda q, kv: attend(q, kv, indices), q, kv)
    return out, lse, *pullback((d_out, jnp.zeros_like(lse)))

  return jax.jit(run)


@pytest.mark.multidevice
@check_vma
@pytest.mark.parametrize('form', _XLA)
def test_sparse_mla_attention_xla_split_heads_match_one_device(
  key, form, check_vma
):
  arrays = _inputs(key, num_heads=4)
  attend = functools.partial(xla.sparse_mla_attention, config=_XLA[form])
  whole = functools.partial(attend, latent_dim=128, scale=0.1)
  expected = _values_and_gradients(whole)(*arrays)
  mesh = _mesh()
  specs = (_HEADS, _ALL, _HEADS, _ALL)
  arrays = [
    jax.device_put(x, NamedSharding(mesh, spec))
    for x, spec in zip(arrays, specs, strict=True)
  ]
  actual = _values_and_gradients(_sharded(attend, mesh, check_vma))(*arrays)
  tolerances.assert_close(actual, expected)
  assert len(actual[0].sharding.device_set) == 2
  # The gradient of the keys is the sum over both devices' heads.
  np.testing.assert_array_equal(
    *[np.asarray(x.data) for x in actual[3].addressable_shards]
  )


@pytest.mark.multidevice
@check_vma
def test_sparse_mla_attention_public_call_split_heads_matches_one_device(
  key, check_vma
):
  q, kv, _, indices = _inputs(key, num_heads=4)

  def attend(q, kv, indices, **sizes):
    output = pk.sparse_mla_attention(q, kv, indices, **sizes)
    return output.out_BTHC, output.lse_BTH

  expected = attend(q, kv, indices, latent_dim=128, scale=0.1)
  actual = jax.jit(_sharded(attend, _mesh(), check_vma))(q, kv, indices)
  tolerances.assert_close(actual, expected)


@pytest.mark.multidevice
@check_vma
def test_fp8_cache_xla_split_heads_match_one_device(key, check_vma):
  keys = jax.random.split(key, 3)
  q = jax.random.normal(keys[0], (2, 3, 4, 576))
  cache = pk.pack_fp8_cache(jax.random.normal(keys[1], (2, 30, 576)))
  indices = jax.random.randint(keys[2], (2, 3, 8), -1, 30)
  attend = functools.partial(xla.sparse_mla_attention_fp8_cache, scale=0.1)
  sharded = jax.shard_map(
    attend,
    mesh=_mesh(),
    in_specs=(_HEADS, _ALL, _ALL),
    out_specs=(_HEADS, _HEADS),
    check_vma=check_vma,
  )
  tolerances.assert_close(
    jax.jit(sharded)(q, cache, indices), attend(q, cache, indices)
  )


@cases.needs_api
@check_vma
def test_sparse_mla_attention_mosaic_split_heads_lowers_for_cuda(check_vma):
  mesh = AbstractMesh((2,), ('heads',), axis_types=(AxisType.Auto,))
  attend = functools.partial(
    pallas_mosaic_gpu.sparse_mla_attention, target=mosaic.Target.LOWER
  )
  run = _values_and_gradients(_sharded(attend, mesh, check_vma))
  shapes = (
    ((2, 4, 256, 160), jnp.bfloat16),
    ((2, 72, 160), jnp.bfloat16),
    ((2, 4, 256, 128), jnp.bfloat16),
    ((2, 4, 64), jnp.int32),
  )
  arguments = [jax.ShapeDtypeStruct(*x) for x in shapes]
  lowered = run.trace(*arguments).lower(lowering_platforms=('cuda',))
  text = lowered.as_text()
  calls = re.findall(r'custom_call @mosaic_gpu_v2.*?\n', text)
  assert len(calls) == 2
  # The kernels see a device's own 128 heads, not all 256.
  for call in calls:
    assert 'tensor<8x128x192xbf16>' in call
    assert '256x192xbf16' not in call
  # One sum over the devices: the gradient of the keys.
  reduced = re.findall(r'all_reduce.*?\n(?:.*\n)*?.*\}\) : .*-> (.*)\n', text)
  assert reduced == ['tensor<2x72x160xbf16>']


@cases.needs_api
@check_vma
def test_fp8_cache_mosaic_split_heads_lowers_for_cuda(check_vma):
  mesh = AbstractMesh((2,), ('heads',), axis_types=(AxisType.Auto,))
  sharded = jax.shard_map(
    functools.partial(
      pallas_mosaic_gpu.sparse_mla_attention_fp8_cache,
      scale=0.1,
      target=mosaic.Target.LOWER,
    ),
    mesh=mesh,
    in_specs=(_HEADS, _ALL, _ALL),
    out_specs=(_HEADS, _HEADS),
    check_vma=check_vma,
  )
  arguments = (
    jax.ShapeDtypeStruct((2, 1, 128, 576), jnp.bfloat16),
    jax.ShapeDtypeStruct((2, 72, 656), jnp.uint8),
    jax.ShapeDtypeStruct((2, 1, 128), jnp.int32),
  )
  traced = jax.jit(sharded).trace(*arguments)
  text = traced.lower(lowering_platforms=('cuda',)).as_text()
  (call,) = re.findall(r'custom_call @mosaic_gpu_v2.*?\n', text)
  assert 'tensor<2x64x576xbf16>' in call


@pytest.mark.gpu
@check_vma
def test_sparse_mla_attention_mosaic_on_hopper_matches_float32(key, check_vma):
  arrays = _inputs(key, num_heads=16)
  mesh = jax.make_mesh(
    (1,), ('heads',), devices=jax.devices()[:1], axis_types=(AxisType.Auto,)
  )
  whole = functools.partial(cases.gathered, latent_dim=128, scale=0.1)
  q, kv, d_out = (x.astype(jnp.bfloat16) for x in arrays[:3])
  desired = _values_and_gradients(whole)(*arrays)
  attend = _sharded(pallas_mosaic_gpu.sparse_mla_attention, mesh, check_vma)
  actual = _values_and_gradients(attend)(q, kv, d_out, arrays[3])
  cases.assert_close(actual, desired)
