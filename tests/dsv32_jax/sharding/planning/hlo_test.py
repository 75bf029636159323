"""The parser of HLO text, on programs whose collectives are known."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from dsv32_jax.sharding import mesh as mesh_lib
from dsv32_jax.sharding.planning import hlo

SIZES = {'data': 1, 'fsdp': 4, 'context': 1, 'expert': 2, 'tensor': 1}


def mesh():
  return mesh_lib.make_mesh(SIZES, jax.devices()[:8])


def sharding(*spec):
  return jax.sharding.NamedSharding(mesh(), P(*spec))


def shape(dims, *spec, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding(*spec))


def found(function, *arguments, **options):
  compiled = jax.jit(function).lower(*arguments).compile()
  return hlo.collectives(compiled.as_text(), SIZES, **options)


def test_collectives_of_explicit_regions_have_kind_bytes_group_and_axes():
  def member(x):
    whole = lax.all_gather(x, 'fsdp', tiled=True)
    swapped = lax.all_to_all(whole, 'expert', 0, 0, tiled=True)
    part = lax.psum_scatter(swapped, 'fsdp', tiled=True)
    return lax.ppermute(part, 'expert', [(0, 1), (1, 0)])

  def program(x):
    return jax.shard_map(
      member,
      mesh=mesh(),
      in_specs=P(('fsdp', 'expert')),
      out_specs=P(('fsdp', 'expert')),
      check_vma=False,
    )(x)

  summary = {
    one.kind: (one.bytes, one.count, one.group, one.axes)
    for one in found(program, shape((64, 8), ('fsdp', 'expert')))
  }
  # [8, 8] float32 here, [32, 8] gathered over fsdp.
  assert summary == {
    'all-gather': (1024, 1, 4, ('fsdp',)),
    'all-to-all': (1024, 1, 2, ('expert',)),
    'reduce-scatter': (1024, 1, 4, ('fsdp',)),
    'collective-permute': (256, 1, 2, ('expert',)),
  }


def fsdp_layers(w_LDF, x_ND):
  def layer(h_ND, w_DF):
    h_ND = jnp.tanh(h_ND @ w_DF)
    h_ND = lax.with_sharding_constraint(h_ND, sharding('fsdp'))
    return h_ND, None

  h_ND, _ = lax.scan(jax.checkpoint(layer), x_ND, w_LDF)
  return jnp.sum(h_ND)


def test_collectives_in_loops_count_as_often_as_the_loop_runs():
  w, x = shape((5, 64, 64), None, 'fsdp'), shape((32, 64), 'fsdp')
  gathers = [c for c in found(fsdp_layers, w, x) if c.kind == 'all-gather']
  assert [(c.bytes, c.count) for c in gathers] == [(64 * 64 * 4, 5)]


def test_all_reduce_of_which_a_part_is_read_is_a_reduce_scatter():
  """XLA on CPU has no reduce-scatter; gradients of FSDP would be one."""
  w, x = shape((5, 64, 64), None, 'fsdp'), shape((32, 64), 'fsdp')
  gradient = jax.jit(
    jax.grad(fsdp_layers), out_shardings=sharding(None, 'fsdp')
  )
  text = gradient.lower(w, x).compile().as_text()
  assert 'reduce-scatter(' not in text
  totals = hlo.totals(hlo.collectives(text, SIZES))
  assert totals == {
    'all-gather': 2 * 5 * 64 * 64 * 4,
    'reduce-scatter': 5 * 64 * 64 * 4,
  }


def test_all_reduce_that_is_read_whole_stays_one():
  def program(x):
    return jnp.sum(x, axis=0)

  totals = hlo.totals(found(program, shape((8, 64), 'fsdp')))
  assert totals == {'all-reduce': 64 * 4}


def test_loop_of_unknown_length_is_refused_or_counted_as_asked():
  def member(x, n):
    return lax.fori_loop(0, n[0], lambda _, y: lax.psum(y, 'fsdp') * 0.5, x)

  def program(x, n):
    return jax.shard_map(
      member, mesh=mesh(), in_specs=(P(), P()), out_specs=P(), check_vma=False
    )(x, n)

  arguments = shape((16,)), shape((1,), dtype=jnp.int32)
  with pytest.raises(ValueError, match='no known trip count; give unknown'):
    found(program, *arguments)
  (one,) = found(program, *arguments, unknown_trips=3)
  assert (one.kind, one.total) == ('all-reduce', 3 * 16 * 4)


def test_argument_bytes_are_those_of_one_device():
  def program(state):
    return state['w'] * 2, state['v'] + 1

  state = {'w': shape((64, 8), 'fsdp'), 'v': shape((6,))}
  text = jax.jit(program).lower(state).compile().as_text()
  assert hlo.argument_bytes(text, "state['w']") == 64 * 8 * 4 // 4
  assert hlo.argument_bytes(text, 'state') == 64 * 8 * 4 // 4 + 24


@pytest.mark.parametrize(
  ('groups', 'size', 'axes'),
  [
    ('{{0,2,4,6},{1,3,5,7}}', 4, ('fsdp',)),
    ('[4,2]<=[8]', 2, ('expert',)),
    ('[2,4]<=[4,2]T(1,0)', 4, ('fsdp',)),
    ("mesh['data'=1,'fsdp'=4,'expert'=2] {'fsdp'}", 4, ('fsdp',)),
    ("mesh['axis_0'=8] {'axis_0'}", 8, ('fsdp', 'expert')),
    ("mesh['axis_0'=8] {'axis_0':(4)2}", 2, ('expert',)),
    ('{}', 8, ('fsdp', 'expert')),
  ],
)
def test_groups_are_read_in_every_spelling_of_xla(groups, size, axes):
  text = f"""
ENTRY %main (x: f32[4]) -> f32[4] {{
  %x = f32[4]{{0}} parameter(0)
  ROOT %sum = f32[4]{{0}} all-reduce(%x), replica_groups={groups}, to_apply=%add
}}
"""
  (one,) = hlo.collectives(text, SIZES)
  assert (one.group, one.axes, one.bytes) == (size, axes, 16)


def test_gpu_spellings_of_asynchronous_collectives_are_read():
  text = """
ENTRY %main (x: bf16[4,8]) -> bf16[16,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %start = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%x), \
replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %done = bf16[16,8]{1,0} all-gather-done(%start)
  %part = bf16[4,8]{1,0} reduce-scatter(%done), \
replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, to_apply=%add
  ROOT %out = bf16[16,8]{1,0} copy(%done)
}
"""
  totals = hlo.totals(hlo.collectives(text, SIZES))
  assert totals == {'all-gather': 256, 'reduce-scatter': 256}
