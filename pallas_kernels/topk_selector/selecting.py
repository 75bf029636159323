"""The steps of the Mosaic GPU selection, as one block of threads runs them.

Written against `simt.Threads`. The row's best keys so far stand in a list in
shared memory, in any order. An entry is a word that orders as the score does,
and the key's index; of equal scores the lower index is the better.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

BINS = 2048
"""Of the histogram; 11 bits."""
_BIN_BITS = 11
# Entries that a thread looks at together.
_BATCH = 4
_MINUS_INFINITY = 0xFF800000
_SIGN = 0x80000000
_ONES = 0xFFFFFFFF

# Words of the state in shared memory.
_ADDED = 0  # three of them, see `append`
_FLOOR = 3  # float32: what a score must exceed
_THRESHOLD, _BEFORE = 4, 5  # selected: above, or equal and of index before
_LEAST, _GREATEST = 6, 7
_BIN, _ABOVE, _IN_BIN = 8, 9, 10
_TOTALS = 16  # one for each warp
STATE_WORDS = 48


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workspace:
  """What the steps share; memories as `simt.Memory`.

  Attributes:
    threads: `simt.Threads`.
    scores: the list's words that order as the scores do, `capacity` of them.
    indices: the list's indices.
    histogram: BINS words, or k if that is more; also the indices on their way
      out.
    mask: a bit a key, `mask_words` words.
    state: STATE_WORDS words.
    capacity: entries of the list.
    k: keys selected.
    mask_words: a multiple of the threads.
  """

  threads: Any
  scores: Any
  indices: Any
  histogram: Any
  mask: Any
  state: Any
  capacity: int
  k: int
  mask_words: int


def start(w: Workspace) -> None:
  """Before the first row."""
  t = w.threads
  with t.when(t.thread.equals(0)):
    for i in range(3):
      w.state.store(_ADDED + i, t.constant(0))
    _start_row(w)
  t.barrier()


def _start_row(w: Workspace) -> None:
  w.state.store(_FLOOR, w.threads.constant(_MINUS_INFINITY))
  # Everything is above.
  w.state.store(_THRESHOLD, w.threads.constant(0))
  w.state.store(_BEFORE, w.threads.constant(0))


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
  floor = w.state.load(_FLOOR)
  found = []
  for i in range(size // (4 * t.num_threads)):
    at = t.thread * 4 + i * 4 * t.num_threads
    for j, bits in enumerate(_load_scores(tile, at, bfloat16)):
      index = first + at + j
      keep = t.float_exceeds(bits, floor) & ((index - start) < (end - start))
      found.append((keep, bits, index))
  ranks, total, some = _ranks(t, [keep for keep, _, _ in found])
  with t.when(some):
    position = count + t.add_of_warp(w.state, turn + _ADDED, total)
    for (keep, bits, index), rank in zip(found, ranks, strict=True):
      at = position + rank
      with t.when(keep & (at < w.capacity)):
        w.scores.store(at, _ordered(t, bits))
        w.indices.store(at, index)
  following = turn.equals(2).select(t.constant(0), turn + 1)
  with t.when(t.thread.equals(0)):
    w.state.store(following + _ADDED, t.constant(0))
  t.barrier()
  return count + w.state.load(turn + _ADDED)


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


def _ranks(t: Any, keeps: list[Any]) -> tuple[list[Any], Any, Any]:
  """Where to put what a warp keeps.

  Returns:
    For each of `keeps` the number of kept things before it, those of lower
    lanes first; the number up to and with this lane; whether the warp keeps
    anything.
  """
  below = (t.constant(1) << t.lane) - 1
  rank = kept = t.constant(0)
  for keep in keeps:
    lanes = t.ballot(keep)
    rank = rank + t.popcount(lanes & below)
    kept = kept | lanes
  ranks = []
  for keep in keeps:
    ranks.append(rank)
    rank = keep.select(rank + 1, rank)
  return ranks, rank, kept.differs(0)


def _for_entries(
  w: Workspace, count: Any, body: Callable[[list[tuple[Any, Any]]], None]
) -> None:
  """Calls body([(place, whether it is used), ...]), a batch at a time."""
  t = w.threads
  batch = _BATCH * t.num_threads

  def step(base: Any) -> list[Any]:
    places = [base + t.thread + i * t.num_threads for i in range(_BATCH)]
    body([(at, at < count) for at in places])
    return [base + batch]

  t.loop_while(lambda base: base < count, step, t.constant(0))


def select(w: Workspace, count: Any) -> None:
  """Finds which k of more than k entries are the best; leaves it in the state.

  First the least score that is selected, from the range of all of them; then,
  if there is no room for all that have it, the index up to which there is.
  """
  t = w.threads
  with t.when(t.thread.equals(0)):
    w.state.store(_LEAST, t.constant(_ONES))
    w.state.store(_GREATEST, t.constant(0))
  t.barrier()
  _find_range(w, count)
  low = w.state.load(_LEAST)
  width = t.constant(32) - t.leading_zeros(w.state.load(_GREATEST) - low)
  low, need, inside = _narrow(
    w,
    count,
    lambda at, used: (w.scores.load(at), used),
    low=low,
    width=width,
    need=t.constant(w.k),
    inside=count,
  )
  exact = need.equals(inside)
  with t.when(t.thread.equals(0)):
    w.state.store(_THRESHOLD, exact.select(low - 1, low))
    w.state.store(_BEFORE, t.constant(0))
  with t.when(need.differs(inside)):
    # Complements, so that the lower index is the greater value.
    bits = (32 * w.mask_words - 1).bit_length()

    def complement(at: Any, used: Any) -> tuple[Any, Any]:
      counts = used & w.scores.load(at).equals(low)
      return w.indices.load(at) ^ _ONES, counts

    lowest, *_ = _narrow(
      w,
      count,
      complement,
      low=t.constant(_ONES << bits),
      width=t.constant(bits),
      need=need,
      inside=inside,
    )
    with t.when(t.thread.equals(0)):
      w.state.store(_BEFORE, t.constant(0) - lowest)
  t.barrier()


def _find_range(w: Workspace, count: Any) -> None:
  t = w.threads

  def step(base: Any, least: Any, greatest: Any) -> list[Any]:
    for i in range(_BATCH):
      at = base + t.thread + i * t.num_threads
      # An unused place repeats entry 0.
      ordered = w.scores.load((at < count).select(at, t.constant(0)))
      least = (ordered < least).select(ordered, least)
      greatest = (ordered > greatest).select(ordered, greatest)
    return [base + _BATCH * t.num_threads, least, greatest]

  _, least, greatest = t.loop_while(
    lambda base, least, greatest: base < count,
    step,
    t.constant(0),
    t.constant(_ONES),
    t.constant(0),
  )
  least, greatest = t.reduce('UMIN', least), t.reduce('UMAX', greatest)
  with t.when(t.lane.equals(0)):
    w.state.atomic('umin', _LEAST, least)
    w.state.atomic('umax', _GREATEST, greatest)
  t.barrier()


def _narrow(
  w: Workspace,
  count: Any,
  value_of: Callable[[Any, Any], tuple[Any, Any]],
  *,
  low: Any,
  width: Any,
  need: Any,
  inside: Any,
) -> list[Any]:
  """Where the `need` greatest of some values begin.

  A histogram of 2048 equal parts of the values' range tells which part holds
  the last one needed; that part is the next range. It is over when all values
  in the range are needed, or when it is a single value: random scores take two
  or three rounds.

  Args:
    w: the workspace.
    count: entries in the list.
    value_of: (place, used) to a value and whether it counts.
    low: the least value that may count.
    width: and no value is low + 2 ** width or more.
    need: how many of the greatest values are needed; less than `inside`.
    inside: how many values count.

  Returns:
    low, and of need and inside what is left in the range: all values from it
    up are needed where these two are equal, else those above it and need of
    those that equal it.
  """
  t = w.threads

  def unfinished(low: Any, width: Any, need: Any, inside: Any) -> Any:
    del low
    return need.differs(inside) & width.differs(0)

  def step(low: Any, width: Any, need: Any, inside: Any) -> list[Any]:
    shift = (width > _BIN_BITS).select(width - _BIN_BITS, t.constant(0))
    bins = t.constant(1) << (width - shift)

    def count_bins(places: list[tuple[Any, Any]]) -> None:
      for at, used in places:
        value, counts = value_of(used.select(at, t.constant(0)), used)
        # A value below the range wraps around, to beyond it.
        part = (value - low) >> shift
        with t.when(counts & (part < bins)):
          w.histogram.atomic('add', part, t.constant(1))

    for i in range(BINS // t.num_threads):
      w.histogram.store(t.thread + i * t.num_threads, t.constant(0))
    t.barrier()
    _for_entries(w, count, count_bins)
    t.barrier()
    _find_bin(w, need)
    low = low + (w.state.load(_BIN) << shift)
    return [low, shift, need - w.state.load(_ABOVE), w.state.load(_IN_BIN)]

  low, _, need, inside = t.loop_while(
    unfinished, step, low, width, need, inside
  )
  return [low, need, inside]


def _find_bin(w: Workspace, need: Any) -> None:
  """The bin where the count from the last bin down reaches `need`."""
  t = w.threads
  each = BINS // t.num_threads
  at_once = min(each, 4)
  first = t.constant(BINS - each) - t.thread * each
  counts = []
  for i in range(0, each, at_once):
    counts += w.histogram.load_vector(first + i, at_once)
  own = counts[0]
  for c in counts[1:]:
    own = own + c
  above, _ = _sum_before(w, own)
  for i in reversed(range(each)):
    reached = above + counts[i]
    with t.when((above < need) & (reached >= need)):
      w.state.store(_BIN, first + i)
      w.state.store(_ABOVE, above)
      w.state.store(_IN_BIN, counts[i])
    above = reached
  t.barrier()


def _sum_before(w: Workspace, value: Any) -> tuple[Any, Any]:
  """Sum of the value over the threads before this one, and over all."""
  t = w.threads
  sums = value
  for distance in (1, 2, 4, 8, 16):
    lower = t.shuffle_up(sums, distance)
    sums = sums + (t.lane >= distance).select(lower, t.constant(0))
  with t.when(t.lane.equals(31)):
    w.state.store(t.warp + _TOTALS, sums)
  t.barrier()
  is_warp = t.lane < t.num_threads // 32
  totals = w.state.load(is_warp.select(t.lane, t.constant(0)) + _TOTALS)
  totals = is_warp.select(totals, t.constant(0))
  before = (t.lane < t.warp).select(totals, t.constant(0))
  return t.reduce('ADD', before) + sums - value, t.reduce('ADD', totals)


def _selected(w: Workspace, score: Any, index: Any) -> Any:
  threshold = w.state.load(_THRESHOLD)
  return (score > threshold) | (
    score.equals(threshold) & (index < w.state.load(_BEFORE))
  )


def prune(w: Workspace, count: Any, turn: Any) -> None:
  """Keeps the k best of the entries, and raises the floor to the k-th.

  Later keys of the same score have a higher index, so a score must exceed it.
  """
  t = w.threads
  select(w, count)
  with t.when(t.thread.equals(0)):
    w.state.store(turn + _ADDED, t.constant(0))
    w.state.store(_FLOOR, _float_of(w.state.load(_THRESHOLD)))

  def move(places: list[tuple[Any, Any]]) -> None:
    entries = []
    for at, used in places:
      at = used.select(at, t.constant(0))
      score, index = w.scores.load(at), w.indices.load(at)
      entries.append((used & _selected(w, score, index), score, index))
    ranks, total, _ = _ranks(t, [keep for keep, _, _ in entries])
    # No more are kept than were read, so what follows is still in its place.
    t.barrier()
    before = t.add_of_warp(w.state, turn + _ADDED, total)
    for (keep, score, index), rank in zip(entries, ranks, strict=True):
      with t.when(keep):
        w.scores.store(before + rank, score)
        w.indices.store(before + rank, index)

  _for_entries(w, count, move)
  t.barrier()
  with t.when(t.thread.equals(0)):
    w.state.store(turn + _ADDED, t.constant(0))
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
      with t.when(used & _selected(w, w.scores.load(at), index)):
        w.mask.atomic('_or', index >> 5, t.constant(1) << (index & 31))

  _for_entries(w, count, mark)
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
  position, total = _sum_before(w, own)
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
