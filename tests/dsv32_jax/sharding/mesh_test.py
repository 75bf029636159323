import typing

import jax
import pytest
from jax.sharding import PartitionSpec

from dsv32_jax.config import training
from dsv32_jax.config.training import MeshConfig
from dsv32_jax.sharding import axes, mesh, parallel, rules


def test_rule_sets_are_those_that_a_config_may_name():
  assert tuple(rules.RULE_SETS) == typing.get_args(training.RuleSetName)
  for name, rule_set in rules.RULE_SETS.items():
    assert rule_set.name == name


@pytest.mark.parametrize('name', rules.RULE_SETS)
def test_rule_set_uses_a_mesh_axis_once_an_array(name):
  rule_set = rules.RULE_SETS[name]
  spec = rule_set.spec(axes.LOGICAL_AXES)
  used = [
    axis
    for entry in spec
    for axis in ((entry,) if isinstance(entry, str) else entry or ())
  ]
  assert len(used) == len(set(used))
  assert set(used) == rule_set.used


def test_rules_of_an_unknown_axis_are_refused():
  with pytest.raises(ValueError, match='unknown logical axis channels'):
    rules.RuleSet('mine', {'channels': ('fsdp',)})
  with pytest.raises(ValueError, match='unknown mesh axis rows'):
    rules.RuleSet('mine', {axes.EMBED: ('rows',)})


def test_experts_choose_their_mesh_axis_before_the_width():
  rule_set = rules.RULE_SETS['fsdp_expert']
  weight = (axes.EXPERTS, axes.EMBED, axes.EXPERT_MLP)
  assert rule_set.spec(weight) == PartitionSpec('expert', 'fsdp', None)
  assert rule_set.spec((axes.EMBED, axes.MLP)) == PartitionSpec(
    ('fsdp', 'expert'), None
  )


@pytest.mark.parametrize(
  ('given', 'sizes'),
  [
    ({}, {'data': 8}),
    ({'fsdp': 8}, {'fsdp': 8}),
    ({'data': 1, 'fsdp': -1}, {'fsdp': 8}),
    ({'fsdp': 2}, {'data': 4, 'fsdp': 2}),
    ({'data': 1, 'fsdp': 2}, {'fsdp': 2}),
  ],
)
def test_axis_sizes_fill_in_what_is_left(given, sizes):
  found = mesh.axis_sizes(MeshConfig(**given), 8)
  assert {name: size for name, size in found.items() if size > 1} == sizes
  assert tuple(found) == rules.MESH_AXES


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    (
      {'rules': 'fsdp', 'expert': 2},
      r"mesh\.expert: got 2 with mesh\.rules 'fsdp', expected 1",
    ),
    (
      {'rules': 'fsdp_expert', 'context': 2},
      r'mesh\.context: got 2 .* they use data, fsdp, expert\)',
    ),
    ({'fsdp': 3}, r'mesh\.data: got -1, .*\(3 devices\) to divide the 8'),
    (
      {'data': 4, 'fsdp': 4},
      r'mesh: got data 4 x fsdp 4 = 16 devices, expected at most the 8',
    ),
  ],
)
def test_axis_sizes_that_do_not_fit_are_refused(given, message):
  with pytest.raises(ValueError, match=message):
    mesh.axis_sizes(MeshConfig(**given), 8)


@pytest.mark.multidevice
def test_parallel_of_one_device_is_none():
  assert mesh.make_parallel(MeshConfig(data=1)) is None
  found = mesh.make_parallel(MeshConfig(data=2, fsdp=2))
  assert found.size('data', 'fsdp') == 4
  assert found.axes_of(axes.BATCH) == ('data', 'fsdp')
  # A static argument of jitted functions.
  assert hash(found) == hash(mesh.make_parallel(MeshConfig(data=2, fsdp=2)))


@pytest.mark.multidevice
def test_constrain_cuts_over_the_axes_that_divide():
  layout = mesh.make_parallel(MeshConfig(data=2, fsdp=2))
  assert layout.fitting_axes(axes.BATCH, 4) == ('data', 'fsdp')
  assert layout.fitting_axes(axes.BATCH, 2) == ('data',)
  assert layout.fitting_axes(axes.BATCH, 3) == ()
  x = jax.numpy.zeros((2, 3))
  assert parallel.constrain(x, axes.BATCH, None) is x
  with parallel.use(layout):
    assert parallel.active() is layout
    cut = jax.jit(lambda x: parallel.constrain(x, axes.BATCH, None))(x)
  assert cut.sharding.shard_shape(cut.shape) == (1, 3)
  assert parallel.active() is None


@pytest.mark.multidevice
def test_make_parallel_takes_the_exchange_and_refuses_one_the_cpu_lacks():
  sizes = {'rules': 'fsdp_expert', 'expert': 4, 'fsdp': 2}
  layout = mesh.make_parallel(MeshConfig(**sizes))
  assert layout is not None
  assert layout.exchange == 'dense'
  with pytest.raises(ValueError, match=r"mesh\.exchange: got 'ragged' on cpu"):
    mesh.make_parallel(MeshConfig(**sizes, exchange='ragged'))
