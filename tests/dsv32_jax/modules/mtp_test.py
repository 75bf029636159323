"""The MTP module inside the model: what it reads and what it predicts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax.config.model import DENSE_WARMUP
from dsv32_jax.modules.transformer import DeepSeekV32
from tests.support import tiny_configs

# No dense layer: less to compile, and the MTP block has experts anyway.
CFG = tiny_configs.config(
  num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=1
)
T = 12
# Every position holds its own token, so its own row of the embedding.
TOKENS = jnp.arange(3, 3 + T, dtype=jnp.int32)[None]


@functools.lru_cache
def _pulled():
  """Gradients of a position's MTP logits and of its main logits."""
  model = DeepSeekV32(CFG)

  def gradients(variables, position):
    rest = {k: v for k, v in variables.items() if k != 'params'}

    def logits(params):
      output = model.apply({'params': params, **rest}, TOKENS, compute_mtp=True)
      return tuple(
        jnp.sum(jnp.sin(x_BTV[0, position]))
        for x_BTV in (output.mtp_logits_BTV, output.logits_BTV)
      )

    _, pull = jax.vjp(logits, variables['params'])
    return pull((1.0, 0.0))[0], pull((0.0, 1.0))[0]

  return tiny_configs.jit(gradients)


def _variables():
  return tiny_configs.variables(CFG)


def _embedding_size(gradient):
  return np.abs(np.asarray(gradient['embedding'])[3 : 3 + T]).max(-1)


def test_mtp_logits_read_the_next_token_and_none_after_it():
  """Position i sees t_{i+1} and so predicts t_{i+2}; the main head t_{i+1}."""
  for position in (0, 4, T - 2):
    mtp, main = _pulled()(_variables(), position)
    size_T, main_T = _embedding_size(mtp), _embedding_size(main)
    np.testing.assert_array_equal(size_T[position + 2 :], 0)
    np.testing.assert_array_equal(main_T[position + 1 :], 0)
    assert size_T[position + 1] > 0
    assert size_T[position] > 0


def test_mtp_projection_takes_the_embedding_half_first():
  """[norm(e) ; norm(h)], as released; a loader relies on it."""
  half = CFG.hidden_size

  def without(rows):
    params = dict(_variables()['params'])
    w_eh = params['mtp']['w_eh'].at[rows].set(0)
    params['mtp'] = params['mtp'] | {'w_eh': w_eh}
    return _variables() | {'params': params}

  for rows, used, unused in (
    (slice(half, None), ('mtp', 'embedding_norm'), ('final_norm',)),
    (slice(None, half), ('final_norm',), ('mtp', 'embedding_norm')),
  ):
    gradient, _ = _pulled()(without(rows), 4)

    def at(path, tree=gradient):
      return functools.reduce(lambda node, name: node[name], path, tree)

    assert np.abs(at(used)['scale']).max() > 0
    np.testing.assert_array_equal(at(unused)['scale'], 0)


def test_mtp_shares_embedding_and_head_and_owns_the_rest():
  params = _variables()['params']
  assert set(params['mtp']) == {
    'embedding_norm', 'hidden_norm', 'w_eh', 'block', 'head_norm',
  }  # fmt: skip
  assert 'indexer' in params['mtp']['block']['attention']
  gradient, _ = _pulled()(_variables(), 4)
  assert np.abs(gradient['lm_head']).max() > 0


def test_mtp_block_has_an_indexer_of_its_own():
  """Its KL follows its own indexer alone, and the others' ignore it."""
  params = _variables()['params']

  def losses(params):
    output = tiny_configs.forward(
      CFG, DENSE_WARMUP, compute_mtp=True, compute_logits=False
    )(_variables() | {'params': params}, TOKENS)
    assert output.mtp_logits_BTV is None
    return np.asarray(output.indexer_kl_L)

  def doubled(name):
    def change(path, leaf):
      names = [key.key for key in path]
      own = name in names and 'w_iw' in names
      return 2 * leaf if own else leaf

    return jax.tree_util.tree_map_with_path(change, params)

  base = losses(params)
  assert base.shape == (2,)
  assert (losses(doubled('mtp')) != base).tolist() == [False, True]
  assert (losses(doubled('moe_layers')) != base).tolist() == [True, False]


def test_mtp_is_left_out_unless_asked_for():
  output = tiny_configs.forward(CFG)(_variables(), TOKENS)
  assert output.mtp_logits_BTV is None
  assert output.expert_load_LE.shape[0] == 1
  without = dataclasses.replace(CFG, num_nextn_predict_layers=0)
  assert 'mtp' not in tiny_configs.variables(without)['params']
