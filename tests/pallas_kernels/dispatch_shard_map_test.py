"""Every op under `jax.shard_map`: xla's values, and kernels lowered for CUDA.

Queries (or rows, or heads) are cut over two devices and the keys (or weights)
are everyone's, so that their gradients are sums over the devices.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import pallas_kernels as pk
from pallas_kernels import mosaic
from pallas_kernels.dense_attention import pallas_mosaic_gpu as dense_kernels
from pallas_kernels.grouped_matmul import pallas_mosaic_gpu as grouped_kernels
from pallas_kernels.indexer_kl import arg_specs as kl_specs
from pallas_kernels.indexer_kl import pallas_mosaic_gpu as kl_kernels
from pallas_kernels.lightning_indexer import arg_specs as indexer_specs
from pallas_kernels.lightning_indexer import pallas_mosaic_gpu as index_kernels
from pallas_kernels.topk_selector import by_rows
from pallas_kernels.topk_selector import pallas_mosaic_gpu as topk_kernels
from tests.support import tolerances

_WHOLE = PartitionSpec()
_FIRST = PartitionSpec('devices')
_SECOND = PartitionSpec(None, 'devices')
_THIRD = PartitionSpec(None, None, 'devices')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A call, and how its arguments are cut.

  Attributes:
    call: of local arrays; the kernels' if made for a target, else xla's.
    arguments: of all devices.
    num_gradients: how many of them, from the first, have gradients.
    in_specs: how they are cut.
    out_specs: how the result is.
    local: an operand's type on one device; each kernel has one of these.
    summed: types of what is summed over the devices, gradients included.
  """

  call: Callable[..., Any]
  arguments: tuple[Any, ...]
  num_gradients: int
  in_specs: tuple[PartitionSpec, ...]
  out_specs: Any
  local: tuple[str, ...]
  summed: tuple[str, ...] = ()


