import itertools

import pytest

from dsv32_jax.rl.speciale.rewards import (
  agreement,
  generator_reward,
  verifier_reward,
)

SCORES = (0.0, 0.5, 1.0)


@pytest.mark.parametrize(
  ('formed', 'predicted', 'true', 'meta', 'reward'),
  [
    (True, 1.0, 1.0, 1.0, 1.0),
    (True, 0.0, 1.0, 1.0, 0.0),
    (True, 0.5, 1.0, 1.0, 0.5),
    (True, 0.5, 0.0, 0.5, 0.25),
    (True, 0.0, 0.0, 0.0, 0.0),
    (False, 1.0, 1.0, 1.0, 0.0),
  ],
)
def test_verifier_reward_is_the_product(formed, predicted, true, meta, reward):
  found = verifier_reward(
    is_formed=formed, predicted=predicted, true=true, meta=meta
  )
  assert found == pytest.approx(reward, abs=1e-12)


# By hand: 0.76 R_Y + 0.24 (1 - |s' - R_Y|) R_meta.
@pytest.mark.parametrize(
  ('proof', 'predicted', 'meta', 'reward'),
  [
    (1.0, 1.0, 1.0, 1.0),
    (1.0, 0.0, 1.0, 0.76),
    (1.0, 1.0, 0.0, 0.76),
    (0.5, 0.5, 1.0, 0.62),
    (0.5, 1.0, 1.0, 0.50),
    (0.5, 1.0, 0.5, 0.44),
    (0.0, 0.0, 1.0, 0.24),
    (0.0, 0.5, 1.0, 0.12),
    (0.0, 1.0, 1.0, 0.00),
  ],
)
def test_generator_reward_weighs_proof_and_self_analysis(
  proof, predicted, meta, reward
):
  found = generator_reward(
    is_formed=True, proof=proof, predicted=predicted, meta=meta
  )
  assert found == pytest.approx(reward, abs=1e-12)
  assert (
    generator_reward(
      is_formed=False, proof=proof, predicted=predicted, meta=meta
    )
    == 0
  )


def test_generator_earns_most_by_a_right_proof_and_then_by_honesty():
  def reward(proof, predicted, meta=1.0):
    return generator_reward(
      is_formed=True, proof=proof, predicted=predicted, meta=meta
    )

  for proof, predicted, meta in itertools.product(SCORES, repeat=3):
    value = reward(proof, predicted, meta)
    assert 0 <= value <= 1
    # To say the truth, with reasons that hold, is never worse.
    assert value <= reward(proof, proof)
    # And no opinion of it makes up for a worse proof.
    for better in SCORES:
      if better > proof:
        assert reward(proof, proof) < reward(better, predicted, meta)


def test_agreement_is_symmetric_and_one_only_for_equal_scores():
  for one, other in itertools.product(SCORES, repeat=2):
    assert agreement(one, other) == agreement(other, one)
    assert (agreement(one, other) == 1) == (one == other)


def test_values_out_of_range_are_refused():
  with pytest.raises(ValueError, match=r'predicted: got 1\.5'):
    agreement(1.5, 1.0)
  with pytest.raises(ValueError, match='meta: got -1'):
    verifier_reward(is_formed=True, predicted=1.0, true=1.0, meta=-1.0)
  with pytest.raises(ValueError, match='weights: got'):
    generator_reward(
      is_formed=True, proof=1.0, predicted=1.0, meta=1.0, weights=(0.8, 0.3)
    )
