"""Documents to rows: [T + 1] tokens, cut so that no target crosses documents.

A row is a list of pieces; a piece is a run of tokens of one document and gets
its own segment. Everything about a row follows from (seed, epoch, index).
"""

import bisect
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from dsv32_jax.data.corpus import TokenCorpus

Row = dict[str, np.ndarray]


@runtime_checkable
class RowSource(Protocol):
  """Rows of one kind, at random access.

  Attributes:
    num_rows: rows an epoch.
  """

  num_rows: int

  def row(self, index: int, *, epoch: int) -> Row:
    """Row `index` (0 to num_rows - 1) of an epoch."""
    ...


def make_row(
  pieces: Sequence[np.ndarray],
  *,
  seq_len: int,
  pad_id: int,
  is_target: Sequence[np.ndarray] | None = None,
) -> Row:
  """Builds a row from runs of tokens, one segment each.

  Args:
    pieces: at most `seq_len` + 1 tokens together; the rest is padding.
    seq_len: T.
    pad_id: token of the padding.
    is_target: for each piece, which of its tokens are learnt; None for all.

  Returns:
    tokens, targets, segment_ids (1, 2, ...; 0 for padding), positions (from 0
    in each segment) int32 [T]; loss_weight float32 [T], 1 where the target is
    the next token of the same piece and is learnt.
  """
  tokens = np.full(seq_len + 1, pad_id, np.int32)
  segment_ids = np.zeros(seq_len + 1, np.int32)
  positions = np.zeros(seq_len + 1, np.int32)
  start = 0
  for number, piece in enumerate(pieces, start=1):
    end = start + len(piece)
    tokens[start:end] = piece
    segment_ids[start:end] = number
    positions[start:end] = np.arange(end - start, dtype=np.int32)
    start = end
  same = (segment_ids[1:] == segment_ids[:-1]) & (segment_ids[:-1] > 0)
  if is_target is not None:
    learnt = np.concatenate(is_target)
    same[: max(len(learnt) - 1, 0)] &= learnt[1:]
  return {
    'tokens': tokens[:-1],
    'targets': tokens[1:],
    'loss_weight': same.astype(np.float32),
    'segment_ids': segment_ids[:-1],
    'positions': positions[:-1],
  }


