"""Tests of the attention blocks that are timed as a server runs them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax import presets
from dsv32_jax.evaluation import serving_cost

_TINY = presets.get('tiny')


@pytest.mark.slow
def test_timed_blocks_agree_where_every_key_is_selected():
  work = serving_cost.Workload(
    cfg=_TINY,
    layers=1,
    batch=2,
    cached=23,
    new=1,
    page_size=8,
    index_format='compute',
  )
  assert work.capacity == 24 <= _TINY.index_topk
  operands = serving_cost.make(work)
  # In order, as the dense mode reads them.
  pages_BN = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)
  operands = dataclasses.replace(operands, pages_BN=pages_BN)
  before = jax.tree.map(np.asarray, operands.caches)
  programs = {
    mode: serving_cost.Program.build(work, mode, operands)
    for mode in serving_cost.MODES
  }
  outputs = {}
  for mode, program in programs.items():
    outputs[mode], operands = program.calls(operands, 1)
  np.testing.assert_allclose(
    outputs['sparse'], outputs['dense'], rtol=1e-4, atol=1e-5
  )
  # Each wrote its new token, and nothing else.
  for old, new in zip(before, operands.caches, strict=True):
    changed = np.any(old.latent_AOX != np.asarray(new.latent_AOX), axis=2)
    np.testing.assert_array_equal(np.argwhere(changed), [[2, 7], [5, 7]])
  timings, _ = serving_cost.alternate(programs, operands, rounds=3, calls=2)
  for mode in serving_cost.MODES:
    assert timings[mode].finite
    assert len(timings[mode].rounds) == 3
    assert min(timings[mode].rounds) > 0


def test_unknown_mode_is_refused():
  work = serving_cost.Workload(cfg=_TINY, layers=1, batch=1, cached=8, new=1)
  with pytest.raises(ValueError, match="mode: got 'spare'"):
    serving_cost.step(work, 'spare')


def test_block_costs_of_decoding_at_128k_are_the_hand_counted_ones():
  work = serving_cost.Workload(
    cfg=presets.get('deepseek_v32_671b'),
    layers=4,
    batch=16,
    cached=131071,
    new=1,
  )
  dense = serving_cost.block_costs(work, 'dense')
  sparse = serving_cost.block_costs(work, 'sparse')
  assert dense['attention'].bytes == 16 * 131072 * 1152
  assert dense['attention'].flops == 2 * 16 * 131072 * 128 * (576 + 512)
  assert sparse['attention'].bytes == 16 * 2048 * 1152
  assert sparse['attention'].flops == 2 * 16 * 2048 * 128 * (576 + 512)
  assert sparse['index scores'].bytes == 16 * 131072 * 132
  assert sparse['index scores'].flops == 2 * 16 * 131072 * 64 * 128
  assert sparse['index scores'].rate == 2
  # W_dq, W_dkv and W_kr, W_uq and W_qr, W_uk and W_uv, W_o.
  weights = 7168 * 1536 + 7168 * 576 + 1536 * 24576 + 512 * 32768 + 16384 * 7168
  activations = 2 * 16 * 7168 * 2
  assert dense['projections'].bytes == 2 * weights + activations
  indexer = 1536 * 8192 + 7168 * (128 + 64)
  assert sparse['projections'].bytes == 2 * (weights + indexer) + activations


def test_block_costs_of_prefill_count_causal_and_selected_pairs():
  work = serving_cost.Workload(
    cfg=_TINY, layers=1, batch=1, cached=0, new=100, index_format='compute'
  )
  pairs, chosen = 100 * 101 // 2, 32 * 33 // 2 + 68 * 32
  dense = serving_cost.block_costs(work, 'dense')
  sparse = serving_cost.block_costs(work, 'sparse')
  assert dense['attention'].flops == 2 * pairs * 4 * (16 + 8 + 16)
  assert sparse['attention'].flops == 2 * chosen * 4 * (2 * 16 + 8)
  assert sparse['index scores'].flops == 2 * pairs * 16 * 16
