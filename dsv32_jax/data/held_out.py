"""Held-out data for evaluation: text at any length, recall at any distance.

No document here is in the training split, and nothing depends on a run's seed.
"""

from typing import cast

import grain
import numpy as np

from dsv32_jax.config.data import DataConfig
from dsv32_jax.data import long_context, synthetic
from dsv32_jax.data.packing import PackedRows, Row, RowSource
from dsv32_jax.data.pipeline import Batch, Corpora
from dsv32_jax.data.row_order import ShuffledRows
from dsv32_jax.data.synthetic import RecallBatch, RecallTokens


def held_out_batches(
  config: DataConfig,
  corpora: Corpora,
  *,
  seq_len: int,
  batch_size: int,
  num_batches: int,
  one_document: bool = True,
) -> tuple[Batch, ...]:
  """Text batches for evaluation: always the same ones.

  They depend on the corpus and on the arguments, not on any seed, and hold no
  recall rows.

  Args:
    config: whose sources `corpora` are.
    corpora: see `load_corpora`.
    seq_len: T, any length.
    batch_size: B.
    num_batches: how many.
    one_document: rows are windows of one document, so that position t has t
      tokens of context; False packs the documents as they come. Conversations
      are packed in any case.

  Raises:
    ValueError: if the held-out split is missing or has too few rows.
  """
  if not corpora.held_out:
    raise ValueError(
      f'held_out_fraction: got {config.held_out_fraction}, expected a positive '
      'share to evaluate on'
    )
  wanted = batch_size * num_batches
  total = sum(corpora.weights)
  parts: list[grain.MapDataset] = []
  for corpus in corpora.held_out:
    rows: RowSource = (
      long_context.LongRows(corpus, seq_len=seq_len)
      if one_document and corpus.is_target is None
      else PackedRows(corpus, seq_len=seq_len)
    )
    parts.append(grain.MapDataset.source(ShuffledRows(rows, epochs=1)))
  mixed = grain.MapDataset.mix(
    parts, weights=[weight / total for weight in corpora.weights]
  )
  if len(mixed) < wanted:
    raise ValueError(
      f'held-out rows: got {wanted} ({num_batches} batches of {batch_size}) at '
      f'seq_len {seq_len}, expected at most the {len(mixed)} that the held-out '
      'documents give'
    )
  batches = []
  for start in range(0, wanted, batch_size):
    rows_here = [cast(Row, mixed[i]) for i in range(start, start + batch_size)]
    batches.append(_stack(rows_here))
  return tuple(batches)


def held_out_recall(
  config: DataConfig,
  corpora: Corpora,
  *,
  vocab_size: int,
  seq_len: int,
  batch_size: int,
  distance: int,
  seed: int = 0,
) -> RecallBatch:
  """One batch of the recall task in held-out text, at one exact distance.

  Args:
    config: its `recall` gives the number of keys and the ids.
    corpora: see `load_corpora`.
    vocab_size: of the model.
    seq_len: T.
    batch_size: B.
    distance: tokens from a key's token to its query.
    seed: of the rows; another one gives other rows.

  Raises:
    ValueError: as `recall_eval_batch`.
  """
  if not corpora.held_out:
    raise ValueError(
      f'held_out_fraction: got {config.held_out_fraction}, expected a positive '
      'share to evaluate on'
    )
  return synthetic.recall_eval_batch(
    corpora.held_out,
    tokens=RecallTokens.of(
      config.recall,
      vocab_size=vocab_size,
      text_vocab_size=corpora.tokenizer.vocab_size,
    ),
    seq_len=seq_len,
    batch_size=batch_size,
    distance=distance,
    num_keys=config.recall.num_keys,
    seed=seed,
  )


def _stack(rows: list[Row]) -> Batch:
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
