"""Truncation on a GPU, where the selection kernel finds the candidates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.inference import sampling
from dsv32_jax.inference.sampling import Sampling

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize('top_k', [1, 50, 64])
def test_candidates_of_the_kernel_give_the_targets_of_a_whole_sort(top_k):
  B, V = 512, 16384
  logits_BV = 3 * jax.random.normal(jax.random.key(top_k), (B, V))
  # Ties, many of them at the edge.
  logits_BV = jnp.round(logits_BV, 1)
  params = sampling.stack(
    [Sampling(top_k=top_k, top_p=(0.3, 0.95, 1.0)[n % 3]) for n in range(B)]
  )
  expected_BV = sampling.target_logits(logits_BV, params)
  target_BV = sampling.target_logits(logits_BV, params, most_kept=64)
  np.testing.assert_array_equal(target_BV, expected_BV)
  kept_B = np.sum(np.asarray(target_BV) > -np.inf, axis=1)
  assert 1 <= kept_B.min() <= kept_B.max() <= top_k
  np.testing.assert_array_equal(
    np.sum(np.asarray(sampling.most_likely_ids(target_BV, 64)) >= 0, axis=1),
    kept_B,
  )
