import numpy as np
import pytest

from dsv32_jax.config.data import RecallConfig
from dsv32_jax.data import synthetic, synthetic_documents
from dsv32_jax.data.corpus import TokenCorpus
from dsv32_jax.data.synthetic import RecallRows, RecallTokens

_TASK = RecallTokens(first=368, num_keys=16, num_values=8)


@pytest.fixture
def corpus():
  rng = np.random.default_rng(0)
  return TokenCorpus(
    tokens=rng.integers(0, 256, 20_000).astype(np.uint16),
    offsets=np.array([0, 20_000]),
    names=('text',),
    label='',
    pad_id=258,
    fingerprint='',
  )


def _rows(corpus, *, seq_len=256, count=40, seed=0, **options):
  rows = RecallRows(
    [corpus],
    config=RecallConfig(share=0.5, **options),
    tokens=_TASK,
    seq_len=seq_len,
    seed=seed,
  )
  return [rows[i] for i in range(count)]


def _look_back(row, position, *, nearest, farthest):
  """Answers a query from tokens `nearest` to `farthest` before it, or -1."""
  key = int(row['tokens'][position]) - _TASK.query(0)
  start = max(0, position - farthest)
  seen = row['tokens'][start : max(0, position - nearest + 1)]
  found = np.intersect1d(seen, _TASK.candidates(key))
  return int(found[0]) if len(found) else -1


@pytest.mark.parametrize(
  ('seq_len', 'options'),
  [
    (256, {'min_gap': 32}),
    (64, {'min_gap': 8, 'num_keys': 8}),
    (63, {'min_gap': 32}),  # The smallest row that holds the task.
    (1024, {'min_gap': 128, 'max_gap': 200}),
    (128, {'min_gap': 31, 'max_gap': 31, 'num_keys': 16}),
  ],
)
def test_recall_rows_are_solved_by_looking_back_and_not_from_a_window(
  corpus, seq_len, options
):
  gap = options['min_gap']
  for row in _rows(corpus, seq_len=seq_len, **options):
    asked = np.flatnonzero(row['loss_weight'])
    assert len(asked) == options.get('num_keys', 16)
    for position in asked.tolist():
      answer = int(row['targets'][position])
      far = options.get('max_gap') or seq_len
      assert _look_back(row, position, nearest=gap, farthest=far) == answer
      # The window of `gap` tokens that ends at the query holds nothing of it.
      assert _look_back(row, position, nearest=0, farthest=gap - 1) == -1


@pytest.mark.parametrize(
  ('seq_len', 'min_gap', 'max_gap'),
  [(63, 32, None), (63, 32, 40), (62, 2, 31), (47, 2, None)],
)
def test_place_pairs_without_luck_still_fits(seq_len, min_gap, max_gap):
  class Unlucky(np.random.Generator):
    def random(self, shape):
      return np.zeros(shape)

  at, query = synthetic.place_pairs(
    Unlucky(np.random.PCG64(0)),
    seq_len=seq_len,
    num_pairs=16,
    min_gap=min_gap,
    max_gap=max_gap,
  )
  places = np.concatenate([at, query, query + 1])
  assert len(set(places.tolist())) == 48
  assert places.min() >= 0
  assert places.max() <= seq_len
  assert (query - at).min() >= min_gap
  assert max_gap is None or (query - at).max() <= max_gap


