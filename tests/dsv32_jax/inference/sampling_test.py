"""Drawing tokens: truncation, ties, probabilities, one key a request."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.inference import sampling as sampling_lib
from dsv32_jax.inference.sampling import GREEDY, Sampling, sample

# Probabilities 0.5, 0.25, 0.125, 0.0625, 0.0625, in another order.
PROBS_V = np.array([0.0625, 0.5, 0.125, 0.0625, 0.25], np.float32)
LOGITS_BV = jnp.log(jnp.asarray(PROBS_V))[None]


def _kept(**options):
  kept_BV = sampling_lib.kept_tokens(LOGITS_BV, sampling=Sampling(**options))
  return np.flatnonzero(kept_BV[0]).tolist()


def _keys(*seeds):
  return sampling_lib.request_keys(jnp.array(seeds, jnp.uint32))


@pytest.mark.parametrize(
  ('options', 'expected'),
  [
    ({}, [0, 1, 2, 3, 4]),
    ({'top_k': 2}, [1, 4]),
    ({'top_k': 99}, [0, 1, 2, 3, 4]),
    # The two smallest tie: the lower id stays.
    ({'top_k': 4}, [0, 1, 2, 4]),
    ({'top_p': 0.5}, [1]),
    ({'top_p': 0.51}, [1, 4]),
    ({'top_p': 0.75}, [1, 4]),
    ({'top_p': 1e-6}, [1]),
    ({'top_p': 0.9}, [0, 1, 2, 4]),
    # Of 3 tokens kept, 0.5 / 0.875 is below 0.6 and 0.75 / 0.875 is not.
    ({'top_k': 3, 'top_p': 0.6}, [1, 4]),
    # At temperature 1/2 the probabilities are squared: 0.25 / 0.336 = 0.744.
    ({'temperature': 0.5, 'top_p': 0.7}, [1]),
    ({'temperature': 1.0, 'top_p': 0.7}, [1, 4]),
  ],
)
def test_kept_tokens_are_the_smallest_set_asked_for(options, expected):
  assert _kept(**options) == expected


def test_kept_tokens_of_equal_logits_are_the_lowest_ids():
  kept_BV = sampling_lib.kept_tokens(
    jnp.zeros((2, 6)), sampling=Sampling(top_k=2)
  )
  np.testing.assert_array_equal(
    kept_BV, [[True, True, False, False, False, False]] * 2
  )


def test_sample_greedy_takes_the_first_of_the_largest():
  logits_BV = jnp.array([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
  drawn = sample(logits_BV, _keys(0, 1), sampling=GREEDY)
  np.testing.assert_array_equal(drawn.token_B, [1, 0])
  np.testing.assert_array_equal(drawn.sampling_logprob_B, [0, 0])
  np.testing.assert_array_equal(
    drawn.kept_BV, [[False, True, False], [True, False, False]]
  )
  expected = jax.nn.log_softmax(logits_BV, axis=-1)
  np.testing.assert_allclose(
    drawn.logprob_B, [expected[0, 1], expected[1, 0]], rtol=1e-6
  )


def test_sample_frequencies_follow_the_truncated_distribution():
  count = 20_000
  sampling = Sampling(temperature=0.5, top_k=3)
  drawn = sample(
    jnp.broadcast_to(LOGITS_BV, (count, 5)),
    _keys(*range(count)),
    sampling=sampling,
  )
  frequency_V = np.bincount(drawn.token_B, minlength=5) / count
  expected_V = np.where([False, True, True, False, True], PROBS_V**2, 0)
  expected_V /= expected_V.sum()
  # Four standard deviations of a frequency of 20,000 draws.
  np.testing.assert_allclose(frequency_V, expected_V, atol=0.015)
  assert frequency_V[[0, 3]].sum() == 0
  token_B = np.asarray(drawn.token_B)
  np.testing.assert_allclose(
    drawn.sampling_logprob_B, np.log(expected_V[token_B]), rtol=1e-5
  )
  np.testing.assert_allclose(
    drawn.logprob_B, np.log(PROBS_V[token_B]), rtol=1e-5
  )


def test_sample_depends_on_the_request_not_on_the_batch(key):
  logits_BV = jax.random.normal(key, (4, 50))
  sampling = Sampling(temperature=1.5, top_p=0.95)
  together = sample(logits_BV, _keys(3, 1, 4, 1), sampling=sampling)
  for row, seed in enumerate((3, 1, 4, 1)):
    alone = sample(logits_BV[row : row + 1], _keys(seed), sampling=sampling)
    assert alone.token_B[0] == together.token_B[row]


def test_sample_keys_differ_by_seed_and_by_step():
  draws = {
    int(
      sample(
        jnp.zeros((1, 1_000_000)),
        sampling_lib.step_keys(_keys(seed), jnp.int32(step)),
        sampling=Sampling(),
      ).token_B[0]
    )
    for seed in (0, 1)
    for step in (0, 1)
  }
  assert len(draws) == 4


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'temperature': -1.0}, 'temperature: got -1.0'),
    ({'temperature': float('nan')}, 'temperature: got nan'),
    ({'top_k': 0}, 'top_k: got 0, expected at least 1'),
    ({'top_p': 0.0}, 'top_p: got 0.0'),
    ({'top_p': 1.5}, 'top_p: got 1.5'),
  ],
)
def test_sampling_impossible_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    Sampling(**options)