def _normal(seed, dtype, *shapes):
  rng = np.random.default_rng(seed)
  return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def _indexer_arguments(target):
  heads, dim, dtype = (64, 128, jnp.bfloat16) if target else (4, 8, jnp.float32)
  spec = indexer_specs.ArgSpec(
    batch=2, queries=32, keys=256, heads=heads, dim=dim
  )
  end = jnp.broadcast_to(jnp.arange(225, 257, dtype=jnp.int32)[None], (2, 32))
  arrays = spec.make(seed=0, dtype=dtype, integers=True)
  return (*arrays, end // 3, end)


def _lightning_indexer(target, *, quantized=False):
  def call(q, k, w, start, end):
    if target:
      return index_kernels.differentiable_scores(
        q, k, w, start, end, quantized, target
      )
    return pk.lightning_indexer(
      q,
      k,
      w,
      key_start_BT=start,
      key_end_BT=end,
      quantized=quantized,
      implementation='xla',
    )

  return Case(
    call=call,
    arguments=_indexer_arguments(target),
    num_gradients=3,
    in_specs=(_SECOND, _WHOLE, _SECOND, _SECOND, _SECOND),
    out_specs=_SECOND,
    local=('2x1024x128xbf16', '2x1024x128xf8E4M3FN'),
    summed=('2x256x128xbf16',),
  )


def _select_topk(target):
  (scores,) = _normal(1, jnp.float32, (2, 16, 300))
  if target:
    rows = functools.partial(topk_kernels.select_rows, target=target)
    select = functools.partial(by_rows.select_topk, select_rows=rows)
  else:
    select = functools.partial(pk.select_topk, implementation='xla')
  return Case(
    call=lambda scores: select(scores, k=20).indices_BTK,
    arguments=(scores,),
    num_gradients=0,
    in_specs=(_FIRST,),
    out_specs=_FIRST,
    local=('16x4096xf32',),
  )


def _indexed_topk(target):
  if target:
    rows = functools.partial(topk_kernels.select_rows, target=target)
    select = functools.partial(
      by_rows.indexed_topk, select_rows=rows, target=target
    )
  else:
    select = functools.partial(pk.indexed_topk, implementation='xla')
  return Case(
    call=lambda q, k, w, start, end: (
      select(q, k, w, k=20, key_start_BT=start, key_end_BT=end).indices_BTK
    ),
    arguments=_indexer_arguments(target),
    num_gradients=0,
    in_specs=(_SECOND, _WHOLE, _SECOND, _SECOND, _SECOND),
    out_specs=_SECOND,
    local=('2x1024x128xbf16', '32x4096xf32'),
  )


def _indexer_kl(target, *, selected):
  spec = kl_specs.ArgSpec(
    batch=2,
    num_queries=8,
    num_keys=128,
    index_heads=64 if target else 2,
    index_dim=128 if target else 8,
    num_heads=128 if target else 4,
    num_key_heads=1,
    width=576 if target else 12,
    topk=64,
    dtype='bfloat16' if target else 'float32',
  )
  arrays = _normal(
    2,
    spec.dtype,
    (2, 8, spec.index_heads, spec.index_dim),
    (2, 128, spec.index_dim),
    (2, 8, spec.index_heads),
    (2, 8, spec.num_heads, spec.width),
    (2, 128, 1, spec.width),
  )
  # Some normaliser or other: p need not be a distribution here.
  lse = 5 + jnp.ones((2, 8, spec.num_heads))
  weight = jnp.linspace(0.1, 1, 16).reshape(2, 8)
  if selected:
    order = np.random.default_rng(2).random((2, 8, 128)).argsort()
    valid = {'indices_BTK': jnp.asarray(order[..., :64], jnp.int32)}
  else:
    end = jnp.broadcast_to(jnp.arange(121, 129, dtype=jnp.int32)[None], (2, 8))
    valid = {'key_start_BT': end // 3, 'key_end_BT': end}

  def call(q_index, k_index, w, q, k, lse, weight, *ranges):
    kwargs = dict(zip(valid, ranges, strict=True), scale=spec.scale)
    arrays = (q_index, k_index, w, q, k, lse, weight)
    if target:
      loss, kl = kl_kernels.indexer_kl(*arrays, target=target, **kwargs)
    else:
      output = pk.indexer_kl(*arrays, implementation='xla', **kwargs)
      loss, kl = output.loss, output.kl_BT
    return loss[None], kl

  own, rest = (_SECOND, _WHOLE), (_SECOND,) * len(valid)
  return Case(
    call=call,
    arguments=(*arrays, lse, weight, *valid.values()),
    num_gradients=3,
    in_specs=(*own, _SECOND, *own, _SECOND, _SECOND, *rest),
    out_specs=(_FIRST, _SECOND),
    local=('8x128x576xbf16', '8x64x128xbf16')
    if selected
    else ('4x128x576xbf16', '4x64x128xbf16'),
    summed=('2x128x128xbf16',),
  )


def _dense_attention(target):
  assert target
  shapes = ((2, 128, 4, 192), (2, 128, 4, 192), (2, 128, 4, 128))
  arrays = _normal(4, jnp.bfloat16, *shapes)
  end = jnp.broadcast_to(jnp.arange(1, 129, dtype=jnp.int32)[None], (2, 128))
  ranges = (end // 3, end)
  return Case(
    call=functools.partial(
      dense_kernels.dense_attention, scale=0.1, target=target
    ),
    arguments=(*arrays, *ranges),
    num_gradients=3,
    in_specs=(_THIRD, _THIRD, _THIRD, _WHOLE, _WHOLE),
    out_specs=(_THIRD, _THIRD),
    local=('2x128x2x192xbf16',),
  )


def _grouped_matmul(target):
  dtype = jnp.bfloat16 if target else jnp.float32
  x, w = _normal(3, dtype, (2, 128, 128), (4, 128, 256))
  sizes = jnp.asarray([[30, 0, 60, 38], [5, 70, 20, 0]], jnp.int32)
  function = functools.partial(pk.grouped_matmul, implementation='xla')
  if target:
    function = functools.partial(grouped_kernels.grouped_matmul_for, target)

  def call(x, w, sizes):
    parts = zip(x, sizes, strict=True)
    return jnp.stack([function(x_MD, w, sizes_E) for x_MD, sizes_E in parts])

  return Case(
    call=call,
    arguments=(x, w, sizes),
    num_gradients=2,
    in_specs=(_FIRST, _WHOLE, _FIRST),
    out_specs=_FIRST,
    local=('128x128xbf16', '128x256xbf16'),
    summed=('4x128x256xbf16',),
  )


CASES = {
  'lightning_indexer': _lightning_indexer,
  'lightning_indexer_fp8': functools.partial(
    _lightning_indexer, quantized=True
  ),
  'select_topk': _select_topk,
  'indexed_topk': _indexed_topk,
  'indexer_kl_selected': functools.partial(_indexer_kl, selected=True),
  'indexer_kl_ranges': functools.partial(_indexer_kl, selected=False),
  'dense_attention': _dense_attention,
  'grouped_matmul': _grouped_matmul,
}


def _values_and_gradients(case, call):
  """Of all arguments: the result, and the gradients of its sum."""

  def run(*arguments):
    def of(*differentiated):
      return call(*differentiated, *arguments[case.num_gradients :])

    out, pullback = jax.vjp(of, *arguments[: case.num_gradients])
    if not case.num_gradients:
      return out
    return out, pullback(jax.tree.map(jnp.ones_like, out))

  return jax.jit(run)


def _sharded(case, mesh, *, check_vma=False):
  # Unchecked by default, as the README asks.
  return jax.shard_map(
    case.call,
    mesh=mesh,
    in_specs=case.in_specs,
    out_specs=case.out_specs,
    check_vma=check_vma,
  )


needs_api = pytest.mark.skipif(
  not mosaic.has_api(), reason='Mosaic GPU kernels need jax 0.11'
)


@pytest.mark.slow
@pytest.mark.multidevice
@pytest.mark.parametrize('name', [x for x in CASES if x != 'dense_attention'])
def test_op_xla_on_two_devices_matches_one(name):
  case = CASES[name](None)
  mesh = jax.make_mesh(
    (2,), ('devices',), devices=jax.devices()[:2], axis_types=(AxisType.Auto,)
  )
  arguments = [
    jax.device_put(x, NamedSharding(mesh, spec))
    for x, spec in zip(case.arguments, case.in_specs, strict=True)
  ]
  actual = _values_and_gradients(case, _sharded(case, mesh))(*arguments)
  expected = _values_and_gradients(case, case.call)(*case.arguments)
  if name.startswith('indexer_kl'):
    # A device's loss is that of its own queries.
    actual, expected = (
      ((jnp.sum(loss), kl), gradients)
      for (loss, kl), gradients in (actual, expected)
    )
  if not case.num_gradients:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    return
  tolerances.assert_close(actual, expected)


@needs_api
@pytest.mark.parametrize('name', CASES)
def test_op_mosaic_on_two_devices_lowers_for_cuda(name):
  case = CASES[name](mosaic.Target.LOWER)
  mesh = AbstractMesh((2,), ('devices',), axis_types=(AxisType.Auto,))
  run = _values_and_gradients(case, _sharded(case, mesh))
  arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in case.arguments]
  lowered = run.trace(*arguments).lower(lowering_platforms=('cuda',))
  text = lowered.as_text()
  calls = re.findall(r'custom_call @mosaic_gpu_v2.*( : .*)\n', text)
  assert calls
  for call in calls:
    assert any(f'tensor<{local}>' in call for local in case.local), call
  summed = re.findall(
    r'all_reduce.*?\n(?:.*\n)*?.*\}\) : .*-> tensor<(.*)>\n', text
  )
  assert tuple(summed) == case.summed


@needs_api
@pytest.mark.parametrize('name', ['lightning_indexer_fp8', 'grouped_matmul'])
def test_op_mosaic_checked_gradient_that_lacks_a_sum_is_refused(name):
  """jax takes kernels' outputs for equal everywhere unless told otherwise."""
  case = CASES[name](mosaic.Target.LOWER)
  mesh = AbstractMesh((2,), ('devices',), axis_types=(AxisType.Auto,))
  run = _values_and_gradients(case, _sharded(case, mesh, check_vma=True))
  with pytest.raises(ValueError, match='must produce an output with the same'):
    jax.eval_shape(run, *case.arguments)


@pytest.mark.gpu
@pytest.mark.parametrize('name', CASES)
def test_op_mosaic_on_one_gpu_matches_the_plain_call(name):
  case = CASES[name](mosaic.Target.DEVICE)
  mesh = jax.make_mesh(
    (1,), ('devices',), devices=jax.devices()[:1], axis_types=(AxisType.Auto,)
  )
  actual = _values_and_gradients(case, _sharded(case, mesh))(*case.arguments)
  expected = _values_and_gradients(case, case.call)(*case.arguments)
  if not case.num_gradients:
    np.testing.assert_array_equal(actual, expected)
    return
  # Of the loss's key gradient the order of the sums differs.
  tolerances.assert_close(actual, expected, dtype=jnp.bfloat16)
