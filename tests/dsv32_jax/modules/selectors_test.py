import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax.functional import masking
from dsv32_jax.modules import selectors
from tests.support import tiny_configs, tolerances

K = 4
# A full row, packed documents, and a row of padding after one token.
ROWS = tiny_configs.rows([[20], [9, 7], [1]])
START, END = masking.key_ranges(jnp.asarray(ROWS['segment_ids']))


def _sets(indices_BTK):
  """Each row's selected keys; refuses duplicates."""
  found = []
  for row in np.asarray(indices_BTK).reshape(-1, indices_BTK.shape[-1]):
    picked = [i for i in row.tolist() if i >= 0]
    assert len(picked) == len(set(picked))
    found.append(set(picked))
  return found


def _ranges():
  return [
    range(s, e)
    for s, e in zip(
      np.ravel(START).tolist(), np.ravel(END).tolist(), strict=True
    )
  ]


def _operands(seed=0, length=20):
  generator = np.random.default_rng(seed)
  return jnp.asarray(
    generator.standard_normal((2, 3, length, 2, 5)), jnp.float32
  )


def _head_mean_oracle(q, k, scale):
  """Float64 p of Eq. 3, row by row."""
  q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
  p = np.zeros((*q.shape[:2], k.shape[1]))
  for b, t in np.ndindex(*q.shape[:2]):
    keys = np.arange(int(START[b, t]), int(END[b, t]))
    if len(keys):
      scores = scale * np.einsum('hx,shx->hs', q[b, t], k[b, keys])
      mass = np.exp(scores - scores.max(-1, keepdims=True))
      p[b, t, keys] = (mass / mass.sum(-1, keepdims=True)).mean(0)
  return p


def test_window_keeps_the_most_recent_valid_keys():
  for keys, picked in zip(
    _ranges(), _sets(selectors.window(START, END, k=K)), strict=True
  ):
    assert picked == set(list(keys)[-K:])


def test_head_mean_attention_matches_float64():
  q, k = _operands()
  p_BTS = selectors.head_mean_attention(q, k, START, END, scale=0.7)
  desired = _head_mean_oracle(q, k, 0.7)
  tolerances.assert_close(p_BTS, desired)
  np.testing.assert_allclose(
    np.sum(p_BTS, -1), np.asarray(END > START, np.float32), atol=1e-6
  )


def test_oracle_takes_the_largest_attention():
  q, k = _operands()
  indices = selectors.oracle(q, k, START, END, k=K, scale=0.7)
  p = _head_mean_oracle(q, k, 0.7).reshape(-1, 20)
  for keys, picked, mass in zip(_ranges(), _sets(indices), p, strict=True):
    assert picked == set(sorted(keys, key=lambda s: (-mass[s], s))[:K])


def test_random_draws_valid_subsets_of_the_same_size():
  indices = selectors.random(jax.random.key(0), START, END, k=K, num_keys=20)
  for keys, picked in zip(_ranges(), _sets(indices), strict=True):
    assert picked <= set(keys)
    assert len(picked) == min(K, len(keys))


def test_random_same_key_repeats_and_another_key_differs():
  draw = [
    _sets(selectors.random(jax.random.key(s), START, END, k=K, num_keys=20))
    for s in (0, 0, 1)
  ]
  assert draw[0] == draw[1]
  assert draw[0] != draw[2]
  # Queries draw apart from each other.
  assert len({frozenset(picked) for picked in draw[0][10:20]}) > 5


def test_random_is_uniform_over_the_valid_keys():
  """4000 draws of 4 of 16 keys: each key 1000 times, sd 27."""
  start = jnp.full((20, 200), 3)
  indices = selectors.random(
    jax.random.key(3), start, start + 16, k=K, num_keys=20
  )
  counts = np.bincount(np.ravel(indices), minlength=20)
  assert (counts[[0, 1, 2, 19]] == 0).all()
  assert np.abs(counts[3:19] - 1000).max() < 5 * 28


def test_map_query_chunks_equals_one_call():
  """Twenty queries in chunks of six: the last chunk is padded."""
  q, k = _operands()

  def function(q_BtHX, start_Bt, end_Bt):
    p = selectors.head_mean_attention(q_BtHX, k, start_Bt, end_Bt, scale=0.7)
    return {'p': p, 'count': end_Bt - start_Bt}

  chunked = selectors.map_query_chunks(function, q, START, END, chunk=6)
  whole = function(q, START, END)
  assert jax.tree.map(jnp.shape, chunked) == jax.tree.map(jnp.shape, whole)
  tolerances.assert_close(chunked['p'], whole['p'])
  np.testing.assert_array_equal(chunked['count'], whole['count'])
