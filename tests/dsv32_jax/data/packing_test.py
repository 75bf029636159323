import numpy as np
import pytest

from dsv32_jax.data.corpus import TokenCorpus, tokenize
from dsv32_jax.data.packing import PackedRows, best_fit_decreasing, make_row
from dsv32_jax.data.sources import Documents
from dsv32_jax.data.tokenizer import ByteTokenizer

_PAD = 9999


def _corpus(lengths):
  """Documents whose tokens are all different, so that each names its place."""
  offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
  return TokenCorpus(
    tokens=np.arange(offsets[-1], dtype=np.uint32),
    offsets=offsets,
    names=tuple(f'doc{i}' for i in range(len(lengths))),
    label='source test',
    pad_id=_PAD,
    fingerprint='',
  )


def _document_of(corpus, tokens):
  return np.searchsorted(corpus.offsets, tokens, side='right') - 1


def _all_rows(rows, epoch=0):
  return [rows.row(i, epoch=epoch) for i in range(rows.num_rows)]


def test_make_row_two_pieces_have_segments_positions_and_no_target_across():
  row = make_row(
    [np.array([5, 6, 7]), np.array([8, 9])], seq_len=6, pad_id=_PAD
  )
  np.testing.assert_array_equal(row['tokens'], [5, 6, 7, 8, 9, _PAD])
  np.testing.assert_array_equal(row['targets'], [6, 7, 8, 9, _PAD, _PAD])
  np.testing.assert_array_equal(row['segment_ids'], [1, 1, 1, 2, 2, 0])
  np.testing.assert_array_equal(row['positions'], [0, 1, 2, 0, 1, 0])
  np.testing.assert_array_equal(row['loss_weight'], [1, 1, 0, 1, 0, 0])
  assert row['loss_weight'].dtype == np.float32
  for name in ('tokens', 'targets', 'segment_ids', 'positions'):
    assert row[name].dtype == np.int32


@pytest.mark.parametrize('split', [True, False])
def test_packed_rows_targets_stay_in_their_document(split):
  lengths = np.random.default_rng(0).integers(2, 60, 80)
  corpus = _corpus(lengths)
  rows = PackedRows(corpus, seq_len=16, seed=1, split_documents=split)
  for row in _all_rows(rows):
    tokens, targets = row['tokens'], row['targets']
    weighted = row['loss_weight'] > 0
    # Tokens are numbered through the corpus: the next one is the successor.
    np.testing.assert_array_equal(targets[weighted], tokens[weighted] + 1)
    np.testing.assert_array_equal(
      _document_of(corpus, tokens[weighted]),
      _document_of(corpus, targets[weighted]),
    )
    real = row['segment_ids'] > 0
    np.testing.assert_array_equal(real, tokens != _PAD)
    assert not weighted[~real].any()
    # One document a segment, segments 1, 2, ... in order, positions restart.
    for segment in range(1, row['segment_ids'].max() + 1):
      inside = row['segment_ids'] == segment
      assert len(set(_document_of(corpus, tokens[inside]).tolist())) == 1
      np.testing.assert_array_equal(
        row['positions'][inside], np.arange(inside.sum())
      )
    assert (np.diff(row['segment_ids'][real]) >= 0).all()


def test_packed_rows_split_uses_each_target_once_and_never_pads():
  corpus = _corpus(np.random.default_rng(0).integers(2, 60, 80))
  rows = PackedRows(corpus, seq_len=16, seed=1)
  targets = np.concatenate(
    [row['targets'][row['loss_weight'] > 0] for row in _all_rows(rows)]
  )
  assert len(set(targets.tolist())) == len(targets)
  # All targets but those of the dropped end of the epoch.
  assert corpus.num_tokens - 80 - len(targets) < 17
  assert all((row['segment_ids'] > 0).all() for row in _all_rows(rows))


