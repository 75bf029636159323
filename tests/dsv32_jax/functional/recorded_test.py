import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.functional import recorded as recorded_lib
from dsv32_jax.functional.recorded import Recorded

OWN = jnp.array([[[0, 1, 2], [3, 4, -1], [5, 6, 7], [-1, -1, -1]]])
RECORD = jnp.array(
  [[[2, 0, 1], [3, 5, -1], [-1, -1, -1], [1, 2, 3]]], jnp.int16
)
VALID = jnp.array([[True, True, True, False]])


def test_replayed_takes_records_where_there_are_some():
  taken, found = recorded_lib.replayed(OWN, Recorded(RECORD), VALID)
  assert taken.dtype == jnp.int32
  assert taken.tolist() == [[[2, 0, 1], [3, 5, -1], [5, 6, 7], [-1] * 3]]
  # Sets: the first position differs in order only.
  assert dataclasses.astuple(found) == (2, 1, 5, 1)


def test_replayed_without_force_only_counts():
  record = Recorded(RECORD, force=False)
  taken, found = recorded_lib.replayed(OWN, record, VALID)
  assert taken.tolist() == OWN.tolist()
  assert (found.positions, found.differing) == (2.0, 1.0)
  assert record.needs_own


def test_replayed_without_comparison_counts_nothing():
  taken, found = recorded_lib.replayed(
    OWN, Recorded(RECORD, compare=False), VALID
  )
  assert taken[0, 0].tolist() == [2, 0, 1]
  assert found is None


def test_complete_record_needs_no_own_choice():
  record = Recorded(RECORD, compare=False, is_complete=True)
  assert not record.needs_own
  taken, _ = recorded_lib.replayed(None, record, VALID)
  assert taken.tolist() == [[[2, 0, 1], [3, 5, -1], [-1] * 3, [-1] * 3]]


@pytest.mark.parametrize('K', [3, 16, 17, 40])
def test_mismatch_of_random_sets_is_that_of_python_sets(K):
  rng = np.random.default_rng(K)

  def draw():
    rows = np.stack([rng.permutation(60)[:K] for _ in range(20)])
    rows[rng.random(rows.shape) < 0.2] = -1
    return rows.reshape(4, 5, K)

  own, index = draw(), draw()
  own[0, 0] = rng.permutation(index[0, 0])
  counted = rng.random((4, 5)) < 0.7
  counted[0, 0] = True
  found = recorded_lib.mismatch(
    jnp.asarray(own), jnp.asarray(index), jnp.asarray(counted)
  )
  pairs = [
    (set(a.tolist()) - {-1}, set(b.tolist()) - {-1})
    for a, b in zip(own[counted], index[counted], strict=True)
  ]
  assert dataclasses.astuple(found) == (
    len(pairs),
    sum(a != b for a, b in pairs),
    sum(len(b) for _, b in pairs),
    sum(len(b - a) for a, b in pairs),
  )
  assert found.differing < found.positions
