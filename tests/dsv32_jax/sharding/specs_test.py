"""Shardings of whole trees, from shapes alone."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from dsv32_jax.config import presets
from dsv32_jax.config.data import DataConfig
from dsv32_jax.config.training import MeshConfig, StageConfig
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.sharding import mesh as mesh_lib
from dsv32_jax.sharding import parallel as parallel_lib
from dsv32_jax.sharding import rules, specs
from dsv32_jax.sharding.parallel import Parallel
from dsv32_jax.training import optimizer, stages, state
from tests.support import parity

CFG = parity.config(
  num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0
)
MESHES_671B = {
  'fsdp': {'fsdp': 256},
  'fsdp_expert': {'fsdp': 8, 'expert': 32},
  'fsdp_expert_context': {'fsdp': 2, 'expert': 16, 'context': 8},
  'fsdp_tensor_expert': {'fsdp': 8, 'expert': 16, 'tensor': 2},
  'decode_expert': {'expert': 64, 'tensor': 4},
}


def abstract(name, **sizes):
  """A layout without devices."""
  mesh = jax.sharding.AbstractMesh(
    tuple(sizes.get(axis, 1) for axis in rules.MESH_AXES),
    rules.MESH_AXES,
    axis_types=(AxisType.Auto,) * len(rules.MESH_AXES),
  )
  return Parallel(mesh, rules.RULE_SETS[name])


@functools.cache
def boxed_671b():
  model = DeepSeekV32(presets.deepseek_v32_671b())
  return jax.eval_shape(
    functools.partial(state._init, model), jax.random.key(0)
  )


def leaves(tree):
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    yield jax.tree_util.keystr(path, simple=True, separator='/'), leaf


@pytest.mark.parametrize('name', rules.RULE_SETS)
def test_rule_set_cuts_every_large_parameter_of_the_671b_model(name):
  parallel = abstract(name, **MESHES_671B[name])
  shapes = specs.with_shardings(boxed_671b(), parallel)
  devices = parallel.size(*rules.MESH_AXES)
  whole_bytes = 4 * sum(math.prod(x.shape) for _, x in leaves(shapes))
  for path, leaf in leaves(shapes):
    shard = leaf.sharding.shard_shape(leaf.shape)
    cut = math.prod(leaf.shape) // math.prod(shard)
    if name == 'decode_expert':
      # Without optimizer state, what has neither experts nor heads is whole.
      assert cut > 1 or 'experts' not in path, path
    elif math.prod(leaf.shape) > 1e6:
      assert cut >= devices / parallel.size('tensor'), (path, cut)
  held = specs.bytes_a_device(shapes)
  if name == 'decode_expert':
    assert held < 60e9
  else:
    # The norms, biases and routers that are whole are next to nothing; tensor
    # members share what has no heads.
    limit = 1.2 if parallel.size('tensor') > 1 else 1.01
    assert held < limit * whole_bytes / devices


def test_parameter_that_does_not_divide_is_refused_with_all_numbers():
  parallel = abstract('fsdp_expert', expert=3)
  experts = boxed_671b()['params']['moe_layers']['layers']['moe']['experts']
  with pytest.raises(
    ValueError,
    match=r"moe/experts/w_down: dimension 'experts' of size 256 is not "
    r"divisible by the 3 devices of mesh axes expert \(rules 'fsdp_expert'\)",
  ):
    specs.with_shardings({'moe': {'experts': experts}}, parallel)


def test_without_a_layout_shapes_have_no_sharding():
  for _, leaf in leaves(specs.with_shardings(boxed_671b(), None)):
    assert leaf.sharding is None


@pytest.fixture(scope='module')
def parallel():
  return mesh_lib.make_parallel(
    MeshConfig(rules='fsdp_expert', data=2, fsdp=2, expert=2)
  )


@pytest.fixture(scope='module')
def variables(parallel):
  model = DeepSeekV32(CFG)
  return state.init_variables(model, jax.random.key(3), parallel)


@pytest.mark.multidevice
def test_init_gives_each_device_its_part_of_the_same_values(
  parallel, variables
):
  model = DeepSeekV32(CFG)
  shapes = state.variable_shapes(model, parallel)
  alone = state.init_variables(model, jax.random.key(3))
  for (path, leaf), (_, shape), (_, other) in zip(
    leaves(variables), leaves(shapes), leaves(alone), strict=True
  ):
    assert leaf.sharding == shape.sharding, path
    np.testing.assert_array_equal(leaf, other, err_msg=path)
  w_gate = variables['params']['moe_layers']['layers']['moe']['experts'][
    'w_gate'
  ]
  assert w_gate.sharding.spec == PartitionSpec(None, 'expert', 'fsdp', None)
  assert w_gate.addressable_shards[0].data.nbytes * 4 == w_gate.nbytes


@pytest.mark.multidevice
def test_moments_lie_where_their_parameters_do(parallel, variables):
  config = StageConfig(
    kind='sparse_training', init_from='x', steps=2, data=DataConfig()
  )
  stage = stages.build(config, CFG)
  tx = optimizer.build(config, stage)
  created = state.create(variables, stage, tx, parallel)
  params = dict(leaves(variables['params']))
  moments = 0
  for path, leaf in leaves(created.opt_state):
    if leaf.ndim == 0:
      assert leaf.sharding.is_fully_replicated
      continue
    name = path.split('/mu/')[-1].split('/nu/')[-1]
    assert leaf.sharding.is_equivalent_to(params[name].sharding, leaf.ndim)
    moments += 1
  assert moments == 2 * len(params)


def test_batch_that_the_devices_cannot_share_is_refused():
  check = functools.partial(
    specs.check_batch,
    abstract('fsdp_expert_context', data=2, expert=4, context=2),
    where='stages.a.data.',
  )
  check(batch_size=16, seq_len=64, micro_batches=2)
  with pytest.raises(
    ValueError,
    match=r'stages\.a\.data\.batch_size: got 8, expected a multiple of 16 '
    r'\(2 micro_batches x 8 devices of mesh axes data 2 x expert 4, rules ',
  ):
    check(batch_size=8, seq_len=64, micro_batches=2)
  with pytest.raises(
    ValueError,
    match=r'stages\.a\.data\.seq_len: got 62, expected a multiple of 4 '
    r'\(2 chunks x 2 devices of mesh axes context 2, rules ',
  ):
    check(batch_size=8, seq_len=62)


@pytest.mark.multidevice
def test_evaluation_rows_are_padded_to_the_devices(parallel):
  tokens = np.arange(15, dtype=np.int32).reshape(5, 3)
  assert specs.padded_rows({'x': tokens})['x'] is tokens
  with parallel_lib.use(parallel):
    placed = specs.padded_rows({'x': tokens})['x']
  assert placed.shape == (8, 3)
  assert placed.sharding.shard_shape(placed.shape) == (1, 3)
  np.testing.assert_array_equal(placed[:5], tokens)
  np.testing.assert_array_equal(placed[5:], 0)


@pytest.mark.multidevice
def test_caches_are_cut_by_rows(parallel):
  tree = {'latent': jax.ShapeDtypeStruct((16, 4, 2), jnp.float32)}
  (sharding,) = jax.tree.leaves(specs.cache(parallel, tree))
  assert sharding.shard_shape((16, 4, 2)) == (2, 4, 2)
