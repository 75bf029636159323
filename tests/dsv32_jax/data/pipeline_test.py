import dataclasses
import json

import numpy as np
import pytest

from dsv32_jax import data
from dsv32_jax.config.data import (
  DataConfig,
  LengthBucket,
  RecallConfig,
  SourceConfig,
)
from dsv32_jax.data.row_order import ShuffledRows

_SOURCE = SourceConfig(max_documents=100)
_CONFIG = DataConfig(
  seq_len=64,
  batch_size=8,
  sources=(_SOURCE,),
  held_out_fraction=0.2,
  recall=RecallConfig(share=0.5, min_gap=8, num_keys=8),
)


@pytest.fixture(scope='module')
def corpora():
  tokenizer = data.make_tokenizer(_CONFIG, vocab_size=512)
  return data.load_corpora(_CONFIG, tokenizer)


def _iterator(corpora, config=_CONFIG, **options):
  return data.train_iterator(config, corpora, vocab_size=512, **options)


def _take(iterator, count):
  return [next(iterator) for _ in range(count)]


def _assert_equal(batches, others):
  assert len(batches) == len(others)
  for batch, other in zip(batches, others, strict=True):
    assert batch.keys() == other.keys()
    for name in batch:
      np.testing.assert_array_equal(batch[name], other[name])


def _is_recall(batch):
  return (batch['loss_weight'] > 1).any(axis=1)


def test_train_iterator_batches_have_the_contract_shapes_and_dtypes(corpora):
  batch = next(_iterator(corpora))
  assert {name: value.dtype for name, value in batch.items()} == {
    'tokens': np.int32,
    'targets': np.int32,
    'loss_weight': np.float32,
    'segment_ids': np.int32,
    'positions': np.int32,
  }
  assert all(value.shape == (8, 64) for value in batch.values())
  assert batch['tokens'].max() < 512


def test_train_iterator_same_config_gives_the_same_batches(corpora):
  first = _take(_iterator(corpora), 20)
  _assert_equal(first, _take(_iterator(corpora), 20))
  reloaded = data.load_corpora(_CONFIG, corpora.tokenizer)
  assert reloaded.fingerprint == corpora.fingerprint
  _assert_equal(first, _take(_iterator(reloaded), 20))
  other_run = next(_iterator(corpora, run_seed=1))
  assert (other_run['tokens'] != first[0]['tokens']).any()
  reseeded = dataclasses.replace(_CONFIG, seed=1)
  other_stage = next(_iterator(corpora, reseeded))
  assert (other_stage['tokens'] != first[0]['tokens']).any()
  assert (other_stage['tokens'] != other_run['tokens']).any()


@pytest.mark.parametrize('prefetch', [0, 3])
@pytest.mark.parametrize('steps', [0, 1, 7])
def test_train_iterator_restored_state_continues_exactly(
  corpora, steps, prefetch
):
  config = dataclasses.replace(_CONFIG, prefetch=prefetch)
  iterator = _iterator(corpora, config)
  _take(iterator, steps)
  state = json.loads(json.dumps(iterator.get_state()))
  rest = _take(iterator, 6)
  resumed = _iterator(corpora, config)
  _take(resumed, 3)  # Where it stood before does not matter.
  resumed.set_state(state)
  assert resumed.get_state() == state
  _assert_equal(_take(resumed, 6), rest)


def test_train_iterator_restored_state_continues_over_epoch_ends(corpora):
  config = dataclasses.replace(
    _CONFIG, seq_len=16384, recall=RecallConfig(), batch_size=40
  )
  iterator = _iterator(corpora, config)
  batches = _take(iterator, 12)
  assert corpora.train[0].num_tokens / 16384 < 9 * 40  # Two epochs or more.
  resumed = _iterator(corpora, config)
  resumed.set_state({**resumed.get_state(), 'grain': {'next_index': 9}})
  _assert_equal(_take(resumed, 3), batches[9:])


def test_train_iterator_state_of_other_data_is_refused(corpora):
  state = _iterator(corpora).get_state()
  for changed in (
    dataclasses.replace(_CONFIG, batch_size=16),
    dataclasses.replace(_CONFIG, seed=3),
  ):
    with pytest.raises(ValueError, match='data iterator: got a state of data'):
      _iterator(corpora, changed).set_state(state)
  # Reading ahead does not change the batches.
  _iterator(corpora, dataclasses.replace(_CONFIG, prefetch=2)).set_state(state)


