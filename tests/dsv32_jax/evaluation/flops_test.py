import dataclasses

import pytest

from dsv32_jax.config import presets
from dsv32_jax.evaluation import flops
from tests.support import tiny_configs


@pytest.mark.parametrize('seq_len', [1, 5, 6, 7, 40])
def test_attention_cost_counts_pairs_one_by_one(seq_len):
  cfg = tiny_configs.config()
  cost = flops.attention_cost(cfg, seq_len)
  rows = range(1, seq_len + 1)
  assert cost.seq_len == seq_len
  assert cost.dense_pairs == cost.indexer_pairs == sum(rows)
  assert cost.sparse_pairs == sum(min(t, cfg.index_topk) for t in rows)


def test_attention_cost_a_pair_is_that_of_the_671b_model():
  """Section 1: multiply-adds of a pair in one layer."""
  cfg = dataclasses.replace(presets.deepseek_v32_671b(), index_topk=1)
  cost = flops.attention_cost(cfg, 1)
  layers = 61
  assert cost.indexer_flops == 2 * layers * 8_256
  assert cost.dense_flops == 2 * layers * 40_960
  assert cost.sparse_flops - cost.indexer_flops == 2 * layers * 139_264


def test_attention_cost_of_128k_tokens_is_the_published_ratio():
  """Section 3.5: 1.55 % of T^2, 32 times fewer pairs than dense causal."""
  cost = flops.attention_cost(presets.deepseek_v32_671b(), 131_072)
  assert cost.sparse_pairs / cost.seq_len**2 == pytest.approx(0.0155, abs=5e-5)
  assert cost.dense_pairs / cost.sparse_pairs == pytest.approx(32, abs=0.3)
  assert cost.sparse_flops < cost.dense_flops


def test_attention_cost_short_sequences_read_the_same_pairs():
  cfg = presets.deepseek_v32_671b()
  cost = flops.attention_cost(cfg, cfg.index_topk)
  assert cost.sparse_pairs == cost.dense_pairs
