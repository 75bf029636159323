"""A stack of blocks under every way of storing and recomputing it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.config.model import SPARSE_TRAINING
from dsv32_jax.functional import masking
from dsv32_jax.modules import block
from dsv32_jax.modules.dsa import AttentionContext
from tests.support import tiny_configs, tolerances

ROWS = tiny_configs.rows([[20], [11, 7]])


def _context():
  segment_ids_BT = jnp.asarray(ROWS['segment_ids'])
  start_BT, end_BT = masking.key_ranges(segment_ids_BT)
  return AttentionContext(
    positions_BT=jnp.asarray(ROWS['positions']),
    key_start_BT=start_BT,
    key_end_BT=end_BT,
    row_weight_BT=(segment_ids_BT > 0) / jnp.sum(segment_ids_BT > 0),
  )


@functools.lru_cache
def _loss_and_gradients(remat, *, scan):
  """Of two dense blocks with sparse attention and the indexer loss.

  Policies name nothing inside an FFN, and experts cost time to compile.
  """
  cfg = tiny_configs.config(remat=remat, scan_layers=scan)
  stack = block.Stack(cfg, SPARSE_TRAINING, False, 2)
  # The weights of the two layers, in the shape that this stack wants.
  model = tiny_configs.config(first_k_dense_replace=2)
  params = tiny_configs.variables(model)['params']['dense_layers']
  if not scan:
    params = {
      f'layer_{i}': jax.tree.map(lambda leaf, i=i: leaf[i], params['layers'])
      for i in range(2)
    }
  x_BTD = jnp.asarray(
    np.random.default_rng(0).standard_normal((2, 20, cfg.hidden_size)),
    jnp.float32,
  )

  def loss(params, x_BTD):
    h_BTD, reports = stack.apply({'params': params}, x_BTD, _context())
    if not scan:
      reports = jax.tree.map(lambda *leaves: jnp.stack(leaves), *reports)
    valid_BT = jnp.asarray(ROWS['segment_ids'] > 0)
    main = jnp.sum(jnp.where(valid_BT[..., None], jnp.sin(h_BTD), 0))
    return main + jnp.sum(reports.attention.indexer_kl)

  value, gradients = tiny_configs.jit(jax.value_and_grad(loss, (0, 1)))(
    params, x_BTD
  )
  params, x = gradients
  if not scan:
    params = {
      'layers': jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *params.values()
      )
    }
  return value, params, x


@pytest.mark.parametrize(
  ('remat', 'scan'),
  [
    pytest.param('save_attention', True, marks=pytest.mark.slow),
    ('full', True),
    pytest.param('none', False, marks=pytest.mark.slow),
  ],
)
def test_stack_loss_and_gradients_do_not_depend_on_remat_or_scan(remat, scan):
  value, *gradients = _loss_and_gradients('none', scan=True)
  other, *other_gradients = _loss_and_gradients(remat, scan=scan)
  np.testing.assert_allclose(other, value, rtol=1e-6)
  tolerances.assert_close(other_gradients, gradients, gradient=True)
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))


def test_rematted_refuses_nothing_and_leaves_none_unwrapped():
  assert block.rematted(block.Block, 'none', scanned=True) is block.Block
  assert block.rematted(block.Block, 'full', scanned=True) is not block.Block


@pytest.mark.parametrize(
  ('remat', 'attentions'), [('save_attention', 1), ('full', 2)]
)
def test_remat_policy_decides_what_runs_again(remat, attentions):
  """The backward pass never selects again, and attends again under 'full'."""
  cfg = tiny_configs.config(remat=remat, scan_layers=False)
  stack = block.Stack(cfg, SPARSE_TRAINING, False, 1)
  whole = tiny_configs.variables(tiny_configs.config())['params']
  params = {
    'layer_0': jax.tree.map(lambda x: x[0], whole['dense_layers']['layers'])
  }
  x_BTD = jnp.ones((2, 20, cfg.hidden_size))

  def loss(params):
    h_BTD, _ = stack.apply({'params': params}, x_BTD, _context())
    return jnp.sum(h_BTD)

  program = jax.make_jaxpr(jax.value_and_grad(loss))(params)
  assert _count(program.jaxpr, 'indexed_topk') == 1
  assert _count(program.jaxpr, 'attention_out') == attentions


def _count(jaxpr, name):
  """Calls of the jitted function, or values, of this name that are used."""
  jaxpr = jax.interpreters.partial_eval.dce_jaxpr(
    jaxpr, [True] * len(jaxpr.outvars)
  )[0]
  found = 0
  for equation in jaxpr.eqns:
    found += equation.params.get('name') == name
    for value in equation.params.values():
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns') and equation.params.get('name') != name:
        found += _count(inner, name)
  return found