def test_recall_rows_each_key_is_asked_once_and_told_once(corpus):
  for row in _rows(corpus, min_gap=32, num_keys=12):
    tokens = np.append(row['tokens'], row['targets'][-1])
    queries = tokens[tokens >= _TASK.query(0)]
    assert len(set(queries.tolist())) == len(queries) == 12
    told = tokens[(tokens >= _TASK.first) & (tokens < _TASK.query(0))]
    values, counts = np.unique(told, return_counts=True)
    # The token itself and its repetition as the answer, no second value.
    np.testing.assert_array_equal(counts, 2)
    assert len(set(((values - _TASK.first) // 8).tolist())) == 12


def test_recall_rows_answers_are_even_over_values_and_keys(corpus):
  answers = np.concatenate(
    [row['targets'][row['loss_weight'] > 0] for row in _rows(corpus, count=300)]
  )
  values = np.bincount((answers - _TASK.first) % 8, minlength=8) / len(answers)
  # 4800 answers: a standard deviation of 0.005 around chance.
  np.testing.assert_allclose(values, 0.125, atol=0.025)
  some = _rows(corpus, count=100, num_keys=4)
  keys = {
    int(token - _TASK.first) // 8
    for row in some
    for token in row['targets'][row['loss_weight'] > 0]
  }
  assert keys == set(range(16))


def test_recall_rows_gaps_cover_the_whole_range_evenly(corpus):
  gaps = []
  for row in _rows(corpus, count=200, seq_len=512, min_gap=64):
    for position in np.flatnonzero(row['loss_weight']).tolist():
      told = np.flatnonzero(row['tokens'] == row['targets'][position])[0]
      gaps.append(position - told)
  assert min(gaps) >= 64
  assert max(gaps) > 480
  counts, _ = np.histogram(gaps, bins=4, range=(64, 512))
  # Even but for collisions at the crowded ends.
  assert counts.min() > 0.6 * len(gaps) / 4


def test_recall_rows_weigh_as_much_as_a_row_of_text(corpus):
  for num_keys in (4, 16):
    for row in _rows(corpus, num_keys=num_keys, count=3):
      assert row['loss_weight'].sum() == pytest.approx(256)
      assert row['loss_weight'].dtype == np.float32


def test_recall_rows_filler_is_consecutive_text(corpus):
  text = corpus.tokens.tobytes()
  for row in _rows(corpus, count=5):
    tokens = np.append(row['tokens'], row['targets'][-1])
    filler = tokens[tokens < _TASK.first].astype(np.uint16)
    assert len(filler) == 257 - 48
    assert filler.tobytes() in text
    np.testing.assert_array_equal(row['tokens'][1:], row['targets'][:-1])
    np.testing.assert_array_equal(row['segment_ids'], 1)
    np.testing.assert_array_equal(row['positions'], np.arange(256))


def test_recall_rows_follow_seed_and_index(corpus):
  first, second = _rows(corpus, count=2)
  again = _rows(corpus, count=2)
  np.testing.assert_array_equal(first['tokens'], again[0]['tokens'])
  assert (first['tokens'] != second['tokens']).any()
  other = _rows(corpus, count=1, seed=1)[0]
  assert (first['tokens'] != other['tokens']).any()


def test_recall_rows_too_short_row_is_refused(corpus):
  with pytest.raises(ValueError, match='seq_len: got 62'):
    _rows(corpus, seq_len=62, min_gap=32)


@pytest.mark.parametrize('distance', [1, 40, 200, 255])
def test_recall_eval_batch_answers_lie_exactly_that_far_back(corpus, distance):
  out = synthetic.recall_eval_batch(
    [corpus],
    tokens=_TASK,
    seq_len=256,
    batch_size=4,
    distance=distance,
  )
  assert set(out.row.tolist()) == {0, 1, 2, 3}
  tokens = out.batch['tokens']
  np.testing.assert_array_equal(
    tokens[out.row, out.position - distance], out.answer
  )
  np.testing.assert_array_equal(out.distance, distance)
  np.testing.assert_array_equal(
    out.batch['targets'][out.row, out.position], out.answer
  )
  key = tokens[out.row, out.position] - _TASK.query(0)
  np.testing.assert_array_equal(
    out.candidates, _TASK.first + 8 * key[:, None] + np.arange(8)[None]
  )
  assert (out.candidates == out.answer[:, None]).sum(axis=1).tolist() == [
    1
  ] * len(out.row)
  assert out.chance == 0.125
  # Weight on the answers only, each row like a row of text.
  weighted = np.argwhere(out.batch['loss_weight'] > 0)
  assert sorted(map(tuple, weighted.tolist())) == sorted(
    zip(out.row.tolist(), out.position.tolist(), strict=True)
  )
  np.testing.assert_allclose(
    out.batch['loss_weight'].sum(axis=1), 256, rtol=1e-6
  )
  # All 16 keys stand in the row at every distance.
  for row in tokens:
    told = row[(row >= _TASK.first) & (row < _TASK.query(0))]
    assert len(set(((told - _TASK.first) // 8).tolist())) == 16


def test_recall_eval_batch_impossible_distance_is_refused(corpus):
  for distance in (0, 256):
    with pytest.raises(ValueError, match=f'distance: got {distance}'):
      synthetic.recall_eval_batch(
        [corpus], tokens=_TASK, seq_len=256, batch_size=1, distance=distance
      )


def test_recall_tokens_default_to_the_end_of_the_vocabulary():
  tokens = RecallTokens.of(RecallConfig(), vocab_size=512, text_vocab_size=267)
  assert tokens == _TASK
  assert tokens.query(15) == 511
  with pytest.raises(ValueError, match=r'recall.first_token: got 112'):
    RecallTokens.of(RecallConfig(), vocab_size=256, text_vocab_size=267)
  with pytest.raises(ValueError, match=r'recall.first_token: got 100'):
    RecallTokens.of(
      RecallConfig(first_token=100), vocab_size=512, text_vocab_size=267
    )


def test_synthetic_documents_follow_kind_seed_and_number():
  first = synthetic_documents.generate('copy', num_documents=3)
  assert synthetic_documents.generate('copy', num_documents=5)[:3] == first
  other = synthetic_documents.generate('copy', num_documents=3, seed=1)
  assert [t for _, t in other] != [t for _, t in first]
  with pytest.raises(ValueError, match="kind: got 'sort'"):
    synthetic_documents.generate('sort', num_documents=1)
