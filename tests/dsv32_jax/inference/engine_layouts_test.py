"""The engine on eight devices gives the tokens of one."""

import jax
import numpy as np
import pytest

from dsv32_jax import inference
from dsv32_jax.config.training import MeshConfig
from dsv32_jax.inference import Record, Request
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.sharding import mesh as mesh_lib
from dsv32_jax.sharding import parallel as parallel_lib
from dsv32_jax.training import state
from tests.support import parity, tiny_configs

CFG = parity.config(num_nextn_predict_layers=1, max_position_embeddings=64)


def _completions(variables, speculative):
  generator = np.random.default_rng(0)
  engine = inference.Engine(
    DeepSeekV32(CFG),
    variables,
    inference.EngineConfig(
      max_batch=4,
      page_size=8,
      prefill_chunk=16,
      decode_steps=2,
      speculative=speculative,
      # Rows are packed anew within each group as requests end.
      least_rows=None if speculative else 1,
    ),
  )
  tickets = [
    engine.submit(
      Request(
        prompt=tuple(generator.integers(0, CFG.vocab_size, size).tolist()),
        max_new_tokens=8,
        record=Record(experts=True, selected=True),
      )
    )
    for size in (3, 30, 9, 1, 17, 6)
  ]
  engine.run()
  return [ticket.result(0) for ticket in tickets], engine


@pytest.mark.multidevice
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
  'speculative', [pytest.param(False, marks=pytest.mark.exhaustive), True]
)
def test_engine_under_a_layout_gives_the_tokens_of_one_device(speculative):
  variables = tiny_configs.variables(CFG)
  one, _ = _completions(variables, speculative)
  layout = mesh_lib.make_parallel(
    MeshConfig(rules='decode_expert', data=2, expert=2, tensor=2)
  )
  shapes = state.variable_shapes(DeepSeekV32(CFG), layout)
  placed = jax.tree.map(
    lambda leaf, shape: jax.device_put(leaf, shape.sharding), variables, shapes
  )
  with parallel_lib.use(layout):
    many, engine = _completions(placed, speculative)
  groups = layout.size(*layout.axes_of('batch'))
  assert groups > 1
  for leaf in jax.tree.leaves(engine._memory.caches):
    # Every group of devices has pages of its own.
    assert leaf.sharding.shard_shape(leaf.shape)[0] == leaf.shape[0] // groups
  for ours, theirs in zip(many, one, strict=True):
    assert ours.tokens == theirs.tokens
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)
    np.testing.assert_array_equal(ours.experts, theirs.experts)
    np.testing.assert_array_equal(
      np.sort(ours.selected, axis=-1), np.sort(theirs.selected, axis=-1)
    )


@pytest.mark.multidevice
def test_engine_refuses_a_batch_that_the_groups_cannot_share():
  layout = mesh_lib.make_parallel(
    MeshConfig(rules='decode_expert', data=2, expert=2, tensor=2)
  )
  with (
    parallel_lib.use(layout),
    pytest.raises(ValueError, match='max_batch: got 3, expected a multiple'),
  ):
    inference.Engine(
      DeepSeekV32(CFG),
      tiny_configs.variables(CFG),
      inference.EngineConfig(max_batch=3),
    )
