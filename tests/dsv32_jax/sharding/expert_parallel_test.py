"""Experts on eight devices against one device, in float64 and float32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.functional.expert_exchange import Exchange
from dsv32_jax.sharding import axes, parallel, rules
from tests.support import expert_layouts as layouts
from tests.support import tiny_configs

pytestmark = pytest.mark.multidevice

LAYOUTS = {
  'expert8': (functools.partial(layouts.layout, expert=8), layouts.ONE_ROUND),
  'expert4_fsdp2': (
    functools.partial(layouts.layout, expert=4, fsdp=2),
    layouts.TINY,
  ),
  'expert2_context2_tensor2': (
    functools.partial(
      layouts.layout, 'everything', expert=2, context=2, tensor=2
    ),
    layouts.TINY,
  ),
  'data2_expert4': (
    functools.partial(layouts.layout, data=2, expert=4),
    layouts.ONE_ROUND,
  ),
  'data2_fsdp4': (
    functools.partial(layouts.layout, 'fsdp', data=2, fsdp=4),
    layouts.TINY,
  ),
  'context2_fsdp2_expert2': (
    functools.partial(
      layouts.layout, 'fsdp_expert_context', context=2, fsdp=2, expert=2
    ),
    layouts.ONE_ROUND,
  ),
}


def _quick_and_slow():
  for name in LAYOUTS:
    quick = ('expert8', 'expert4_fsdp2', 'expert2_context2_tensor2')
    yield pytest.param(name, marks=[] if name in quick else pytest.mark.slow)


def _assert_close(actual, desired, tolerance):
  def check(path, a, b):
    a, b = np.asarray(a), np.asarray(b)
    scale = float(np.sqrt(np.mean(np.square(b, dtype=np.float64))))
    np.testing.assert_allclose(
      a,
      b,
      rtol=tolerance,
      atol=tolerance * scale,
      err_msg=jax.tree_util.keystr(path),
    )

  jax.tree_util.tree_map_with_path(check, actual, desired)


@functools.cache
def _one_device():
  """Results of the module without a mesh, float64, by kind of skew."""
  with layouts.float64() as cfg, parallel.use(None):
    program = layouts.gradients(cfg)
    return {
      skew: jax.tree.map(
        np.asarray, program(layouts.variables(cfg, skew), *layouts.inputs(cfg))
      )
      for skew in ('none', 'one_device', 'few')
    }


@pytest.mark.parametrize('name', [*_quick_and_slow()])
def test_moe_on_many_devices_equals_one_device_in_float64(name):
  """Outputs, load, balance loss, dx, dw, d_router; balanced and skewed."""
  make_layout, exchange = LAYOUTS[name]
  results = _one_device()
  with layouts.float64() as cfg, parallel.use(make_layout()):
    program = layouts.gradients(cfg, exchange)
    for skew, desired in results.items():
      actual = program(layouts.variables(cfg, skew), *layouts.inputs(cfg))
      _assert_close(actual, desired, 1e-9)
      load_E = desired[0][1].expert_load_E
      assert (skew == 'none') == (np.count_nonzero(load_E) == 16)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['data2_fsdp4', 'expert4_fsdp2'])
def test_moe_on_many_devices_equals_one_device_in_float32(name):
  make_layout, exchange = LAYOUTS[name]
  cfg = tiny_configs.config(**layouts.SIZES)
  arguments = layouts.variables(cfg, 'none'), *layouts.inputs(cfg)
  desired = layouts.gradients(cfg)(*arguments)
  with parallel.use(make_layout()):
    actual = layouts.gradients(cfg, exchange)(*arguments)

  def check(path, a, b):
    error = np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b)
    assert error < 2e-5, jax.tree_util.keystr(path)

  jax.tree_util.tree_map_with_path(check, actual, desired)


def test_routed_experts_random_routings_equal_one_device():
  """A small capacity and small chunks, which most routings overflow."""
  with layouts.float64() as cfg:
    dtype = jnp.dtype(cfg.precision.compute)
    layout = layouts.layout(data=2, expert=4)
    many = layouts.with_gradients(
      layouts.region(layout, Exchange(capacity=3, chunk=10))
    )
    one = layouts.with_gradients(layouts.one_device_region)
    for seed in range(24):
      rng = np.random.default_rng(seed)
      kind = layouts.KINDS[seed % len(layouts.KINDS)]
      index = jnp.asarray(layouts.routing(rng, kind), jnp.int32)
      weights, x, gate, dy = layouts.region_inputs(dtype, seed)
      arguments = weights, x, index, gate, dy
      _assert_close(many(*arguments), one(*arguments), 1e-9)


@pytest.mark.slow
def test_routed_experts_any_capacity_and_chunk_give_the_same():
  with layouts.float64() as cfg:
    dtype = jnp.dtype(cfg.precision.compute)
    weights, x, gate, dy = layouts.region_inputs(dtype)
    rng = np.random.default_rng(0)
    routings = [
      jnp.asarray(layouts.routing(rng, kind), jnp.int32)
      for kind in ('one_expert', 'one_device', 'uniform')
    ]
    layout, results = layouts.layout(expert=8), []
    for exchange in (
      Exchange(capacity=layouts.B * layouts.T // 8),
      Exchange(capacity=1),
    ):
      run = layouts.with_gradients(layouts.region(layout, exchange))
      results.append([run(weights, x, i, gate, dy) for i in routings])
    _assert_close(results[1], results[0], 1e-12)


@pytest.mark.slow
def test_routed_experts_one_token_a_row_is_filled_up_to_whole_shards():
  """Decoding: three rows of one token on eight devices, and on one row each."""
  with layouts.float64() as cfg:
    dtype = jnp.dtype(cfg.precision.compute)
    weights, x, gate, dy = layouts.region_inputs(dtype)
    index = layouts.routing(np.random.default_rng(0), 'uniform')
    for layout in (
      layouts.layout('decode_expert', expert=4, tensor=2),
      layouts.layout('fsdp_expert_context', expert=4, context=2),
    ):
      arguments = (
        weights,
        *(jnp.asarray(a)[:3, :1] for a in (x, index, gate, dy)),
      )
      many = layouts.with_gradients(layouts.region(layout, Exchange()))
      one = layouts.with_gradients(layouts.one_device_region)
      _assert_close(many(*arguments), one(*arguments), 1e-9)


@pytest.mark.parametrize(
  ('changes', 'sizes', 'message'),
  [
    ({axes.BATCH: ('data',)}, {'expert': 2}, 'expected only axes that tokens'),
    (
      {axes.EMBED: ('tensor',)},
      {'tensor': 2},
      'expected only axes that tokens',
    ),
    (
      {axes.EXPERT_MLP: ('fsdp',)},
      {'fsdp': 2},
      'expected only axes that tokens are not cut over',
    ),
    ({}, {'expert': 3}, 'got 16, expected a multiple of the 3 devices'),
  ],
)
def test_routed_experts_refuse_rules_that_would_sum_wrongly(
  changes, sizes, message
):
  base = rules.RULE_SETS['fsdp_expert'].mesh_axes
  rule_set = rules.RuleSet('odd', {**base, **changes})
  layout = dataclasses.replace(layouts.layout(**sizes), rules=rule_set)
  weights, x, gate, _ = layouts.region_inputs('float32')
  index = jnp.zeros(gate.shape, jnp.int32)
  with pytest.raises(ValueError, match=message):
    layouts.region(layout, Exchange())(weights, x, index, gate)
