"""Host-side data: corpora to tokens, tokens to rows, rows to batches."""

from dsv32_jax.data.held_out import held_out_batches, held_out_recall
from dsv32_jax.data.pipeline import (
  Batch,
  BatchIterator,
  Corpora,
  load_corpora,
  train_iterator,
)
from dsv32_jax.data.synthetic import RecallBatch, RecallTokens
from dsv32_jax.data.tokenizer import Tokenizer, check_vocab
from dsv32_jax.data.tokenizer_choice import load_tokenizer, make_tokenizer

__all__ = [
  'Batch',
  'BatchIterator',
  'Corpora',
  'RecallBatch',
  'RecallTokens',
  'Tokenizer',
  'check_vocab',
  'held_out_batches',
  'held_out_recall',
  'load_corpora',
  'load_tokenizer',
  'make_tokenizer',
  'train_iterator',
]
