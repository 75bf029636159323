"""Drawing tokens: truncation, ties, probabilities, one key a request."""

import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.inference import sampling as sampling_lib
from dsv32_jax.inference.sampling import GREEDY, Sampling, stack
from tests.support import frequencies

# Probabilities 0.5, 0.25, 0.125, 0.0625, 0.0625, in another order.
PROBS_V = np.array([0.0625, 0.5, 0.125, 0.0625, 0.25], np.float32)
LOGITS_BV = jnp.log(jnp.asarray(PROBS_V))[None]

# Every filter, every pair and all together; at other temperatures too.
FILTERS = [
  Sampling(),
  Sampling(temperature=0.5),
  Sampling(temperature=1.7),
  Sampling(top_k=1),
  Sampling(top_k=5),
  Sampling(top_p=0.4),
  Sampling(top_p=0.8),
  Sampling(top_p=0.999),
  Sampling(min_p=0.05),
  Sampling(min_p=0.4),
  Sampling(top_k=6, top_p=0.7),
  Sampling(top_k=8, min_p=0.1),
  Sampling(top_p=0.9, min_p=0.2),
  Sampling(temperature=0.7, top_k=7, top_p=0.9, min_p=0.03),
  Sampling(temperature=1.3, top_k=9, top_p=0.95, min_p=0.1),
]
DRAWS = 20_000

sample = jax.jit(sampling_lib.sample)
target_logits = jax.jit(sampling_lib.target_logits)
request_keys = jax.jit(sampling_lib.request_keys)
step_keys = jax.jit(sampling_lib.step_keys)


def _target(logits_BV, *samplings):
  return target_logits(logits_BV, stack(samplings))


def _kept(**options):
  target_BV = _target(LOGITS_BV, Sampling(**options))
  return np.flatnonzero(target_BV[0] > -np.inf).tolist()


def _keys(*seeds):
  return request_keys(jnp.array(seeds, jnp.uint32))


def _sample(logits_BV, seeds, *samplings):
  return sample(logits_BV, _keys(*seeds), stack(samplings))


def exact_distribution(logits_V, sampling):
  """The definition, token by token in double precision."""
  scaled = [float(x) / sampling.temperature for x in logits_V]
  weights = [math.exp(x - max(scaled)) for x in scaled]
  order = sorted(range(len(weights)), key=lambda v: (-weights[v], v))
  if sampling.top_k is not None:
    order = order[: sampling.top_k]
  total = sum(weights[v] for v in order)
  nucleus, covered = [], 0.0
  for v in order:
    if covered < sampling.top_p * total:
      nucleus.append(v)
    covered += weights[v]
  best = weights[order[0]]
  kept = [v for v in nucleus if weights[v] >= sampling.min_p * best]
  total = sum(weights[v] for v in kept)
  probs_V = np.zeros(len(weights))
  for v in kept:
    probs_V[v] = weights[v] / total
  return probs_V


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
    # 0.2 of the best token's 0.5 is 0.1.
    ({'min_p': 0.2}, [1, 2, 4]),
    ({'min_p': 0.51}, [1]),
    ({'min_p': 1.0}, [1]),
    # Squared, 0.125 is 1/16 of the best and 0.25 is 1/4.
    ({'temperature': 0.5, 'min_p': 0.2}, [1, 4]),
    # The best token is measured before anything is dropped, so order is moot.
    ({'top_k': 2, 'min_p': 0.2}, [1, 4]),
    ({'top_p': 0.9, 'min_p': 0.2}, [1, 2, 4]),
  ],
)
def test_target_logits_keep_the_smallest_set_asked_for(options, expected):
  assert _kept(**options) == expected


def test_target_logits_of_a_known_bound_are_those_of_the_whole_sort(key):
  generator = np.random.default_rng(int(jax.random.bits(key)))
  samplings = [
    Sampling(
      temperature=float(generator.uniform(0.2, 2)),
      top_k=int(generator.integers(1, 17)),
      top_p=float(generator.choice([1.0, 0.9, 0.5, 0.01])),
      min_p=float(generator.choice([0.0, 0.1])),
    )
    for _ in range(60)
  ]
  # Rows that nothing truncates, and those that rest, are in a batch with them.
  samplings += [Sampling(), Sampling(temperature=0.0), Sampling(min_p=0.2)]
  logits_BV = generator.normal(size=(len(samplings), 300))
  # Ties within and across the bound, zeros of both signs, and few finite ones.
  logits_BV[20:40] = generator.integers(-2, 3, (20, 300))
  logits_BV[30:40] *= -1.0
  logits_BV[40:44, 5:] = -np.inf
  logits_BV = logits_BV.astype(np.float32)
  expected = _target(logits_BV, *samplings)
  bounded = jax.jit(sampling_lib.target_logits, static_argnames='most_kept')
  for most_kept in (16, 64):
    found = bounded(logits_BV, stack(samplings), most_kept=most_kept)
    np.testing.assert_array_equal(found, expected)


