"""Without the paper's extras, the objective is that of Tunix's DrGRPO.

To run the tests marked `tunix`: an environment of Python 3.11 with
`pip install google-tunix==0.1.7 pytest pytest-timeout beartype`, and there
`python -m pytest -m tunix tests/dsv32_jax/rl/tunix_test.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.config.rl import GRPOConfig
from dsv32_jax.rl import grpo, replay
from dsv32_jax.rl.advantages import group_advantages
from tests.support import tunix_cases
from tests.support.tunix_cases import CASES, Case, P

BY_NAME = pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)


def ours(case: Case) -> dict:
  """What `tunix_cases.run` gives, by our objective."""
  arrays = tunix_cases.inputs(case)
  mask_GT = arrays['mask_GT']
  G = len(case.lengths)
  advantages_G = group_advantages(arrays['rewards_G'].reshape(2, -1)).ravel()
  config = GRPOConfig(
    clip_epsilon=case.epsilon,
    unbiased_kl=False,
    off_policy_sequence_mask=False,
  )

  def everywhere(x_G):
    return jnp.broadcast_to(jnp.float32(x_G)[:, None], mask_GT.shape)

  def loss(logits_GLV):
    scores = replay.token_scores(
      logits_GLV[:, P - 1 : -1],
      jnp.asarray(arrays['completion_GT']),
      None,
      jnp.full(mask_GT.shape, case.temperature, jnp.float32),
    )
    found = grpo.objective(
      scores.logprob_BT,
      sampling_logprob_BT=jnp.asarray(arrays['old_GT']),
      ref_logprob_BT=jnp.asarray(arrays['ref_GT']),
      advantage_BT=everywhere(advantages_G),
      weight_BT=everywhere(1 / np.array(case.lengths) / G) * mask_GT,
      kl_strength_BT=everywhere(np.full(G, case.beta)),
      response_BT=jnp.where(
        mask_GT, jnp.arange(G, dtype=jnp.int32)[:, None], -1
      ),
      num_responses=G,
      config=config,
    )
    return found.loss, found

  (value, found), gradient = jax.value_and_grad(loss, has_aux=True)(
    jnp.asarray(arrays['logits_GLV'])
  )
  return {
    'advantages_G': advantages_G,
    'loss': value,
    'clip_fraction': np.sum(found.is_clipped_BT) / np.sum(mask_GT),
    'gradient_GLV': gradient,
  }


def check(found: dict, expected: dict) -> None:
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    # Two float32 programs; the figures themselves are of size 0.01 to 1.
    np.testing.assert_allclose(
      found[name], value, rtol=1e-5, atol=1e-7, err_msg=name
    )
  assert np.max(np.abs(expected['gradient_GLV'])) > 1e-3


@BY_NAME
def test_objective_without_extras_is_drgrpo_as_recorded(case):
  check(ours(case), tunix_cases.recorded()[case.name])


@BY_NAME
@pytest.mark.tunix
def test_objective_without_extras_is_drgrpo_live(case):
  live = tunix_cases.run(case)
  check(ours(case), live)
  check(live, tunix_cases.recorded()[case.name])