def test_train_iterator_epoch_is_shuffled_and_covers_the_corpus(corpora):
  config = dataclasses.replace(
    _CONFIG, seq_len=1024, recall=RecallConfig(), batch_size=1
  )
  rows = sum(len(c.tokens) - 1 for c in corpora.train) // 1024
  iterator = _iterator(corpora, config)
  firsts, targets = [], 0
  for _ in range(rows):
    batch = next(iterator)
    firsts.append(batch['tokens'].tobytes())
    targets += int(batch['loss_weight'].sum())
  assert len(set(firsts)) > 0.98 * rows  # But for repeated text.
  total = sum(c.num_tokens - len(c.names) for c in corpora.train)
  assert total - 1024 <= targets <= total
  second = [next(iterator)['tokens'].tobytes() for _ in range(50)]
  assert second != firsts[:50]


def test_shuffled_rows_order_follows_seed_and_epoch():
  class Numbers:
    num_rows = 50

    def row(self, index, *, epoch):
      return {'index': np.array(index)}

  def order(seed, epoch):
    rows = ShuffledRows(Numbers(), seed=seed)
    return [int(rows[epoch * 50 + i]['index']) for i in range(50)]

  for seed, epoch in ((0, 0), (0, 1), (1, 0)):
    assert sorted(order(seed, epoch)) == list(range(50))
    assert order(seed, epoch) == order(seed, epoch)
  assert order(0, 0) != order(0, 1)
  assert order(0, 0) != order(1, 0)
  assert len(ShuffledRows(Numbers(), epochs=1)) == 50


@pytest.mark.parametrize('share', [0.0, 0.25, 0.5, 1.0])
def test_train_iterator_recall_share_is_exact(corpora, share):
  recall = dataclasses.replace(_CONFIG.recall, share=share)
  config = dataclasses.replace(_CONFIG, recall=recall)
  kinds = np.stack(
    [_is_recall(b) for b in _take(_iterator(corpora, config), 25)]
  )
  assert kinds.mean() == pytest.approx(share, abs=0.01)
  # In every batch, not only in the long run.
  np.testing.assert_allclose(kinds.sum(axis=1), 8 * share, atol=1)


def test_train_iterator_recall_and_text_rows_weigh_alike(corpora):
  config = dataclasses.replace(_CONFIG, add_eos=False)
  batches = _take(_iterator(corpora, config), 25)
  recall = sum(b['loss_weight'][_is_recall(b)].sum() for b in batches)
  text = sum(b['loss_weight'][~_is_recall(b)].sum() for b in batches)
  # Text rows lose a target where a document ends.
  assert recall == pytest.approx(text, rel=0.02)


def test_train_iterator_source_weights_give_their_shares_of_rows():
  config = DataConfig(
    seq_len=32,
    batch_size=10,
    sources=(
      dataclasses.replace(_SOURCE, weight=3.0),
      SourceConfig(kind='arithmetic', max_documents=200, weight=1.0),
    ),
  )
  tokenizer = data.make_tokenizer(config, vocab_size=512)
  corpora = data.load_corpora(config, tokenizer)
  iterator = _iterator(corpora, config)
  digits = np.array([*map(ord, '0123456789+-=\n'), tokenizer.eos_id])
  arithmetic = np.concatenate(
    [np.isin(b['tokens'], digits).all(axis=1) for b in _take(iterator, 40)]
  )
  assert arithmetic.mean() == pytest.approx(0.25, abs=0.02)


def test_train_iterator_length_mix_gives_its_share_of_long_rows(corpora):
  config = dataclasses.replace(
    _CONFIG,
    seq_len=256,
    recall=RecallConfig(),
    length_mix=(
      LengthBucket(min_fraction=0.0, share=1.0),
      LengthBucket(min_fraction=1.0, share=3.0),
    ),
  )
  eos = corpora.tokenizer.eos_id
  whole = []
  for batch in _take(_iterator(corpora, config), 20):
    one = (batch['segment_ids'] == 1).all(axis=1)
    whole.append(one & ~(batch['tokens'] == eos).any(axis=1))
  assert np.concatenate(whole).mean() == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize('processes', [1, 2, 4])
