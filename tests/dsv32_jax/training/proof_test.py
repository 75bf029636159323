"""The warm-up's proof accepts a warm-up and finds every planted change."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from dsv32_jax.modules.moe import ROUTER_BIAS
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.training import proof
from tests.support import tiny_configs

CFG = tiny_configs.config(num_hidden_layers=1)
ROWS = tiny_configs.rows([[11, 7], [20]])
LINES = ({'sparsity/realised': [0.0]}, {'sparsity/realised': [0.0]})


def _before():
  bias = {'moe': np.zeros(4, np.float32)}
  return tiny_configs.variables(CFG) | {ROUTER_BIAS: bias}


def _change(variables, where, change):
  """Changes the leaves whose path holds all the given names."""

  def one(path, leaf):
    names = {key.key for key in path}
    return change(leaf) if where <= names else leaf

  return jax.tree_util.tree_map_with_path(one, variables)


def _after():
  return _change(_before(), {'indexer'}, lambda leaf: leaf + 0.01)


@functools.lru_cache
def _kl():
  return proof.full_row_kl(DeepSeekV32(CFG), tiny_configs.variables(CFG), ROWS)


def _proof(monkeypatch, after=None, lines=LINES, kl=None):
  monkeypatch.setattr(proof, 'full_row_kl', lambda *_: kl or _kl())
  return proof.warmup_proof(
    DeepSeekV32(CFG), _before(), after or _after(), lines, ROWS
  )


def test_full_row_kl_is_the_training_loss_over_every_preceding_token():
  trained_L, direct_L = _kl()
  assert trained_L.shape == (1,)
  assert trained_L[0] > 0.01
  np.testing.assert_allclose(trained_L, direct_L, rtol=1e-4)


def test_full_row_kl_finds_a_loss_that_leaves_out_a_key(monkeypatch):
  real = pallas_kernels.indexer_kl

  def without_first_key(*args, key_start_BT, key_end_BT, **options):
    start_BT = jnp.minimum(key_start_BT + 1, key_end_BT)
    return real(*args, key_start_BT=start_BT, key_end_BT=key_end_BT, **options)

  monkeypatch.setattr(pallas_kernels, 'indexer_kl', without_first_key)
  kl = proof.full_row_kl(DeepSeekV32(CFG), tiny_configs.variables(CFG), ROWS)
  monkeypatch.undo()
  found = _proof(monkeypatch, kl=kl)
  assert not found['full_row_kl']
  with pytest.raises(RuntimeError, match='full_row_kl is false'):
    proof.require(found)


def test_proof_accepts_a_warmup_and_is_json(monkeypatch):
  found = _proof(monkeypatch)
  proof.require(found)
  assert found['arrays_changed'] == []
  assert found['steps'] == 2
  moved = found['largest_change_of_each_indexer_array']
  assert len(moved) == 5
  np.testing.assert_allclose(list(moved.values()), 0.01, rtol=1e-3)
  everything = jax.tree.leaves(_before())
  assert found['arrays_compared'] == len(everything) - 5
  assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
  'where', [{'w_dkv'}, {'final_norm', 'scale'}, {ROUTER_BIAS}]
)
def test_proof_finds_one_bit_in_one_other_array(monkeypatch, where):
  def last_bit(leaf):
    leaf = np.array(leaf)
    leaf.ravel()[-1] = np.nextafter(leaf.ravel()[-1], np.float32(9))
    return leaf

  found = _proof(monkeypatch, after=_change(_after(), where, last_bit))
  assert not found['others_bit_identical']
  (name,) = found['arrays_changed']
  assert where <= set(name.split('/'))
  clean = _proof(monkeypatch)
  assert (
    found['fingerprint_of_the_others'] != clean['fingerprint_of_the_others']
  )
  with pytest.raises(RuntimeError, match='others_bit_identical is false'):
    proof.require(found)


def test_proof_finds_an_indexer_array_that_stayed(monkeypatch):
  def back(path, leaf, old):
    stays = path[-1].key == 'w_iw'
    return old if stays else leaf

  after = jax.tree_util.tree_map_with_path(back, _after(), _before())
  found = _proof(monkeypatch, after=after)
  with pytest.raises(RuntimeError, match='indexers_moved is false'):
    proof.require(found)


def test_proof_finds_a_step_that_was_not_dense(monkeypatch):
  lines = (*LINES, {'sparsity/realised': [1e-4]})
  found = _proof(monkeypatch, lines=lines)
  assert found['largest_share_of_pairs_left_out'] == 1e-4
  with pytest.raises(RuntimeError, match='dense_forward is false'):
    proof.require(found)
