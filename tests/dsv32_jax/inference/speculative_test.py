"""Speculative sampling: the tokens follow the target's distribution exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.inference import sampling as sampling_lib
from dsv32_jax.inference import speculative
from dsv32_jax.inference.sampling import GREEDY, Sampling
from tests.support import frequencies

V = 6
ROUNDS = 40_000

verify = jax.jit(speculative.verify)
target_logits = jax.jit(sampling_lib.target_logits)
request_keys = jax.jit(sampling_lib.request_keys)
# Log-weights after nothing, for target and draft; later positions are made of
# them. 'apart' share no token: every draft falls.
PAIRS = {
  'near': (Sampling(), 0.3),
  'far': (Sampling(), 2.0),
  'equal': (Sampling(), 0.0),
  'truncated': (Sampling(top_k=3, min_p=0.05), 1.0),
  'nucleus': (Sampling(temperature=0.8, top_p=0.7), 1.0),
}


def _keys(count, *, first=0):
  return request_keys(np.arange(first, first + count, dtype=np.uint32))


def _tables(name, *, depth):
  """Log-weights of target and draft after every prefix of drafts.

  Returns one [V**n, V] table a position n, the prefix written in base V.
  """
  sampling, distance = PAIRS[name]
  rng = np.random.default_rng(len(name))
  tables = []
  for n in range(depth + 1):
    logits_PV = 1.5 * rng.normal(size=(V**n, V))
    noise_PV = distance * rng.normal(size=(V**n, V))
    params = sampling_lib.stack([sampling] * V**n)
    tables.append(
      [
        np.asarray(target_logits(jnp.asarray(x, 'f4'), params))
        for x in (logits_PV, logits_PV + noise_PV)
      ]
    )
  return tables


@jax.jit
def _round(tables, key_B):
  """Drafts D tokens by the draft's tables, and verifies them."""
  depth = len(tables) - 1
  prefix_B = jnp.zeros(key_B.shape, jnp.int32)
  targets, drafts, tokens = [], [], []
  for n, (target_PV, draft_PV) in enumerate(tables):
    targets.append(target_PV[prefix_B])
    if n < depth:
      drafts.append(draft_PV[prefix_B])
      draft_key_B = sampling_lib.step_keys(key_B, jnp.int32(n))
      tokens.append(sampling_lib.draw(drafts[-1], draft_key_B))
      prefix_B = prefix_B * V + tokens[-1]
  tokens_BD = jnp.stack(tokens, axis=1)
  verified = verify(
    jnp.stack(targets, axis=1),
    jnp.stack(drafts, axis=1),
    tokens_BD,
    sampling_lib.step_keys(key_B, jnp.int32(depth)),
  )
  return tokens_BD, verified


def _softmax(weights_PV):
  weights_PV = np.exp(weights_PV.astype(np.float64))
  return weights_PV / weights_PV.sum(-1, keepdims=True)


@pytest.mark.parametrize('depth', [1, 2])
@pytest.mark.parametrize('name', PAIRS)
def test_verify_gives_the_targets_distribution(name, depth):
  """Bar 5: the tokens of a round, finished by plain draws, against p's own."""
  tables = _tables(name, depth=depth)
  tokens_BD, verified = _round(tables, _keys(ROUNDS))
  tokens_BD = np.asarray(tokens_BD)
  num_B = np.asarray(verified.num_accepted_B)
  sequence_BT = np.concatenate([tokens_BD, np.zeros((ROUNDS, 1), int)], axis=1)
  sequence_BT[np.arange(ROUNDS), num_B] = verified.token_B
  # Positions that the round did not reach are drawn from the target: then all
  # rounds are sequences of one length with a known joint distribution.
  rng = np.random.default_rng(7)
  joint = np.ones(1)
  prefix_B = np.zeros(ROUNDS, int)
  for n, (target_PV, _) in enumerate(tables):
    p_PV = _softmax(target_PV)
    joint = (joint[:, None] * p_PV).ravel()
    plain_B = (
      rng.random((ROUNDS, 1)) > np.cumsum(p_PV[prefix_B], axis=-1)
    ).sum(-1)
    token_B = np.where(
      n <= num_B, sequence_BT[:, n], np.minimum(plain_B, V - 1)
    )
    prefix_B = prefix_B * V + token_B
  frequencies.assert_follow(prefix_B, joint, tests=2 * len(PAIRS))
  # How many stand is known as well: the overlap of the two distributions.
  p_V, q_V = (_softmax(table)[0] for table in tables[0])
  overlap = np.minimum(p_V, q_V).sum()
  deviation = 5 * np.sqrt(overlap * (1 - overlap) / ROUNDS) + 1e-6
  np.testing.assert_allclose((num_B > 0).mean(), overlap, atol=deviation)