def test_target_logits_of_equal_logits_keep_the_lowest_ids():
  target_BV = _target(jnp.zeros((2, 6)), *[Sampling(top_k=2)] * 2)
  np.testing.assert_array_equal(
    target_BV, [[0, 0, -np.inf, -np.inf, -np.inf, -np.inf]] * 2
  )


@pytest.mark.parametrize('temperature', [1e-3, 1e-30, 1e-45])
def test_target_logits_of_a_tiny_temperature_are_the_greedy_ones(temperature):
  logits_BV = jnp.array([[1.0, 900.0, 899.0], [-3.0, -5.0, -4.0]])
  hot_BV = _target(logits_BV, *[Sampling(temperature=temperature)] * 2)
  np.testing.assert_allclose(
    jax.nn.softmax(hot_BV), [[0, 1, 0], [1, 0, 0]], atol=1e-7
  )


def test_target_logits_of_several_positions_are_those_of_each(key):
  logits_BTV = jax.random.normal(key, (2, 3, 20))
  samplings = (Sampling(temperature=0.5, top_k=4), Sampling(min_p=0.3))
  together_BTV = _target(logits_BTV, *samplings)
  for t in range(3):
    np.testing.assert_array_equal(
      together_BTV[:, t], _target(logits_BTV[:, t], *samplings)
    )


def test_sample_follows_the_exact_distribution_of_every_filter():
  """Bar 5: one batch in which every request has settings of its own."""
  logits_V = np.random.default_rng(3).normal(size=16).astype(np.float32)
  # Four tokens tie, so that a truncation has to choose among them.
  logits_V[[3, 9, 11]] = logits_V[4]
  samplings = [s for s in FILTERS for _ in range(DRAWS)]
  drawn = _sample(
    np.broadcast_to(logits_V, (len(samplings), 16)),
    range(len(samplings)),
    *samplings,
  )
  token_FN = np.asarray(drawn.token_B).reshape(len(FILTERS), DRAWS)
  logprob_FN = np.asarray(drawn.sampling_logprob_B).reshape(token_FN.shape)
  model_FN = np.asarray(drawn.logprob_B).reshape(token_FN.shape)
  kept_BV = np.asarray(drawn.kept_BV)
  model_V = np.log(exact_distribution(logits_V, Sampling()))
  for row, sampling in enumerate(FILTERS):
    probs_V = exact_distribution(logits_V, sampling)
    token_N = token_FN[row]
    np.testing.assert_array_equal(
      kept_BV[row * DRAWS], probs_V > 0, err_msg=sampling
    )
    frequencies.assert_follow(token_N, probs_V, tests=len(FILTERS))
    np.testing.assert_allclose(
      logprob_FN[row], np.log(probs_V[token_N]), atol=2e-6
    )
    np.testing.assert_allclose(model_FN[row], model_V[token_N], atol=2e-6)


def test_draws_of_one_request_over_its_steps_follow_the_distribution():
  """The keys of successive steps are independent, as those of requests are."""
  key_B = jnp.broadcast_to(_keys(5), (DRAWS,))
  drawn = sample(
    jnp.broadcast_to(LOGITS_BV, (DRAWS, 5)),
    step_keys(key_B, jnp.arange(DRAWS)),
    stack([Sampling()] * DRAWS),
  )
  token_N = np.asarray(drawn.token_B)
  frequencies.assert_follow(token_N, PROBS_V, tests=2)
  # Successive pairs too.
  pairs_N = 5 * token_N[0::2] + token_N[1::2]
  frequencies.assert_follow(
    pairs_N, np.outer(PROBS_V, PROBS_V).ravel(), tests=2
  )


