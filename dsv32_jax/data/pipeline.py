"""From a DataConfig to batches: sources, row mixture, order, iterator state.

Letters: B batch_size, T seq_len. A batch is a dict of numpy arrays [B, T]:
tokens, targets, segment_ids, positions int32 and loss_weight float32.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np

from dsv32_jax.config.data import (
  DataConfig,
  SourceConfig,
  TokenizerConfig,
)
from dsv32_jax.data import conversation_tokens, long_context, sources
from dsv32_jax.data.corpus import TokenCorpus, tokenize
from dsv32_jax.data.packing import RowSource
from dsv32_jax.data.row_order import EndlessRows, ProcessRows, ShuffledRows
from dsv32_jax.data.synthetic import RecallRows, RecallTokens
from dsv32_jax.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Corpora:
  """The tokenized sources of a config, both splits, in the config's order.

  Attributes:
    train: for training.
    held_out: for evaluation; no document is in both.
    weights: of the sources, as in the config.
    tokenizer: that made the ids.
    fingerprint: hash of everything above; kept in checkpoints.
  """

  train: tuple[TokenCorpus, ...]
  held_out: tuple[TokenCorpus, ...]
  weights: tuple[float, ...]
  tokenizer: Tokenizer
  fingerprint: str


def load_corpora(config: DataConfig, tokenizer: Tokenizer) -> Corpora:
  """Reads and tokenizes the sources of a config.

  Stages whose `sources`, `held_out_fraction`, `add_bos` and `add_eos` agree can
  share the result.

  Raises:
    ValueError: as `sources.load_documents` and
      `conversation_tokens.load_corpus`.
  """
  splits: dict[sources.Split, list[TokenCorpus]] = {'train': [], 'held_out': []}
  for name, corpora in splits.items():
    if name == 'held_out' and config.held_out_fraction == 0:
      continue
    corpora += [
      _load_corpus(source, config, tokenizer, name) for source in config.sources
    ]
  weights = tuple(source.weight for source in config.sources)
  parts = [c.fingerprint for c in (*splits['train'], *splits['held_out'])]
  return Corpora(
    train=tuple(splits['train']),
    held_out=tuple(splits['held_out']),
    weights=weights,
    tokenizer=tokenizer,
    fingerprint=_hash(*parts, *map(str, weights)),
  )


def _load_corpus(
  source: SourceConfig,
  config: DataConfig,
  tokenizer: Tokenizer,
  split: sources.Split,
) -> TokenCorpus:
  if source.kind == 'conversations':
    return conversation_tokens.load_corpus(
      source,
      tokenizer,
      split=split,
      held_out_fraction=config.held_out_fraction,
    )
  documents = sources.load_documents(
    source, split=split, held_out_fraction=config.held_out_fraction
  )
  return tokenize(
    documents,
    tokenizer,
    add_bos=config.add_bos,
    add_eos=config.add_eos,
    cache_dir=config.tokenizer.cache_dir or None,
  )


class BatchIterator(Iterator[Batch]):
  """Endless training batches whose place can be saved and restored exactly."""

  def __init__(self, dataset: grain.IterDataset, *, fingerprint: str):
    """Starts at the first batch.

    Args:
      dataset: of batches.
      fingerprint: names the data and their order; a saved place is only valid
        for the same.
    """
    self._iterator = iter(dataset)
    self._batches = 0
    self.fingerprint = fingerprint

  def __next__(self) -> Batch:
    batch = next(self._iterator)
    self._batches += 1
    return batch

  def get_state(self) -> dict[str, Any]:
    """The place after the batches returned so far; can be written as JSON."""
    return {
      'batches': self._batches,
      'fingerprint': self.fingerprint,
      'grain': self._iterator.get_state(),
    }

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Continues from a place saved by `get_state`.

    Raises:
      ValueError: if the place belongs to other data.
    """
    saved = state.get('fingerprint')
    if saved != self.fingerprint:
      raise ValueError(
        f'data iterator: got a state of data {saved}, expected '
        f'{self.fingerprint}: the corpus, the tokenizer or the data config has '
        'changed since it was saved'
      )
    self._iterator.set_state(dict(state['grain']))
    self._batches = int(state['batches'])