def test_verify_of_greedy_rows_is_equality_with_the_argmax():
  B, D = 64, 3
  rng = np.random.default_rng(0)
  params = sampling_lib.stack([GREEDY] * B)
  logits_BTV = rng.normal(size=(B, D + 1, V)).astype(np.float32)
  # Like the target, so that some drafts agree with it.
  draft_BDV = logits_BTV[:, :D] + rng.normal(size=(B, D, V)).astype(np.float32)
  tokens_BD = draft_BDV.argmax(-1).astype(np.int32)
  verified = verify(
    target_logits(logits_BTV, params),
    target_logits(draft_BDV, params),
    tokens_BD,
    _keys(B),
  )
  best_BT = logits_BTV.argmax(-1)
  agrees_BD = tokens_BD == best_BT[:, :D]
  expected_B = np.cumprod(agrees_BD, axis=-1).sum(-1)
  assert set(expected_B) == set(range(D + 1))
  np.testing.assert_array_equal(verified.num_accepted_B, expected_B)
  np.testing.assert_array_equal(
    verified.token_B, best_BT[np.arange(B), expected_B]
  )


def test_verify_of_equal_distributions_accepts_every_draft():
  """p = q to the last bit, also where they are tiny or the peak is sharp."""
  B, D = 1024, 4
  rng = np.random.default_rng(1)
  # Drafts of any probability, which draws would hardly reach.
  weights_BTV = rng.normal(size=(B, D + 1, 50)).astype(np.float32)
  weights_BTV *= np.geomspace(0.01, 60, B, dtype=np.float32)[:, None, None]
  tokens_BD = rng.integers(0, 50, (B, D), np.int32)
  verified = verify(weights_BTV, weights_BTV[:, :D], tokens_BD, _keys(B))
  q_BDV = np.exp(weights_BTV[:, :D] - weights_BTV[:, :D].max(-1)[..., None])
  possible_BD = np.take_along_axis(q_BDV, tokens_BD[..., None], -1)[..., 0]
  possible_B = (possible_BD > 1e-30).all(-1)
  assert possible_B.sum() > B // 2
  num_B = np.asarray(verified.num_accepted_B)
  np.testing.assert_array_equal(num_B[possible_B], D)
  token_B = np.asarray(verified.token_B)
  assert ((token_B >= 0) & (token_B < 50)).all()


def test_verify_without_overlap_draws_from_the_target_alone():
  """Every draft falls, and no token of the draft's comes out."""
  B, none = 200, -np.inf
  target_BTV = np.tile(np.array([0, 1, none, none], np.float32), (B, 2, 1))
  draft_BDV = np.tile(np.array([none, none, 0, 0], np.float32), (B, 1, 1))
  verified = verify(target_BTV, draft_BDV, np.full((B, 1), 2, 'i4'), _keys(B))
  np.testing.assert_array_equal(verified.num_accepted_B, 0)
  assert set(verified.token_B.tolist()) == {0, 1}


def test_verify_depends_on_the_row_not_on_the_batch():
  B, D = 64, 3
  rng = np.random.default_rng(2)
  target_BTV = rng.normal(size=(B, D + 1, V)).astype(np.float32)
  draft_BDV = rng.normal(size=(B, D, V)).astype(np.float32)
  tokens_BD = draft_BDV.argmax(-1).astype(np.int32)
  together = verify(target_BTV, draft_BDV, tokens_BD, _keys(B))
  for row in range(0, B, 8):
    one = slice(row, row + 1)
    alone = verify(
      target_BTV[one], draft_BDV[one], tokens_BD[one], _keys(1, first=row)
    )
    assert alone.num_accepted_B[0] == together.num_accepted_B[row]
    assert alone.token_B[0] == together.token_B[row]
