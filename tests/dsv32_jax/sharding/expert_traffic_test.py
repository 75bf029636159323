"""Programs of the routed experts: what they send, and what they do not."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from dsv32_jax.config import presets
from dsv32_jax.functional.expert_exchange import Exchange
from dsv32_jax.sharding import (
  axes,
  expert_parallel,
  expert_traffic,
  parallel,
  rules,
)
from dsv32_jax.sharding.planning import hlo
from tests.support import expert_layouts as layouts
from tests.support import tiny_configs

pytestmark = pytest.mark.multidevice


def _collectives(layout, text, **options):
  sizes = dict(layout.mesh.shape)
  found = hlo.collectives(text, sizes, **options)
  # The number of rounds is agreed on with one integer.
  return [one for one in found if one.bytes > 4]


def test_moe_program_gathers_no_experts_and_no_tokens():
  """Experts over fsdp only; other all-gathers are of small matrices."""
  cfg = tiny_configs.config(**layouts.SIZES, moe_intermediate_size=40)
  layout = layouts.layout(expert=4, fsdp=2)
  with parallel.use(layout):
    place = functools.partial(
      jax.tree.map,
      lambda box: layout.sharding(*box.names),
      is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned),
    )
    tokens = layout.sharding(axes.BATCH, axes.SEQUENCE, None)
    valid = layout.sharding(axes.BATCH, axes.SEQUENCE)
    arguments = layouts.variables(cfg, 'none'), *layouts.inputs(cfg, (16, 40))
    shardings = place(layouts.boxed(cfg)), tokens, tokens, valid
    arguments = jax.device_put(arguments, shardings)
    program = layouts.gradients(cfg, layouts.TINY).lower(*arguments)
    text = program.compile().as_text()
  D, E, F = cfg.hidden_size, 16, 40
  gathers = [
    one
    for one in _collectives(layout, text, unknown_trips=1)
    if one.kind == 'all-gather'
  ]
  experts = [one for one in gathers if 'routed_experts' in one.scope]
  assert {(one.axes, one.bytes) for one in experts} == {
    (('fsdp',), E // 4 * D * F * 4)
  }
  others = [one for one in gathers if one not in experts]
  assert {one.bytes for one in others} <= {D * F * 4, D * E * 4}
  # Nothing holds the shared experts back until the tokens are there, and the
  # first round is no loop's.
  assert 'optimization_barrier' not in program.as_text()
  first = _collectives(layout, text, unknown_trips=0)
  assert sum(one.count for one in first if one.kind == 'all-to-all') >= 6


def test_routed_experts_under_remat_exchange_once_forward():
  """Two layers in a scan: what remat makes again sends no row."""
  layout = layouts.layout(expert=4, fsdp=2)
  apply = layouts.region(layout, Exchange())
  weights, x, gate, dy = layouts.region_inputs('float32')
  index = jnp.asarray(
    layouts.routing(np.random.default_rng(0), 'uniform'), jnp.int32
  )
  stacked = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), weights)

  @jax.checkpoint
  def layer(x, weights):
    return x + apply(weights, jnp.tanh(x), index, gate), None

  def loss(stacked, x):
    return jnp.sum(jax.lax.scan(layer, x, stacked)[0] ** 2 * dy)

  program = tiny_configs.jit(jax.grad(loss, (0, 1)))
  text = program.lower(stacked, x).compile().as_text()
  trips = [
    one for one in _collectives(layout, text) if one.kind == 'all-to-all'
  ]
  # Choices and gates, equal in both layers here, are smaller.
  row_bytes = max(one.bytes for one in trips)
  rows = [one.count for one in trips if one.bytes == row_bytes]
  assert sum(rows) == 2 * (2 + 3)


TRAFFIC = {
  'one_round': ({'expert': 4, 'fsdp': 2}, Exchange(), 1),
  'rounds': ({'data': 2, 'expert': 2, 'fsdp': 2}, Exchange(capacity=3), 3),
  'tensor_and_context': (
    {'name': 'everything', 'expert': 2, 'context': 2, 'tensor': 2},
    Exchange(),
    1,
  ),
  'one_device_along_expert': (
    {'name': 'fsdp', 'data': 2, 'fsdp': 4},
    Exchange(),
    1,
  ),
}


@pytest.mark.parametrize(
  'case',
  [
    'rounds',
    'tensor_and_context',
    pytest.param('one_round', marks=pytest.mark.slow),
    pytest.param('one_device_along_expert', marks=pytest.mark.slow),
  ],
)
def test_layer_traffic_equals_compiled_collectives(case):
  sizes, exchange, rounds = TRAFFIC[case]
  layout = layouts.layout(**sizes)
  cfg = tiny_configs.config(**layouts.SIZES)
  weights, x, gate, dy = layouts.region_inputs('float32')
  weights = tuple(
    jax.device_put(w, layout.sharding(*names))
    for w, names in zip(weights, layouts.WEIGHT_AXES, strict=True)
  )
  index = jnp.asarray(
    layouts.routing(np.random.default_rng(0), 'uniform'), jnp.int32
  )
  apply = layouts.region(layout, expert_parallel.sized(exchange, cfg, layout))

  def backward(weights, x, index, gate, dy):
    _, vjp = jax.vjp(lambda w, x, g: apply(w, x, index, g), weights, x, gate)
    return vjp(dy)

  planned = expert_traffic.layer_traffic(
    cfg,
    layout,
    batch_size=layouts.B,
    seq_len=layouts.T,
    exchange=exchange,
    rounds=rounds,
  )
  tokens = layout.sharding(axes.BATCH, axes.SEQUENCE, None)
  places = tuple(layout.sharding(*names) for names in layouts.WEIGHT_AXES)
  x, index, gate, dy = jax.device_put((x, index, gate, dy), tokens)
  programs = (
    (apply, (weights, x, index, gate), tokens, planned.forward),
    (
      backward,
      (weights, x, index, gate, dy),
      (places, tokens, tokens),
      planned.backward,
    ),
  )
  for function, arguments, out_shardings, messages in programs:
    program = tiny_configs.jit(function, out_shardings=out_shardings)
    text = program.lower(*arguments).compile().as_text()
    found = _collectives(layout, text, unknown_trips=rounds - 1)
    actual, desired = {}, {}
    for one in found:
      key = one.kind, one.axes
      actual[key] = actual.get(key, 0) + one.total
    for one in messages:
      key = one.kind, one.axis_names
      desired[key] = desired.get(key, 0) + one.bytes * one.count
    assert actual == desired


def test_layer_traffic_of_the_published_model_is_rows_times_width():
  """Numbers of the plan, by hand."""
  sizes = tuple(
    {'fsdp': 32, 'expert': 64}.get(name, 1) for name in rules.MESH_AXES
  )
  mesh = AbstractMesh(
    sizes,
    rules.MESH_AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * len(sizes),
  )
  layout = parallel.Parallel(mesh, rules.RULE_SETS['fsdp_expert'])
  cfg = presets.deepseek_v32_671b()
  dense, ragged = (
    expert_traffic.layer_traffic(
      cfg,
      layout,
      batch_size=2048,
      seq_len=4096,
      exchange=Exchange(kind=kind),
    )
    for kind in ('dense', 'ragged')
  )
  # Four groups of eight devices, of which each has four of their 128 experts:
  # a token misses a device if all its eight lie among the other 124.
  missed = 120 * 119 * 118 * 117 / (128 * 127 * 126 * 125)
  visits = 32 * (1 - missed)
  slots = 592  # 1.25 * 4096 * visits / 64, up to a multiple of 8
  rows, choices = dense.forward[1:]
  assert rows.bytes == 64 * slots * 7168 * 2
  assert (rows.count, choices.bytes) == (2, 64 * slots * 8 * 8)
  assert dense.backward[1].count == 3
  assert ragged.forward[1].filled == pytest.approx(4096 * visits / (64 * slots))
  assert dense.forward[0].bytes == 4 * 7168 * 2048 * 2
  assert ragged.forward[1].sent == pytest.approx(
    2 * 63 / 64 * 4096 * visits * 7168 * 2
  )


def test_routed_experts_lowered_for_gpus_send_filled_slots_only():
  """Two ragged trips forward, three backward, in a first round and a loop."""
  layout = layouts.layout(expert=4, fsdp=2)
  weights, x, gate, dy = layouts.region_inputs('float32')
  index = jnp.zeros(gate.shape, jnp.int32)
  counts = {}
  for kind, platform in (
    ('ragged', 'cuda'),
    ('dense', 'cuda'),
    (None, 'cuda'),
  ):
    exchange = Exchange(capacity=3, kind=kind)
    run = layouts.with_gradients(layouts.region(layout, exchange))
    text = (
      run.trace(weights, x, index, gate, dy)
      .lower(lowering_platforms=(platform,))
      .as_text()
    )
    counts[kind, platform] = text.count('@ragged_all_to_all')
  assert counts == {
    ('ragged', 'cuda'): 10,
    ('dense', 'cuda'): 0,
    (None, 'cuda'): 0,
  }
