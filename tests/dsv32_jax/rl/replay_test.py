"""Log-probabilities over kept sets, whole and by chunks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.inference import sampling
from dsv32_jax.rl import replay
from tests.support import tiny_configs

B, T, V, K, D = 2, 7, 33, 6, 5


def inputs(seed: int = 0):
  """Hidden states, head, targets, sets and temperatures."""
  rng = np.random.default_rng(seed)
  hidden_BTD = rng.standard_normal((B, T, D)).astype(np.float32)
  head_DV = rng.standard_normal((D, V)).astype(np.float32)
  kept_BTK = np.full((B, T, K), -1, np.int32)
  targets_BT = rng.integers(0, V, (B, T), dtype=np.int32)
  for row in range(B):
    for place in range(T):
      size = rng.integers(0, K + 1)
      if size:
        members = rng.permutation(V)[:size]
        kept_BTK[row, place, :size] = members
        targets_BT[row, place] = members[rng.integers(size)]
  kept_BTK[0, 0] = -1
  temperature_BT = rng.uniform(0.5, 2, (B, T)).astype(np.float32)
  return hidden_BTD, head_DV, targets_BT, kept_BTK, temperature_BT


def oracle(logits_BTV, targets_BT, kept_BTK, temperature_BT):
  """In float64, a position at a time."""
  logprob, whole, entropy = (np.zeros((B, T)) for _ in range(3))
  for at in np.ndindex(B, T):
    z = logits_BTV[at].astype(np.float64) / temperature_BT[at]
    lp = z - np.log(np.sum(np.exp(z)))
    whole[at] = lp[targets_BT[at]]
    members = kept_BTK[at][kept_BTK[at] >= 0]
    if members.size:
      lp = np.full(V, -np.inf)
      lp[members] = z[members] - np.log(np.sum(np.exp(z[members])))
    logprob[at] = lp[targets_BT[at]]
    p = np.exp(lp[lp > -np.inf])
    entropy[at] = -np.sum(p * np.log(p))
  return logprob, whole, entropy


logprobs = tiny_configs.jit(replay.sampling_mask_logprobs)


def test_sampling_mask_logprobs_of_the_golden_case():
  """Spec section 2.5."""
  found = logprobs(
    np.float32([[[2.0, 0.5, 1.0, -1.0, 0.0]] * 2]),
    np.array([[2, 2]]),
    np.array([[[0, 2, 4, -1], [-1] * 4]]),
    np.ones((1, 2), np.float32),
  )
  np.testing.assert_allclose(found[0], [-1.407606, -1.574438], atol=1e-6)
  ratio = np.exp(found[0, 1] - found[0, 0])
  np.testing.assert_allclose(ratio, 0.846342, atol=1e-6)


scores = tiny_configs.jit(replay.token_scores)


def test_token_scores_are_those_of_float64_loops():
  hidden_BTD, head_DV, *rest = inputs()
  logits_BTV = hidden_BTD @ head_DV
  found = scores(logits_BTV, *rest)
  for value, want in zip(
    (found.logprob_BT, found.vocabulary_logprob_BT, found.entropy_BT),
    oracle(logits_BTV, *rest),
    strict=True,
  ):
    np.testing.assert_allclose(value, want, atol=2e-6)


def test_token_scores_without_sets_are_over_the_vocabulary():
  hidden_BTD, head_DV, targets_BT, kept_BTK, temperature_BT = inputs()
  logits_BTV = hidden_BTD @ head_DV
  found = scores(logits_BTV, targets_BT, None, temperature_BT)
  _, expected, _ = oracle(logits_BTV, targets_BT, kept_BTK, temperature_BT)
  np.testing.assert_allclose(found.logprob_BT, expected, atol=2e-6)
  np.testing.assert_array_equal(found.logprob_BT, found.vocabulary_logprob_BT)


def test_token_scores_are_those_of_the_sampler(key):
  settings = [
    {},
    {'temperature': 0.6},
    {'top_p': 0.7},
    {'top_k': 4, 'temperature': 1.7},
    {'min_p': 0.1, 'top_k': 20, 'top_p': 0.9},
  ] * 4
  N = len(settings)
  logits_NV = 3 * jax.random.normal(key, (N, V))
  params = sampling.stack([sampling.Sampling(**s) for s in settings])
  draw = tiny_configs.jit(sampling.sample)
  drawn = draw(logits_NV, jax.random.split(key, N), params)
  kept_NV = np.full((N, V), -1, np.int32)
  for row, is_kept_V in enumerate(np.asarray(drawn.kept_BV)):
    members = np.flatnonzero(is_kept_V)
    kept_NV[row, : members.size] = members
  found = scores(
    logits_NV[None], drawn.token_B[None], kept_NV[None],
    params.temperature_B[None],
  )  # fmt: skip
  np.testing.assert_allclose(
    found.logprob_BT[0], drawn.sampling_logprob_B, atol=1e-6
  )
  whole = np.where(params.temperature_B == 1, drawn.logprob_B, 0)
  np.testing.assert_allclose(
    np.where(params.temperature_B == 1, found.vocabulary_logprob_BT[0], 0),
    whole,
    atol=1e-6,
  )


def test_scores_of_huge_logits_and_small_sets_are_finite():
  logits_BTV = jnp.array([[[1e4, 0.0, -1e4, 3.0]]])

  def logprob(logits_BTV):
    return replay.sampling_mask_logprobs(
      logits_BTV,
      jnp.array([[2]]),
      jnp.array([[[2, -1]]]),
      jnp.full((1, 1), 1e-3),
    )[0, 0]

  value, gradient = tiny_configs.jit(jax.value_and_grad(logprob))(logits_BTV)
  assert value == 0
  assert np.all(gradient == 0)


@functools.cache
def chunked(chunk: int):
  """Scores, and the gradient of a sum of log-probabilities."""

  def loss(hidden_BTD, head_DV, *rest):
    scores = replay.chunked_token_scores(
      lambda head_DV, x_BtD: jnp.einsum('btd,dv->btv', x_BtD, head_DV),
      head_DV,
      hidden_BTD,
      *rest,
      chunk=chunk,
    )
    # The weight tells places apart.
    weight_BT = jnp.cos(jnp.arange(B * T, dtype=jnp.float32)).reshape(B, T)
    return jnp.sum(weight_BT * scores.logprob_BT), scores

  return jax.value_and_grad(loss, (0, 1), has_aux=True)


@functools.cache
def compiled(chunk: int):
  return tiny_configs.jit(chunked(chunk))


@pytest.mark.parametrize('chunk', [2, 3])
def test_chunked_token_scores_are_the_whole_ones(chunk):
  arrays = [jnp.asarray(x) for x in inputs()]
  (_, expected), expected_grads = compiled(0)(*arrays)
  (_, found), grads = compiled(chunk)(*arrays)
  for value, want in zip(
    jax.tree.leaves((found, grads)),
    jax.tree.leaves((expected, expected_grads)),
    strict=True,
  ):
    np.testing.assert_allclose(value, want, atol=3e-6)


def avals(jaxpr) -> set[tuple[tuple[int, ...], str]]:
  """(shape, dtype) of every value of a jaxpr and of those inside it."""
  found = set()
  for equation in jaxpr.eqns:
    for variable in (*equation.invars, *equation.outvars):
      if hasattr(variable.aval, 'shape'):
        found.add((tuple(variable.aval.shape), str(variable.aval.dtype)))
    for value in equation.params.values():
      for part in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(part, 'jaxpr', part)
        if hasattr(inner, 'eqns'):
          found |= avals(inner)
  return found


def test_scores_and_their_gradient_make_no_mask_over_the_vocabulary():
  arrays = [jnp.asarray(x) for x in inputs()]
  found = avals(jax.make_jaxpr(chunked(0))(*arrays).jaxpr)
  over_vocabulary = {dtype for shape, dtype in found if shape[-1:] == (V,)}
  assert over_vocabulary == {'float32'}
  assert ((B, T, V), 'float32') in found


def test_chunked_scores_never_hold_all_logits():
  arrays = [jnp.asarray(x) for x in inputs()]
  found = avals(jax.make_jaxpr(chunked(2))(*arrays).jaxpr)
  largest = max(
    int(np.prod(shape[:-1])) for shape, _ in found if shape[-1:] == (V,)
  )
  # A chunk of two tokens of each row, or the head itself.
  assert largest == max(B * 2, D)


def test_chunked_scores_of_narrow_heads_sum_their_gradients_in_float32():
  arrays = [jnp.asarray(x) for x in inputs()]
  narrow = [x.astype(jnp.bfloat16) for x in arrays[:2]]
  (_, expected), expected_grads = compiled(0)(*narrow, *arrays[2:])
  (_, found), grads = compiled(2)(*narrow, *arrays[2:])
  assert grads[1].dtype == jnp.bfloat16
  assert found.logprob_BT.dtype == jnp.float32
  np.testing.assert_allclose(found.logprob_BT, expected.logprob_BT, atol=1e-6)
  for value, want in zip(grads, expected_grads, strict=True):
    np.testing.assert_allclose(
      np.float32(value), np.float32(want), atol=0.02, rtol=0.02
    )
