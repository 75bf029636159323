import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax.functional import masking


def test_key_ranges_packed_documents_stay_within_their_segment():
  segments = jnp.array([[1, 1, 1, 2, 2, 5, 0, 0], [3, 3, 3, 3, 3, 3, 3, 3]])
  start, end = jax.jit(masking.key_ranges)(segments)
  assert start.dtype == end.dtype == jnp.int32
  assert start.tolist() == [[0, 0, 0, 3, 3, 5, 0, 0], [0] * 8]
  assert end.tolist() == [[1, 2, 3, 4, 5, 6, 0, 0], list(range(1, 9))]


def test_key_ranges_left_padding_starts_at_the_document():
  start, end = masking.key_ranges(jnp.array([[0, 0, 4, 4]]))
  assert start.tolist() == [[0, 0, 2, 2]]
  assert end.tolist() == [[0, 0, 3, 4]]


def test_key_ranges_random_packing_equals_segment_mask(key):
  # Lengths drawn at random; the definition is a comparison of all pairs.
  lengths = jax.random.randint(key, (3, 9), 0, 7)
  rows = [np.repeat(np.arange(1, 10), row)[:32] for row in np.array(lengths)]
  segments = np.stack([np.pad(row, (0, 32 - len(row))) for row in rows])
  start, end = masking.key_ranges(jnp.asarray(segments))
  mask = masking.range_mask(start, end, num_keys=32)
  same = segments[:, :, None] == segments[:, None]
  causal = np.tril(np.ones((32, 32), bool))
  np.testing.assert_array_equal(
    mask, same & causal & (segments != 0)[:, :, None]
  )


def test_causal_ranges_align_queries_with_the_last_keys():
  start, end = masking.causal_ranges(2, 3, 5)
  assert start.tolist() == [[0, 0, 0]] * 2
  assert end.tolist() == [[3, 4, 5]] * 2
  # More queries than keys: the first ones see none.
  _, end = masking.causal_ranges(1, 4, 2)
  assert end.tolist() == [[0, 0, 1, 2]]


def test_cached_ranges_end_at_the_position_of_the_query():
  positions = jnp.array([[4, 5, -1], [0, 1, 2]])
  start, end = masking.cached_ranges(positions)
  assert start.tolist() == [[0, 0, 0], [0, 0, 0]]
  assert end.tolist() == [[5, 6, 0], [1, 2, 3]]
  start, end = masking.cached_ranges(positions, start_B=jnp.array([2, 1]))
  assert start.tolist() == [[2, 2, 0], [1, 1, 1]]
  assert end.tolist() == [[5, 6, 0], [1, 2, 3]]
  rows = masking.valid_rows(start, end)
  assert rows.tolist() == [[True, True, False], [False, True, True]]


def test_cached_ranges_one_token_at_a_time_equal_the_whole_prefill():
  _, whole = masking.causal_ranges(1, 6, 6)
  steps = [masking.cached_ranges(jnp.array([[t]]))[1] for t in range(6)]
  np.testing.assert_array_equal(jnp.concatenate(steps, axis=1), whole)


def test_valid_counts_inverted_range_counts_nothing():
  start, end = jnp.array([[0, 3, 4]]), jnp.array([[2, 3, 1]])
  assert masking.valid_counts(start, end).tolist() == [[2, 0, 0]]
  assert masking.valid_rows(start, end).tolist() == [[True, False, False]]
  mask = masking.range_mask(start, end, num_keys=4)
  assert mask.sum(-1).tolist() == [[2, 0, 0]]