def test_train_iterator_processes_share_one_global_batch(corpora, processes):
  whole = _iterator(corpora)
  count = 8 // processes
  parts = [
    _iterator(corpora, process_rows=(p * count, count))
    for p in range(processes)
  ]
  for _ in range(5):
    batches = [next(part) for part in parts]
    joined = {
      name: np.concatenate([batch[name] for batch in batches])
      for name in batches[0]
    }
    _assert_equal([next(whole)], [joined])
    # The saved place is that of any number of processes.
    assert all(part.get_state() == whole.get_state() for part in parts)
    # Each gets rows of both kinds.
    assert all(0 < _is_recall(batch).sum() < count for batch in batches)


def test_train_iterator_processes_that_need_the_same_rows_get_them(corpora):
  one, other = (_iterator(corpora, process_rows=(4, 4)) for _ in range(2))
  _assert_equal(_take(one, 3), _take(other, 3))


@pytest.mark.parametrize('rows', [(6, 4), (-1, 2), (0, 0)])
def test_train_iterator_rows_outside_of_the_batch_are_refused(corpora, rows):
  with pytest.raises(ValueError, match='process_rows: got'):
    _iterator(corpora, process_rows=rows)


def test_train_iterator_small_vocabulary_is_refused(corpora):
  with pytest.raises(ValueError, match=r'recall.first_token: got 256'):
    data.train_iterator(_CONFIG, corpora, vocab_size=400)


def test_held_out_batches_are_fixed_and_apart_from_training(corpora):
  options = {'seq_len': 128, 'batch_size': 4, 'num_batches': 3}
  batches = data.held_out_batches(_CONFIG, corpora, **options)
  reseeded = dataclasses.replace(_CONFIG, seed=5)
  _assert_equal(batches, data.held_out_batches(reseeded, corpora, **options))
  held_out = b'\n'.join(c.tokens.tobytes() for c in corpora.held_out)
  for batch in batches:
    for row in batch['tokens']:
      assert row.astype(np.uint16).tobytes() in held_out
  names = {n for c in corpora.train for n in c.names}
  assert not names & {n for c in corpora.held_out for n in c.names}


def test_held_out_batches_one_document_has_full_context_at_each_position(
  corpora,
):
  for batch in data.held_out_batches(
    _CONFIG, corpora, seq_len=128, batch_size=4, num_batches=2
  ):
    np.testing.assert_array_equal(
      batch['positions'], np.tile(np.arange(128), (4, 1))
    )
    np.testing.assert_array_equal(batch['loss_weight'], 1)
  # One row of all tokens holds all documents.
  length = corpora.held_out[0].num_tokens - 1
  (packed,) = data.held_out_batches(
    _CONFIG,
    corpora,
    seq_len=length,
    batch_size=1,
    num_batches=1,
    one_document=False,
  )
  assert packed['segment_ids'].max() == len(corpora.held_out[0].names)


def test_held_out_batches_too_many_are_refused_with_what_there_is(corpora):
  with pytest.raises(ValueError, match=r'held-out rows: got 400000 .* at most'):
    data.held_out_batches(
      _CONFIG, corpora, seq_len=128, batch_size=4, num_batches=100_000
    )


def test_held_out_batches_without_split_are_refused():
  config = dataclasses.replace(_CONFIG, held_out_fraction=0.0)
  tokenizer = data.make_tokenizer(config, vocab_size=512)
  corpora = data.load_corpora(config, tokenizer)
  assert not corpora.held_out
  with pytest.raises(ValueError, match='held_out_fraction: got 0'):
    data.held_out_batches(
      config, corpora, seq_len=64, batch_size=1, num_batches=1
    )


def test_held_out_recall_rows_are_in_held_out_text(corpora):
  out = data.held_out_recall(
    _CONFIG, corpora, vocab_size=512, seq_len=256, batch_size=3, distance=100
  )
  assert out.batch['tokens'].shape == (3, 256)
  held_out = corpora.held_out[0].tokens.tobytes()
  for row in out.batch['tokens']:
    text = row[row < 368].astype(np.uint16)
    assert text.tobytes() in held_out
  other = data.held_out_recall(
    _CONFIG,
    corpora,
    vocab_size=512,
    seq_len=256,
    batch_size=3,
    distance=100,
    seed=1,
  )
  assert (other.batch['tokens'] != out.batch['tokens']).any()
