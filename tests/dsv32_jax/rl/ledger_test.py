import dataclasses

import jax
import pytest

from dsv32_jax.config import presets
from dsv32_jax.config.data import DataConfig
from dsv32_jax.config.training import RunConfig, StageConfig
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.rl import ledger
from dsv32_jax.training import state
from tests.support import tiny_configs


@pytest.mark.parametrize('q_lora_rank', [12, None])
def test_products_of_a_token_are_the_sizes_of_the_matrices_it_meets(
  q_lora_rank,
):
  cfg = tiny_configs.config(q_lora_rank=q_lora_rank)
  shapes = state.variable_shapes(DeepSeekV32(cfg))['params']
  expected = 0.0
  for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
    names = [key.key for key in path]
    if names[-1] in ('embedding', 'scale', 'bias'):
      continue
    share = cfg.num_experts_per_tok / cfg.n_routed_experts
    expected += leaf.size * (share if 'experts' in names else 1.0)
  found = ledger.token_products(cfg, with_indexer=q_lora_rank is not None)
  assert found == expected


def test_forward_flops_of_one_token_by_hand():
  cfg = tiny_configs.config()
  # One key is read, and scored by the indexer, in each of two layers.
  heads = 2 * (8 + 4 + 8)
  indexer = 8 * (8 + 1)
  expected = 2 * ledger.token_products(cfg) + 2 * 2 * (heads + indexer)
  assert ledger.forward_flops(cfg, 1) == expected
  assert ledger.forward_flops(cfg, 0) == 0


def test_671b_model_needs_twice_its_active_parameters_a_token():
  cfg = presets.deepseek_v32_671b()
  # 37B active parameters (V3 report), the indexer's not among them.
  assert ledger.token_products(cfg, with_indexer=False) == pytest.approx(
    37e9, rel=0.03
  )


def test_recipe_flops_count_backward_passes_where_something_learns():
  cfg = tiny_configs.config()
  data = DataConfig(seq_len=32, batch_size=4)
  stages = {
    'base': StageConfig(kind='pretrain', steps=10, data=data),
    'warm': StageConfig(
      kind='dense_warmup', init_from='base', steps=5, data=data
    ),
    'sparse': StageConfig(
      kind='sparse_training', init_from='warm', steps=2, data=data
    ),
  }
  run = RunConfig(model=cfg, stages=stages, order=tuple(stages))
  found = ledger.recipe_flops(run)
  dense = ledger.forward_flops(cfg, 32, is_sparse=False)
  assert found['base'] == 10 * 4 * 3 * dense
  assert found['sparse'] == 2 * 4 * 3 * ledger.forward_flops(cfg, 32)
  assert 5 * 4 * dense < found['warm'] < 5 * 4 * 3 * dense


def test_ledger_tells_the_fraction_without_evaluations_and_survives_a_save():
  cfg = tiny_configs.config()
  book = ledger.Ledger(before=1e6)
  book.add_forward('rollout', cfg, [5, 7])
  book.add_forward('evaluation', cfg, [100])
  book.add_training(cfg, [5])
  five, seven = (ledger.forward_flops(cfg, n) for n in (5, 7))
  assert book.fraction == (4 * five + seven) / 1e6
  again = ledger.Ledger.from_state(book.state())
  assert again == book
  again.add_training(cfg, [1])
  assert again != book
  assert dataclasses.replace(book, before=0.0).fraction is None
  assert 'compute/rl_over_pretraining' in book.metrics()
