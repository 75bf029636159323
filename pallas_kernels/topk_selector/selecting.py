"""The steps of the Mosaic GPU selection, as one block of threads runs them.

Written against `simt.Threads`, on a `workspace.Workspace`.
"""

from typing import Any

from pallas_kernels.topk_selector.threshold import is_selected, select
from pallas_kernels.topk_selector.workspace import (
  ADDED,
  BEFORE,
  FLOOR,
  THRESHOLD,
  Workspace,
  for_entries,
  rank_kept,
  sum_before,
)

_MINUS_INFINITY = 0xFF800000
_SIGN = 0x80000000
_ONES = 0xFFFFFFFF


def start(w: Workspace) -> None:
  """Before the first row."""
  t = w.threads
  with t.when(t.thread.equals(0)):
    for i in range(3):
      w.state.store(ADDED + i, t.constant(0))
    _start_row(w)
  t.barrier()


def _start_row(w: Workspace) -> None:
  w.state.store(FLOOR, w.threads.constant(_MINUS_INFINITY))
  # Everything is above.
  w.state.store(THRESHOLD, w.threads.constant(0))
  w.state.store(BEFORE, w.threads.constant(0))


def append(
  w: Workspace,
  tile: Any,
  *,
  size: int,
  bfloat16: bool,
  count: Any,
  turn: Any,
  first: Any,
  start: Any,
  end: Any,
) -> Any:
  """Adds a tile's keys above the floor to the list.

  Args:
    w: the workspace.
    tile: memory of the scores.
    size: keys of the tile; a multiple of four for each thread.
    bfloat16: whether two scores share a word.
    count: entries in the list.
    turn: which of the three counters to use: 0, 1, 2, 0, ... A counter is
      cleared when the next one is in use and nobody can still read it, which
      makes one barrier enough.
    first: index of the tile's first key.
    start: index of the first key that counts.
    end: one past the last.

  Returns:
    Entries that the list should now have. If that is more than the capacity,
    what was added is incomplete.
  """
  t = w.threads
  floor = w.state.load(FLOOR)
  found = []
  for i in range(size // (4 * t.num_threads)):
    at = t.thread * 4 + i * 4 * t.num_threads
    for j, bits in enumerate(_load_scores(tile, at, bfloat16)):
      index = first + at + j
      keep = t.float_exceeds(bits, floor) & ((index - start) < (end - start))
      found.append((keep, bits, index))
  ranks, total, some = rank_kept(t, [keep for keep, _, _ in found])
  with t.when(some):
    position = count + t.add_of_warp(w.state, turn + ADDED, total)
    for (keep, bits, index), rank in zip(found, ranks, strict=True):
      at = position + rank
      with t.when(keep & (at < w.capacity)):
        w.scores.store(at, _ordered(t, bits))
        w.indices.store(at, index)
  following = turn.equals(2).select(t.constant(0), turn + 1)
  with t.when(t.thread.equals(0)):
    w.state.store(following + ADDED, t.constant(0))
  t.barrier()
  return count + w.state.load(turn + ADDED)


def _load_scores(tile: Any, at: Any, bfloat16: bool) -> list[Any]:
  """Bits of the float32 of four keys."""
  if not bfloat16:
    return tile.load_vector(at, 4)
  words = tile.load_vector(at >> 1, 2)
  return [x for word in words for x in (word << 16, word & 0xFFFF0000)]


def _ordered(t: Any, bits: Any) -> Any:
  """A float's bits, made to order as the float does; -0.0 as 0.0."""
  bits = bits.equals(_SIGN).select(t.constant(0), bits)
  return bits ^ (bits.sign() | _SIGN)


def _float_of(ordered: Any) -> Any:
  return ordered ^ ((ordered ^ _ONES).sign() | _SIGN)


def prune(w: Workspace, count: Any, turn: Any) -> None:
  """Keeps the k best of the entries, and raises the floor to the k-th.

  Later keys of the same score have a higher index, so a score must exceed it.
  """
  t = w.threads
  select(w, count)
  with t.when(t.thread.equals(0)):
    w.state.store(turn + ADDED, t.constant(0))
    w.state.store(FLOOR, _float_of(w.state.load(THRESHOLD)))

  def move(places: list[tuple[Any, Any]]) -> None:
    entries = []
    for at, used in places:
      at = used.select(at, t.constant(0))
      score, index = w.scores.load(at), w.indices.load(at)
      entries.append((used & is_selected(w, score, index), score, index))
    ranks, total, _ = rank_kept(t, [keep for keep, _, _ in entries])
    # No more are kept than were read, so what follows is still in its place.
    t.barrier()
    before = t.add_of_warp(w.state, turn + ADDED, total)
    for (keep, score, index), rank in zip(entries, ranks, strict=True):
      with t.when(keep):
        w.scores.store(before + rank, score)
        w.indices.store(before + rank, index)

  for_entries(w, count, move)
  t.barrier()
  with t.when(t.thread.equals(0)):
    w.state.store(turn + ADDED, t.constant(0))
  t.barrier()


def write(w: Workspace, out: Any, count: Any, *, as_mask: bool) -> None:
  """Writes which keys the selected entries are.

  Args:
    w: the workspace; ready for the next row afterwards.
    out: memory of the row's k indices, which will ascend and be filled up with
      -1; or of its `mask_words`, a bit for each key.
    count: entries in the list.
    as_mask: which of the two.
  """
  t = w.threads
  for i in range(w.mask_words // t.num_threads):
    w.mask.store(t.thread + i * t.num_threads, t.constant(0))
  t.barrier()

  def mark(places: list[tuple[Any, Any]]) -> None:
    for at, used in places:
      at = used.select(at, t.constant(0))
      index = w.indices.load(at)
      with t.when(used & is_selected(w, w.scores.load(at), index)):
        w.mask.atomic('_or', index >> 5, t.constant(1) << (index & 31))

  for_entries(w, count, mark)
  t.barrier()
  if as_mask:
    for i in range(w.mask_words // t.num_threads):
      at = t.thread + i * t.num_threads
      out.store(at, w.mask.load(at))
  else:
    _write_indices(w, out)
  with t.when(t.thread.equals(0)):
    _start_row(w)
  t.barrier()


def _write_indices(w: Workspace, indices: Any) -> None:
  t = w.threads
  each = w.mask_words // t.num_threads
  words = [t.thread * each + j for j in range(each)]
  own = t.constant(0)
  for word in words:
    own = own + t.popcount(w.mask.load(word))
  position, total = sum_before(w, own)
  for word in words:

    def take(bits: Any, position: Any, word: Any = word) -> list[Any]:
      w.histogram.store(position, word * 32 + t.trailing_zeros(bits))
      return [bits & (bits - 1), position + 1]

    _, position = t.loop_while(
      lambda bits, position: bits.differs(0),
      take,
      w.mask.load(word),
      position,
    )
  t.barrier()
  for i in range(-(-w.k // t.num_threads)):
    at = t.thread + i * t.num_threads
    with t.when(at < w.k):
      found = at < total
      index = w.histogram.load(found.select(at, t.constant(0)))
      indices.store(at, found.select(index, t.constant(_ONES)))