def test_sample_greedy_takes_the_first_of_the_largest():
  logits_BV = np.array([[0, 3, 3], [5, 1, 2], [0, 0, 0]], np.float32)
  expected = np.asarray(jax.nn.log_softmax(logits_BV, axis=-1))
  # Beside another greedy one, and one that needs a sort and noise.
  for other in (GREEDY, Sampling(top_k=2, top_p=0.9)):
    drawn = _sample(logits_BV, range(3), GREEDY, GREEDY, other)
    np.testing.assert_array_equal(drawn.token_B[:2], [1, 0])
    np.testing.assert_array_equal(drawn.sampling_logprob_B[:2], [0, 0])
    np.testing.assert_array_equal(
      drawn.kept_BV[:2], [[False, True, False], [True, False, False]]
    )
    np.testing.assert_allclose(
      drawn.logprob_B[:2], [expected[0, 1], expected[1, 0]], rtol=1e-6
    )


def test_sample_depends_on_the_request_not_on_the_batch(key):
  logits_BV = jax.random.normal(key, (len(FILTERS) + 1, 50))
  samplings = [*FILTERS, GREEDY]
  seeds = [3, 1, 4, 1] * 4
  together = _sample(logits_BV, seeds, *samplings)
  for row, (seed, sampling) in enumerate(zip(seeds, samplings, strict=True)):
    alone = _sample(np.asarray(logits_BV)[[row]], [seed], sampling)
    assert alone.token_B[0] == together.token_B[row], sampling
    np.testing.assert_array_equal(alone.kept_BV[0], together.kept_BV[row])


def test_sample_keys_differ_by_seed_and_by_step():
  seeds, steps = (0, 0, 1, 1), jnp.array([0, 1, 0, 1])
  drawn = sample(
    jnp.zeros((4, 1_000_000)),
    step_keys(_keys(*seeds), steps),
    stack([Sampling()] * 4),
  )
  assert len(set(drawn.token_B.tolist())) == 4
  # One step for all is the same as that step for each.
  one = step_keys(_keys(*seeds), jnp.int32(1))
  each = step_keys(_keys(*seeds), jnp.ones(4, jnp.int32))
  np.testing.assert_array_equal(
    jax.random.key_data(one), jax.random.key_data(each)
  )


def test_sample_of_a_whole_vocabulary_is_one_program_within_memory(key):
  """V3.2's vocabulary; the settings are arrays, so nothing is compiled anew.

  The sort and the noise stand behind a runtime condition: what is outside of
  the conditionals' branches must not hold them.
  """
  B, V = 4, 129_280
  logits_BV = jax.random.normal(key, (B, V))
  mixes = [
    [GREEDY] * B,
    [Sampling()] * B,
    [GREEDY, Sampling(), Sampling(top_p=0.9), Sampling(top_k=50, min_p=0.1)],
  ]
  jitted = jax.jit(lambda *args: sampling_lib.sample(*args))
  for mix in mixes:
    drawn = jitted(logits_BV, _keys(*range(B)), stack(mix))
  assert jitted._cache_size() == 1
  np.testing.assert_array_equal(np.asarray(drawn.kept_BV).sum(-1)[:2], [1, V])
  assert 1 < drawn.kept_BV[3].sum() <= 50
  args = (logits_BV, _keys(*range(B)), stack(mixes[0]))
  compiled = jitted.lower(*args).compile()
  analysis = compiled.memory_analysis()
  assert analysis.temp_size_in_bytes <= 10 * logits_BV.nbytes
  jaxpr = jax.make_jaxpr(sampling_lib.sample)(*args)
  outside = _primitives_outside_conditionals(jaxpr.jaxpr)
  assert {'cond', 'reduce_max'} <= outside
  assert not outside & {'sort', 'random_bits', 'threefry2x32', 'cumsum'}


def _primitives_outside_conditionals(jaxpr):
  names = set()
  for eqn in jaxpr.eqns:
    names.add(eqn.primitive.name)
    if eqn.primitive.name != 'cond':
      for inner in jax.extend.core.jaxprs_in_params(eqn.params):
        names |= _primitives_outside_conditionals(inner)
  return names


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'temperature': -1.0}, 'temperature: got -1.0'),
    ({'temperature': float('nan')}, 'temperature: got nan'),
    ({'top_k': 0}, 'top_k: got 0, expected at least 1'),
    ({'top_p': 0.0}, 'top_p: got 0.0'),
    ({'top_p': 1.5}, 'top_p: got 1.5'),
    ({'min_p': -0.1}, 'min_p: got -0.1'),
    ({'min_p': 1.1}, 'min_p: got 1.1'),
    ({'min_p': float('nan')}, 'min_p: got nan'),
  ],
)
def test_sampling_impossible_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    Sampling(**options)