def train_iterator(
  config: DataConfig,
  corpora: Corpora,
  *,
  vocab_size: int,
  run_seed: int = 0,
  process_rows: tuple[int, int] | None = None,
) -> BatchIterator:
  """Builds the training batches of a stage.

  The mixture is exact, not drawn: of any n rows in sequence each kind has its
  share to within a row or two. The batch of all processes together, and the
  saved place, do not depend on their number; each process gets consecutive rows
  of it, and several may get the same.

  Args:
    config: the stage's data.
    corpora: of the same sources (`load_corpora`).
    vocab_size: of the model.
    run_seed: of the run; with `config.seed` it decides every order.
    process_rows: first row and number of rows that this process takes of each
      batch (`sharding.process_rows`); None takes all.

  Raises:
    ValueError: if the rows are not of the batch, the recall task's ids do not
      fit the vocabulary, or a length range has no document.
  """
  seed = _mixed_seed(run_seed, config.seed)
  parts: list[tuple[Any, float]] = []
  if config.recall.share < 1:
    parts += [
      (
        ShuffledRows(rows, seed=seed + number),
        share * (1 - config.recall.share),
      )
      for number, (rows, share) in enumerate(
        _text_rows(config, corpora.train, corpora.weights, seed=seed)
      )
    ]
  if config.recall.share > 0:
    recall = RecallRows(
      corpora.train,
      config=config.recall,
      tokens=RecallTokens.of(
        config.recall,
        vocab_size=vocab_size,
        text_vocab_size=corpora.tokenizer.vocab_size,
      ),
      seq_len=config.seq_len,
      seed=seed,
    )
    parts.append((EndlessRows(recall), config.recall.share))
  mixed = grain.MapDataset.mix(
    [grain.MapDataset.source(rows) for rows, _ in parts],
    weights=[share for _, share in parts],
  )
  start, local = process_rows or (0, config.batch_size)
  if not 0 <= start < start + local <= config.batch_size:
    raise ValueError(
      f'process_rows: got {local} from {start} on, expected rows of the batch '
      f'of {config.batch_size}'
    )
  shard = ProcessRows(
    mixed, batch_size=config.batch_size, start=start, local=local
  )
  # Rows are slices of arrays in memory; Grain's reading threads would only
  # contend for the interpreter lock.
  dataset = (
    grain.MapDataset.source(shard)
    .batch(local, drop_remainder=True)
    .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
  )
  if config.prefetch:
    dataset = grain.experimental.ThreadPrefetchIterDataset(
      dataset, prefetch_buffer_size=config.prefetch
    )
  # What decides the batches: not where files lie (their contents are in the
  # corpora's fingerprint), how far ahead batches are made or who asks for them.
  described = dataclasses.replace(
    config,
    sources=(SourceConfig(),),
    tokenizer=TokenizerConfig(),
    prefetch=0,
  )
  fingerprint = _hash(
    corpora.fingerprint, repr(described), str((run_seed, vocab_size))
  )
  return BatchIterator(dataset, fingerprint=fingerprint)


def _text_rows(
  config: DataConfig,
  corpora: tuple[TokenCorpus, ...],
  weights: tuple[float, ...],
  *,
  seed: int,
) -> list[tuple[RowSource, float]]:
  """Row sources of all corpora with their shares of the text rows."""
  total = sum(weights)
  return [
    (rows, share * weight / total)
    for number, (corpus, weight) in enumerate(
      zip(corpora, weights, strict=True)
    )
    for rows, share in long_context.length_mix_rows(
      corpus,
      config.length_mix,
      seq_len=config.seq_len,
      seed=seed + number,
      split_documents=config.split_documents,
    )
  ]


def _mixed_seed(*seeds: int) -> int:
  """One seed from several; unlike their sum, (0, 1) and (1, 0) differ."""
  return int(np.random.SeedSequence(seeds).generate_state(1)[0])


def _hash(*parts: str) -> str:
  return hashlib.sha256('\0'.join(parts).encode()).hexdigest()[:32]
