"""Evaluations on eight devices give what they give on one.

Three rows do not divide over four shares of rows; sequences are cut in two.
"""

import functools

import jax
import numpy as np
import pytest

from dsv32_jax.config.model import DENSE, SPARSE
from dsv32_jax.config.training import MeshConfig
from dsv32_jax.data import RecallBatch
from dsv32_jax.evaluation import perplexity, recall_task, selection_recall
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.sharding import mesh as mesh_lib
from dsv32_jax.sharding import parallel as parallel_lib
from dsv32_jax.training import state
from tests.support import parity, tiny_configs

pytestmark = [
  pytest.mark.multidevice,
  pytest.mark.slow,
  pytest.mark.exhaustive,
  pytest.mark.timeout(300),
]

CFG = parity.config(num_nextn_predict_layers=0)
MODEL = DeepSeekV32(CFG)
MESH = MeshConfig(rules='fsdp_expert_context', fsdp=2, expert=2, context=2)
ROWS = tiny_configs.rows(parity.DOCUMENTS[:3], length=parity.LENGTH)


@functools.cache
def _layout():
  return mesh_lib.make_parallel(MESH)


def _on_both(function):
  """The results of `function(variables)` on one device and on eight."""
  variables = tiny_configs.variables(CFG)
  alone = function(variables)
  shapes = state.variable_shapes(MODEL, _layout())
  placed = jax.tree.map(
    lambda leaf, shape: jax.device_put(leaf, shape.sharding), variables, shapes
  )
  with parallel_lib.use(_layout()):
    return alone, function(placed)


@pytest.mark.parametrize(
  'attention',
  [DENSE, SPARSE],
  ids=['dense', 'sparse'],
)
def test_held_out_loss_under_a_layout_is_that_of_one_device(attention):
  one, many = _on_both(
    lambda variables: perplexity.held_out_loss(
      MODEL, variables, [ROWS], attention
    )
  )
  assert many.tokens == one.tokens
  np.testing.assert_allclose(many.loss, one.loss, rtol=1e-5)
  np.testing.assert_allclose(many.by_position, one.by_position, rtol=1e-4)
  np.testing.assert_allclose(many.pairs_per_token, one.pairs_per_token)


def test_selection_quality_under_a_layout_is_that_of_one_device():
  one, many = _on_both(
    lambda variables: selection_recall.selection_quality(
      MODEL, variables, ROWS['tokens'], ROWS['segment_ids'], jax.random.key(0)
    )
  )
  assert float(many.rows) == float(one.rows)
  assert float(one.rows) > 30
  for name in one.sums:
    if name == 'mass/random':  # The draw depends on how many rows there are.
      continue
    np.testing.assert_allclose(
      many.sums[name], one.sums[name], rtol=1e-4, atol=1e-4, err_msg=name
    )


def test_recall_accuracy_under_a_layout_is_that_of_one_device():
  output = tiny_configs.forward(CFG, SPARSE)(
    tiny_configs.variables(CFG), ROWS['tokens']
  )
  best_BT = np.asarray(np.argmax(output.logits_BTV, axis=-1), np.int32)
  row, position = np.indices(best_BT.shape)
  answer = best_BT.ravel().copy()
  answer[::3] = (answer[::3] + 1) % CFG.vocab_size
  batch = RecallBatch(
    batch=ROWS,
    row=row.ravel(),
    position=position.ravel(),
    distance=np.full(answer.shape, 5),
    answer=answer,
    candidates=np.zeros((answer.size, 8), np.int32),
  )
  one, many = _on_both(
    lambda variables: recall_task.recall_accuracy(
      MODEL, variables, {5: [batch]}, SPARSE
    )
  )
  assert one == {5: 2 / 3}
  assert many == one
