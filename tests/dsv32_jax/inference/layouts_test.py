"""Decoding on eight devices gives the tokens of one."""

import jax
import numpy as np
import pytest

from dsv32_jax import inference
from dsv32_jax.config.training import MeshConfig
from dsv32_jax.inference import cached
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.sharding import mesh as mesh_lib
from dsv32_jax.sharding import parallel as parallel_lib
from dsv32_jax.training import state
from tests.support import parity, tiny_configs

pytestmark = [pytest.mark.multidevice, pytest.mark.timeout(300)]

CFG = parity.config(num_nextn_predict_layers=0)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15, 16]]


@pytest.mark.slow
@pytest.mark.parametrize('requests', [4, 3], ids=['four', 'three'])
def test_generate_under_a_layout_gives_the_tokens_of_one_device(requests):
  model, variables = DeepSeekV32(CFG), tiny_configs.variables(CFG)
  options = {'prompts': PROMPTS[:requests], 'max_new_tokens': 6}
  one = inference.generate(model, variables, **options)
  layout = mesh_lib.make_parallel(
    MeshConfig(rules='decode_expert', data=2, expert=2, tensor=2)
  )
  shapes = state.variable_shapes(model, layout)
  placed = jax.tree.map(
    lambda leaf, shape: jax.device_put(leaf, shape.sharding), variables, shapes
  )
  with parallel_lib.use(layout):
    many = inference.generate(model, placed, **options)
  np.testing.assert_array_equal(many.tokens_BN, one.tokens_BN)
  np.testing.assert_allclose(many.logprobs_BN, one.logprobs_BN, atol=1e-5)


def test_unrolled_layers_and_caches_are_laid_out_by_the_rules():
  layout = mesh_lib.make_parallel(
    MeshConfig(rules='decode_expert', data=2, expert=2, tensor=2)
  )
  model = DeepSeekV32(CFG)
  shapes = state.variable_shapes(model, layout)
  variables = jax.tree.map(
    lambda shape: jax.device_put(
      np.zeros(shape.shape, shape.dtype), shape.sharding
    ),
    shapes,
  )
  with parallel_lib.use(layout):
    _, unrolled = inference.unroll(model, variables)
    caches = cached.init_state(CFG, batch=8, capacity=16).caches
  w_gate = unrolled['params']['moe_layers']['layer_0']['moe']['experts'][
    'w_gate'
  ]
  assert w_gate.sharding.shard_shape(w_gate.shape) == (4, 16, 8)
  for leaf in jax.tree.leaves(caches):
    assert leaf.sharding.shard_shape(leaf.shape)[0] == 2
