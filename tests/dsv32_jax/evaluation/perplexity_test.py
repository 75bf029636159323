import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.config.model import DENSE, SPARSE, AttentionMode
from dsv32_jax.evaluation import perplexity
from dsv32_jax.modules.transformer import DeepSeekV32
from tests.support import tiny_configs

CFG = tiny_configs.config(num_hidden_layers=1)
# No token of any row counts at the last position.
BATCHES = [
  tiny_configs.rows([[20], [11, 7]], seed=0),
  tiny_configs.rows([[4], [18]], seed=1),
]


def _loss(mode, batches=BATCHES, **options):
  return perplexity.held_out_loss(
    DeepSeekV32(CFG), tiny_configs.variables(CFG), batches, mode, **options
  )


@pytest.mark.parametrize('mode', [DENSE, SPARSE], ids=['dense', 'sparse'])
def test_held_out_loss_matches_the_logits_in_float64(mode):
  losses = np.zeros((4, 20))
  weights = np.concatenate([rows['loss_weight'] for rows in BATCHES])
  pairs = []
  for i, rows in enumerate(BATCHES):
    output = tiny_configs.forward(CFG, mode)(
      tiny_configs.variables(CFG),
      jnp.asarray(rows['tokens']),
      segment_ids_BT=jnp.asarray(rows['segment_ids']),
      positions_BT=jnp.asarray(rows['positions']),
    )
    logits = np.asarray(output.logits_BTV, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = rows['targets'][..., None]
    losses[2 * i : 2 * i + 2] = -np.take_along_axis(log_p, targets, -1)[..., 0]
    lengths = [
      (row == segment).sum()
      for row in rows['segment_ids']
      for segment in range(1, row.max() + 1)
    ]
    limit = CFG.index_topk if mode.is_sparse else 20
    pairs.append(
      sum(min(t, limit) for n in lengths for t in range(1, n + 1))
      / sum(lengths)
    )
  found = _loss(mode)
  assert found.tokens == weights.sum() == 19 + 10 + 6 + 3 + 17
  np.testing.assert_allclose(
    found.loss, np.sum(losses * weights) / weights.sum(), rtol=1e-5
  )
  with np.errstate(invalid='ignore'):
    by_position = np.sum(losses * weights, 0) / weights.sum(0)
  np.testing.assert_allclose(found.by_position, by_position, rtol=1e-5)
  assert np.isnan(found.by_position[19])
  np.testing.assert_allclose(found.pairs_per_token, np.mean(pairs), rtol=1e-6)


def test_held_out_loss_random_selector_follows_its_seed():
  mode = AttentionMode(selector='random')
  first, again, other = (_loss(mode, seed=seed).loss for seed in (0, 0, 1))
  assert first == again
  assert first != other


def test_held_out_loss_without_batches_is_refused():
  with pytest.raises(ValueError, match='batches: got none, expected'):
    _loss(DENSE, batches=[])


def test_held_out_loss_compiles_once_for_equal_batches():
  _loss(DENSE)
  compiled = perplexity._token_losses._cache_size()
  _loss(DENSE, batches=BATCHES[::-1])
  assert perplexity._token_losses._cache_size() == compiled
