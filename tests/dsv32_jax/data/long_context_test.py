import numpy as np
import pytest

from dsv32_jax.config.data import LengthBucket
from dsv32_jax.data.corpus import TokenCorpus
from dsv32_jax.data.long_context import (
  DEFAULT_MIX,
  LongRows,
  length_mix_rows,
)


def _corpus(lengths):
  offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
  return TokenCorpus(
    tokens=np.arange(offsets[-1], dtype=np.uint32),
    offsets=offsets,
    names=tuple(f'doc{i}' for i in range(len(lengths))),
    label='source test',
    pad_id=0,
    fingerprint='',
  )


def _document_lengths(corpus, row):
  """Length of the whole document behind each real position of a row."""
  tokens = row['tokens'][row['segment_ids'] > 0]
  documents = np.searchsorted(corpus.offsets, tokens, side='right') - 1
  return corpus.lengths[documents]


def test_long_rows_are_windows_of_one_document_side_by_side():
  corpus = _corpus([10, 100, 17, 16])
  rows = LongRows(corpus, seq_len=16, seed=0)
  assert rows.num_rows == 6 + 1
  targets = []
  for index in range(rows.num_rows):
    row = rows.row(index, epoch=0)
    np.testing.assert_array_equal(row['targets'], row['tokens'] + 1)
    np.testing.assert_array_equal(row['positions'], np.arange(16))
    np.testing.assert_array_equal(row['segment_ids'], 1)
    np.testing.assert_array_equal(row['loss_weight'], 1)
    last = row['targets'][-1]
    assert corpus.offsets[1] < last < corpus.offsets[3]
    targets += row['targets'].tolist()
  assert len(set(targets)) == len(targets)


def test_long_rows_windows_begin_elsewhere_in_other_epochs():
  rows = LongRows(_corpus([1000]), seq_len=64, seed=0)
  starts = {int(rows.row(0, epoch=e)['tokens'][0]) for e in range(20)}
  assert len(starts) > 5
  assert all(start + 15 * 64 < 1000 for start in starts)
  again = LongRows(_corpus([1000]), seq_len=64, seed=0).row(0, epoch=3)
  np.testing.assert_array_equal(rows.row(0, epoch=3)['tokens'], again['tokens'])


def test_long_rows_without_long_document_are_refused_with_the_longest():
  with pytest.raises(ValueError, match=r'has 16 tokens, expected .* 17'):
    LongRows(_corpus([16, 3]), seq_len=16)


@pytest.mark.parametrize('seq_len', [32, 128])
def test_length_mix_ranges_scale_with_the_row(seq_len):
  rng = np.random.default_rng(0)
  corpus = _corpus(rng.integers(2, 1000, 300))
  mix = (
    LengthBucket(min_fraction=0.0, share=1.0),
    LengthBucket(min_fraction=0.25, share=1.0),
    LengthBucket(min_fraction=1.0, share=2.0),
  )
  (short, a), (middle, b), (long, c) = length_mix_rows(
    corpus, mix, seq_len=seq_len
  )
  assert (a, b, c) == (0.25, 0.25, 0.5)
  for index in range(short.num_rows):
    lengths = _document_lengths(corpus, short.row(index, epoch=0))
    assert lengths.max() < seq_len / 4
  for index in range(middle.num_rows):
    lengths = _document_lengths(corpus, middle.row(index, epoch=0))
    assert seq_len / 4 <= lengths.min() <= lengths.max() <= seq_len
  for index in range(long.num_rows):
    row = long.row(index, epoch=0)
    assert _document_lengths(corpus, row).min() > seq_len
    assert row['segment_ids'].max() == 1


def test_length_mix_documents_shorter_than_row_are_not_cut():
  corpus = _corpus([5, 9, 12, 7, 16, 40])
  (short, _), _ = length_mix_rows(corpus, DEFAULT_MIX, seq_len=16)
  targets = []
  for index in range(short.num_rows):
    row = short.row(index, epoch=0)
    targets += row['targets'][row['loss_weight'] > 0].tolist()
  expected = np.setdiff1d(np.arange(5 + 9 + 12 + 7 + 16), corpus.offsets)
  assert sorted(targets) == expected.tolist()


def test_length_mix_empty_range_is_refused_by_name():
  with pytest.raises(ValueError, match=r'length_mix: no document .*1\.0'):
    length_mix_rows(_corpus([5, 9]), DEFAULT_MIX, seq_len=16)


def test_length_mix_none_packs_all_documents():
  ((rows, share),) = length_mix_rows(_corpus([50, 60]), (), seq_len=16)
  assert share == 1
  assert rows.num_rows == 109 // 16
