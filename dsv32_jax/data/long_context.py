"""The length mix of long-context stages, at any row length.

DeepSeek-V3.2 trains both stages of its continued training on the distribution
of the 128K extension data (arXiv:2512.02556, section 2.1.1); what that
distribution is has not been published. Ours, therefore, is a choice: a share of
the rows for each range of document lengths, ranges measured in rows, so that
the same mix applies at T = 512 and at T = 131072. Documents longer than a row
are upsampled by this (rows of them come more often than their tokens would),
which is what public long-context recipes do within each source
(arXiv:2402.10171: keep the mixture of sources, upsample length inside each).
A reproduction gives the same mix to context extension, warm-up and sparse
training.
"""

from collections.abc import Sequence

import numpy as np

from dsv32_jax.config.data import LengthBucket
from dsv32_jax.data.corpus import TokenCorpus
from dsv32_jax.data.packing import PackedRows, Row, RowSource, make_row

# Half the rows need attention over the whole row; the rest keep what was
# learnt on short text.
DEFAULT_MIX = (
  LengthBucket(min_fraction=0.0, share=0.5),
  LengthBucket(min_fraction=1.0, share=0.5),
)


class LongRows:
  """Rows that are windows of one long document.

  A document of n tokens gives (n - 1) // T windows side by side; where they
  begin changes from epoch to epoch, so that the same document is cut elsewhere
  when it comes again.
  """

  def __init__(
    self,
    corpus: TokenCorpus,
    *,
    seq_len: int,
    seed: int = 0,
    documents: np.ndarray | None = None,
  ):
    """Plans the rows.

    Args:
      corpus: where tokens come from.
      seq_len: T; documents with fewer than T + 1 tokens are left out.
      seed: of the windows' phases.
      documents: numbers of the documents to use; None for all.

    Raises:
      ValueError: if no document is long enough.
    """
    lengths = corpus.lengths
    if documents is None:
      documents = np.arange(len(lengths))
    self._documents = documents[lengths[documents] > seq_len]
    if not len(self._documents):
      longest = int(lengths.max()) if len(lengths) else 0
      raise ValueError(
        f'{corpus.label}: the longest document has {longest} tokens, expected '
        f'one of at least {seq_len + 1} for rows of one document'
      )
    windows = (lengths[self._documents] - 1) // seq_len
    self._ends = np.cumsum(windows)
    self._windows = windows
    self._corpus = corpus
    self._seq_len = seq_len
    self._seed = seed
    self.num_rows = int(self._ends[-1])
    self._phase_epoch = -1

  def row(self, index: int, *, epoch: int) -> Row:
    """See `RowSource.row`."""
    if epoch != self._phase_epoch:
      rng = np.random.default_rng([self._seed, epoch, 2])
      slack = self._corpus.lengths[self._documents] - 1
      slack = slack - self._windows * self._seq_len
      self._phases = rng.integers(0, slack + 1)
      self._phase_epoch = epoch
    place = int(np.searchsorted(self._ends, index, side='right'))
    window = index - int(self._ends[place] - self._windows[place])
    start = int(self._corpus.offsets[self._documents[place]])
    start += int(self._phases[place]) + window * self._seq_len
    piece = self._corpus.tokens[start : start + self._seq_len + 1]
    return make_row([piece], seq_len=self._seq_len, pad_id=self._corpus.pad_id)


def length_mix_rows(
  corpus: TokenCorpus,
  mix: Sequence[LengthBucket],
  *,
  seq_len: int,
  seed: int = 0,
  split_documents: bool = True,
) -> list[tuple[RowSource, float]]:
  """Row sources of a corpus and their shares of its rows.

  Args:
    corpus: where tokens come from.
    mix: ranges of document lengths with their shares; () packs all documents
      as they come, and so are conversations packed with any mix.
    seq_len: T.
    seed: of the order of documents.
    split_documents: without a mix, cut documents at the ends of rows.

  Returns:
    (row source, share) pairs; the shares sum to 1.

  Raises:
    ValueError: naming the range that no document falls in.
  """
  if not mix or corpus.is_target is not None:
    rows = PackedRows(
      corpus, seq_len=seq_len, seed=seed, split_documents=split_documents
    )
    return [(rows, 1.0)]
  lengths = corpus.lengths
  bounds = [_shortest(bucket, seq_len) for bucket in mix] + [np.inf]
  total = sum(bucket.share for bucket in mix)
  out: list[tuple[RowSource, float]] = []
  for bucket, low, high in zip(mix, bounds[:-1], bounds[1:], strict=True):
    documents = np.flatnonzero((lengths >= max(low, 2)) & (lengths < high))
    if not len(documents):
      raise ValueError(
        f'length_mix: no document of {corpus.label} has {max(low, 2)} to '
        f'{high} tokens (min_fraction {bucket.min_fraction} of seq_len '
        f'{seq_len}; the longest has {int(lengths.max())}), expected at least '
        'one'
      )
    if bucket.min_fraction >= 1:
      rows = LongRows(corpus, seq_len=seq_len, seed=seed, documents=documents)
    else:
      rows = PackedRows(
        corpus,
        seq_len=seq_len,
        seed=seed,
        split_documents=False,
        documents=documents,
      )
    out.append((rows, bucket.share / total))
  return out


def _shortest(bucket: LengthBucket, seq_len: int) -> int:
  """Tokens of the shortest document of a bucket."""
  # A row needs one token more than T, hence the + 1 from a whole row on.
  return int(np.ceil(bucket.min_fraction * seq_len)) + (
    bucket.min_fraction >= 1
  )
