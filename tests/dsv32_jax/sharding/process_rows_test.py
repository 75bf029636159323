"""Rows by the place of a process's devices in the mesh.

Processes are simulated: equal runs of the eight devices, as jax orders them.
"""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsv32_jax.sharding import axes, mesh, process_rows
from dsv32_jax.sharding.parallel import Parallel
from dsv32_jax.sharding.rules import RULE_SETS

pytestmark = pytest.mark.multidevice


def layout(rules: str, **sizes: int) -> Parallel:
  names = ('data', 'fsdp', 'expert', 'context', 'tensor')
  full = {name: sizes.get(name, 1) for name in names}
  return Parallel(mesh.make_mesh(full, jax.devices()), RULE_SETS[rules])


def rows_of(parallel: Parallel, processes: int, batch_size: int):
  share = 8 // processes
  devices = jax.devices()
  return [
    process_rows.of(
      parallel.sharding(axes.BATCH),
      batch_size,
      devices=devices[p * share : (p + 1) * share],
    )
    for p in range(processes)
  ]


def test_of_data_and_fsdp_axes_give_each_process_its_own_rows():
  parallel = layout('fsdp', data=2, fsdp=4)
  assert rows_of(parallel, 2, 16) == [(0, 8), (8, 8)]
  assert rows_of(parallel, 4, 16) == [(0, 4), (4, 4), (8, 4), (12, 4)]
  assert rows_of(parallel, 1, 16) == [(0, 16)]


def test_of_context_axis_across_processes_gives_them_the_same_rows():
  parallel = layout('fsdp_expert_context', fsdp=2, context=4)
  assert rows_of(parallel, 4, 8) == [(0, 4), (0, 4), (4, 4), (4, 4)]
  parallel = layout('fsdp_expert_context', context=8)
  assert rows_of(parallel, 2, 3) == [(0, 3), (0, 3)]


def test_of_tensor_axis_within_a_process_leaves_it_its_rows():
  parallel = layout('fsdp_tensor_expert', expert=4, tensor=2)
  assert rows_of(parallel, 2, 8) == [(0, 4), (4, 4)]
  assert rows_of(parallel, 8, 8)[:3] == [(0, 2), (0, 2), (2, 2)]


def test_of_all_devices_is_the_default():
  parallel = layout('fsdp', fsdp=8)
  assert process_rows.of(parallel.sharding(axes.BATCH), 8) == (0, 8)


def test_of_rows_that_do_not_divide_are_refused():
  parallel = layout('fsdp', data=2, fsdp=4)
  message = 'batch_size: got 12, expected a multiple of the 8 devices along'
  with pytest.raises(ValueError, match=message):
    rows_of(parallel, 2, 12)


def test_of_rows_with_a_gap_are_refused():
  parallel = layout('fsdp', fsdp=8)
  devices = jax.devices()
  with pytest.raises(ValueError, match='holds the rows up to 1 and from 2 on'):
    process_rows.of(
      parallel.sharding(axes.BATCH), 8, devices=(devices[0], devices[2])
    )


@pytest.mark.parametrize('spec', [('fsdp',), ('fsdp', 'context'), (None,)])
def test_place_gives_every_device_its_part(spec):
  parallel = layout('fsdp_expert_context', fsdp=2, context=4)
  sharding = NamedSharding(parallel.mesh, PartitionSpec(*spec))
  rows = {'tokens': np.arange(48).reshape(4, 12)}
  placed = process_rows.place(rows, lambda ndim: sharding)
  assert placed['tokens'].sharding == sharding
  np.testing.assert_array_equal(placed['tokens'], rows['tokens'])


def test_place_rows_that_do_not_divide_are_refused():
  parallel = layout('fsdp', data=2, fsdp=4)
  message = "batch_size: got 12 rows of 'tokens' in this process, expected a"
  with pytest.raises(ValueError, match=message):
    process_rows.place(
      {'tokens': np.zeros((12, 2))}, lambda ndim: parallel.sharding(axes.BATCH)
    )