def test_packed_rows_unsplit_uses_every_target_once_and_cuts_only_long_ones():
  lengths = np.array([3, 5, 17, 18, 33, 40, 2, 7, 11, 16])
  corpus = _corpus(lengths)
  rows = PackedRows(corpus, seq_len=16, seed=1, split_documents=False)
  all_rows = _all_rows(rows)
  targets = np.concatenate(
    [row['targets'][row['loss_weight'] > 0] for row in all_rows]
  )
  starts = corpus.offsets[:-1]
  expected = np.setdiff1d(np.arange(corpus.num_tokens), starts)
  np.testing.assert_array_equal(np.sort(targets), expected)
  for document, length in enumerate(lengths):
    holders = [
      row
      for row in all_rows
      if (_document_of(corpus, row['tokens']) == document)[
        row['segment_ids'] > 0
      ].any()
    ]
    if length <= 17:
      assert len(holders) == 1


def test_packed_rows_order_follows_seed_and_epoch():
  corpus = _corpus(np.random.default_rng(0).integers(2, 60, 80))
  for split in (True, False):

    def tokens(seed, epoch, split=split):
      rows = PackedRows(corpus, seq_len=16, seed=seed, split_documents=split)
      return np.stack([row['tokens'] for row in _all_rows(rows, epoch)])

    np.testing.assert_array_equal(tokens(1, 0), tokens(1, 0))
    assert (tokens(1, 0) != tokens(1, 1)).any()
    assert (tokens(1, 0) != tokens(2, 0)).any()
    rows = PackedRows(corpus, seq_len=16, seed=1, split_documents=split)
    later = rows.row(3, epoch=1)
    rows.row(0, epoch=0)  # Another epoch in between changes nothing.
    np.testing.assert_array_equal(
      rows.row(3, epoch=1)['tokens'], later['tokens']
    )


def test_packed_rows_corpus_smaller_than_row_is_padded():
  rows = PackedRows(_corpus([3, 4]), seq_len=16)
  assert rows.num_rows == 1
  row = rows.row(0, epoch=0)
  assert (row['segment_ids'] > 0).sum() == 7
  assert row['loss_weight'].sum() == 5


def test_packed_rows_without_usable_document_are_refused():
  with pytest.raises(ValueError, match='source test: no document has two'):
    PackedRows(_corpus([1, 1]), seq_len=16)


def test_best_fit_decreasing_takes_the_fullest_bin_that_fits():
  assert best_fit_decreasing([7, 6, 4, 3, 3], capacity=10) == [
    [0, 3],
    [1, 2],
    [4],
  ]
  lengths = sorted(np.random.default_rng(0).integers(1, 30, 500).tolist())[::-1]
  bins = best_fit_decreasing(lengths, capacity=30)
  assert sorted(item for members in bins for item in members) == list(
    range(500)
  )
  assert max(sum(lengths[i] for i in members) for members in bins) <= 30
  # Its worst case over the best possible (at least the total over 30).
  assert len(bins) <= 11 / 9 * -(-sum(lengths) // 30) + 1


def test_tokenize_adds_bos_and_eos_to_each_document():
  documents = Documents(names=('a', 'b'), texts=(b'xy', b'z'), label='')
  tokenizer = ByteTokenizer()
  bos, eos = tokenizer.bos_id, tokenizer.eos_id
  both = tokenize(documents, tokenizer, add_bos=True, add_eos=True)
  np.testing.assert_array_equal(
    both.tokens, [bos, 120, 121, eos, bos, 122, eos]
  )
  np.testing.assert_array_equal(both.offsets, [0, 4, 7])
  plain = tokenize(documents, tokenizer, add_eos=False)
  np.testing.assert_array_equal(plain.tokens, [120, 121, 122])
  assert plain.fingerprint != both.fingerprint


def test_tokenize_slow_tokenizer_is_cached_and_survives_damage(tmp_path):
  documents = Documents(names=('a', 'b'), texts=(b'xy', b'z'), label='')

  class Slow(ByteTokenizer):
    name = 'slow'
    calls = 0

    def encode_batch(self, texts):
      self.calls += 1
      return super().encode_batch(texts)

  tokenizer = Slow()

  def tokens():
    corpus = tokenize(documents, tokenizer, cache_dir=str(tmp_path))
    return corpus.tokens.tolist()

  first = tokens()
  assert tokens() == first
  assert tokenizer.calls == 1
  (cached,) = tmp_path.glob('tokens-*.npz')
  cached.write_bytes(cached.read_bytes()[:100])
  assert tokens() == first
  assert tokenizer.calls == 2