class PackedRows:
  """Several documents a row.

  With `split_documents` the documents, in an order drawn for each epoch, are
  laid end to end and cut every T tokens; the last token of a row is the first
  of the next, so each token is a target once. A document that goes on in the
  next row is a new segment there. What is left at the end of an epoch, less
  than a row, is dropped (another part each epoch).

  Without it, documents longer than a row are cut into rows and remainders, and
  what fits in a row is never cut: best-fit decreasing (arXiv:2404.10830)
  with padding at the ends. A corpus of which only some tokens are learnt is
  always packed so, and a document of it that is longer than a row is refused.
  """

  def __init__(
    self,
    corpus: TokenCorpus,
    *,
    seq_len: int,
    seed: int = 0,
    split_documents: bool = True,
    documents: np.ndarray | None = None,
  ):
    """Plans the rows.

    Args:
      corpus: where tokens come from.
      seq_len: T.
      seed: of the order of documents.
      split_documents: cut documents at the ends of rows.
      documents: numbers of the documents to use; None for all.

    Raises:
      ValueError: if no document has two tokens (a token and its target), or one
        that must not be cut does not fit in a row.
    """
    lengths = corpus.lengths
    if documents is None:
      documents = np.arange(len(lengths))
    if corpus.is_target is not None:
      split_documents = False
      _check_fits(corpus, documents, seq_len=seq_len)
    self._documents = documents[lengths[documents] >= 2]
    if not len(self._documents):
      raise ValueError(
        f'{corpus.label}: no document has two tokens, expected at least one'
      )
    self._corpus = corpus
    self._seq_len = seq_len
    self._seed = seed
    self._split = split_documents
    self._plan_epoch = -1
    if split_documents:
      total = int(lengths[self._documents].sum())
      self.num_rows = max(1, (total - 1) // seq_len)
    else:
      self._plan_bins()

  def row(self, index: int, *, epoch: int) -> Row:
    """See `RowSource.row`."""
    self._plan(epoch)
    is_target = None
    if self._split:
      pieces = self._window(index * self._seq_len)
    else:
      slots = self._order[self._bin_starts[index] : self._bin_starts[index + 1]]
      parts = [
        slice(start, start + length)
        for start, length in zip(
          self._piece_start[slots], self._piece_len[slots], strict=True
        )
      ]
      pieces = [self._corpus.tokens[part] for part in parts]
      if self._corpus.is_target is not None:
        is_target = [self._corpus.is_target[part] for part in parts]
    return make_row(
      pieces,
      seq_len=self._seq_len,
      pad_id=self._corpus.pad_id,
      is_target=is_target,
    )

  def _plan(self, epoch: int) -> None:
    """Draws the order of an epoch (kept until another epoch is asked for)."""
    if epoch == self._plan_epoch:
      return
    rng = np.random.default_rng([self._seed, epoch, 1])
    if self._split:
      order = rng.permutation(self._documents)
      ends = np.cumsum(self._corpus.lengths[order])
      self._order, self._ends = order, ends
    else:
      # Pieces of equal length change places; the bins hold for every epoch.
      shuffled = rng.permutation(len(self._piece_len))
      by_length = np.argsort(-self._piece_len[shuffled], kind='stable')
      pieces = np.empty_like(shuffled)
      pieces[self._slots] = shuffled[by_length]
      self._order = pieces
    self._plan_epoch = epoch

  def _window(self, start: int) -> list[np.ndarray]:
    """Tokens [start, start + T + 1) of the epoch's stream, by document."""
    stop = min(start + self._seq_len + 1, int(self._ends[-1]))
    pieces = []
    place = int(np.searchsorted(self._ends, start, side='right'))
    while start < stop:
      document = self._order[place]
      doc_end = int(self._corpus.offsets[document + 1])
      left = int(self._ends[place]) - start
      take = min(left, stop - start)
      first = doc_end - left
      pieces.append(self._corpus.tokens[first : first + take])
      start += take
      place += 1
    return pieces

  def _plan_bins(self) -> None:
    """Cuts long documents and assigns pieces, by length, to rows."""
    seq_len = self._seq_len
    starts = self._corpus.offsets[self._documents]
    lengths = self._corpus.lengths[self._documents]
    # A cut repeats one token: the last target of a row begins the next row.
    whole = np.maximum((lengths - 1) // seq_len, 0)
    rest = lengths - whole * seq_len
    repeats = np.repeat(starts, whole)
    nth = np.arange(len(repeats)) - np.repeat(np.cumsum(whole) - whole, whole)
    keep = rest >= 2
    self._piece_start = np.concatenate(
      [repeats + nth * seq_len, (starts + whole * seq_len)[keep]]
    )
    self._piece_len = np.concatenate(
      [np.full(len(repeats), seq_len + 1), rest[keep]]
    )
    bins = best_fit_decreasing(
      np.sort(self._piece_len)[::-1].tolist(), capacity=seq_len + 1
    )
    self.num_rows = len(bins)
    sizes = np.array([len(members) for members in bins])
    self._bin_starts = np.concatenate([[0], np.cumsum(sizes)])
    # _slots[i] is the place of the i-th longest piece in the rows, end to end.
    flat = np.concatenate([np.array(members) for members in bins])
    self._slots = np.argsort(flat)


def _check_fits(
  corpus: TokenCorpus, documents: np.ndarray, *, seq_len: int
) -> None:
  """Refuses documents that must not be cut and are longer than a row."""
  lengths = corpus.lengths[documents]
  too_long = np.flatnonzero(lengths > seq_len + 1)
  if len(too_long):
    worst = too_long[np.argmax(lengths[too_long])]
    raise ValueError(
      f'seq_len: got {seq_len}, expected at least {lengths[worst] - 1} for the '
      f'{lengths[worst]} tokens of {corpus.names[documents[worst]]} of '
      f'{corpus.label} ({len(too_long)} of {len(lengths)} are too long for a '
      'row)'
    )


def best_fit_decreasing(
  lengths: Sequence[int], *, capacity: int
) -> list[list[int]]:
  """Packs items into bins, each into the fullest bin that still holds it.

  Args:
    lengths: of the items, falling; none above `capacity`.
    capacity: of a bin.

  Returns:
    The items (their places in `lengths`) of each bin.
  """
  bins: list[list[int]] = []
  by_room: dict[int, list[int]] = {}
  rooms: list[int] = []  # The keys of by_room that have bins, rising.
  for item, length in enumerate(lengths):
    place = bisect.bisect_left(rooms, length)
    if place == len(rooms):
      number, room = len(bins), capacity
      bins.append([])
    else:
      room = rooms[place]
      number = by_room[room].pop()
      if not by_room[room]:
        rooms.pop(place)
    bins[number].append(item)
    left = room - length
    if left > 0:
      waiting = by_room.setdefault(left, [])
      if not waiting:
        bisect.insort(rooms, left)
      waiting.append(number)
  return bins
