"""Bar 1 of docs/sharding.md: eight devices train what one device trains.

Every rule set, and meshes of three axes, through pretrain, dense warm-up and
sparse training: in float64 element by element, in float32 by losses and norms.
"""

import functools

import jax
import numpy as np
import pytest

from dsv32_jax.config.training import MeshConfig
from tests.support import parity
from tests.support.double_precision import double_precision

pytestmark = [pytest.mark.multidevice, pytest.mark.timeout(900)]

MESHES = {
  'fsdp': MeshConfig(rules='fsdp', fsdp=8),
  'data_fsdp': MeshConfig(rules='fsdp', data=2, fsdp=4),
  'expert': MeshConfig(rules='fsdp_expert', expert=8),
  'data_fsdp_expert': MeshConfig(rules='fsdp_expert', data=2, fsdp=2, expert=2),
  'fsdp_expert_context': MeshConfig(
    rules='fsdp_expert_context', fsdp=2, expert=2, context=2
  ),
  'data_expert_context': MeshConfig(
    rules='fsdp_expert_context', data=1, expert=2, context=4
  ),
  'fsdp_tensor_expert': MeshConfig(
    rules='fsdp_tensor_expert', fsdp=2, expert=2, tensor=2
  ),
  'data_tensor': MeshConfig(rules='fsdp_tensor_expert', data=2, tensor=4),
  'decode_expert': MeshConfig(
    rules='decode_expert', data=2, expert=2, tensor=2
  ),
}
# One layout of three axes is enough for every run of the suite.
ONE_AND_ALL = [
  name
  if name == 'fsdp_expert_context'
  else pytest.param(name, marks=pytest.mark.exhaustive)
  for name in MESHES
]
# The largest differences that rounding makes (float64) are near 1e-13.
ELEMENTWISE = {'rtol': 1e-9, 'atol': 1e-10}
FLOAT32 = 2e-5


@functools.cache
def _one_device(**options):
  return _train(None, **options)


def _train(mesh, *, double=True, kinds=parity.STAGES, **options):
  if not double:
    return parity.train(parity.config(), mesh, kinds=kinds, **options)
  with double_precision() as precision:
    return parity.train(
      parity.config(precision=precision),
      mesh,
      kinds=kinds,
      dtype=np.float64,
      **options,
    )


def _assert_elementwise(many, one):
  for kind in one:
    new = jax.tree_util.tree_leaves_with_path(many[kind].state)
    old = jax.tree.leaves(one[kind].state)
    for (path, actual), desired in zip(new, old, strict=True):
      where = f'{kind} {jax.tree_util.keystr(path)}'
      assert actual.dtype == desired.dtype, where
      np.testing.assert_allclose(actual, desired, **ELEMENTWISE, err_msg=where)
    for actual, desired in zip(many[kind].lines, one[kind].lines, strict=True):
      assert set(actual) == set(desired)
      for name in desired:
        np.testing.assert_allclose(
          actual[name], desired[name], **ELEMENTWISE, err_msg=name
        )


@pytest.mark.slow
@pytest.mark.parametrize('name', ONE_AND_ALL)
def test_training_on_eight_devices_is_that_of_one_in_float64(name):
  many = _train(MESHES[name])
  one = _one_device()
  _assert_elementwise(many, one)
  # It moved, and in double precision.
  first, last = (one['pretrain'].lines[i]['loss/lm'] for i in (0, -1))
  assert last < first - 0.1
  assert last.dtype == np.float64


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize('kind', parity.STAGES)
@pytest.mark.parametrize('name', MESHES)
def test_training_on_eight_devices_is_near_that_of_one_in_float32(name, kind):
  """Each stage from the same start, so that none begins with a difference."""
  options = {'double': False, 'kinds': (kind,)}
  many, one = _train(MESHES[name], **options), _one_device(**options)
  for actual, desired in zip(many[kind].lines, one[kind].lines, strict=True):
    for key in desired:
      if key.startswith('loss/'):
        np.testing.assert_allclose(
          actual[key], desired[key], rtol=FLOAT32, err_msg=key
        )
  new = jax.tree_util.tree_leaves_with_path(many[kind].state.params)
  old = jax.tree.leaves(one[kind].state.params)
  for (path, actual), desired in zip(new, old, strict=True):
    error = np.linalg.norm(actual - desired) / np.linalg.norm(desired)
    assert error < FLOAT32, f'{jax.tree_util.keystr(path)} {error}'


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
  'name', ['expert', 'fsdp_expert_context', 'fsdp_tensor_expert']
)
def test_training_with_all_tokens_on_one_device_drops_none(name):
  options = {'skewed': True}
  many, one = _train(MESHES[name], **options), _one_device(**options)
  _assert_elementwise(many, one)
  for line in many['sparse_training'].lines:
    load_LE = line['expert_load_LE']
    # Two experts a token, both of the first group.
    assert (load_LE[:, :2] == load_LE.sum(-1, keepdims=True) / 2).all()


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize('name', ['data_fsdp_expert', 'fsdp_expert_context'])
def test_micro_batches_spread_over_the_devices_add_up(name):
  mesh = {
    'data_fsdp_expert': MeshConfig(rules='fsdp_expert', fsdp=2, expert=2),
    'fsdp_expert_context': MESHES[name],
  }[name]
  options = {'kinds': ('sparse_training',), 'steps': 5}
  many = _train(mesh, micro_batches=2, **options)
  _assert_elementwise(many, _one_device(micro_batches=2, **options))
