"""What the steps of the Mosaic GPU selection work on, and do together.

Written against `simt.Threads`. The row's best keys so far stand in a list in
shared memory, in any order. An entry is a word that orders as the score does,
and the key's index; of equal scores the lower index is the better.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

BINS = 2048
"""Of the histogram."""
BIN_BITS = 11

# Words of the state in shared memory.
ADDED = 0  # three of them, see `selecting.append`
FLOOR = 3  # float32: what a score must exceed
THRESHOLD, BEFORE = 4, 5  # selected: above, or equal and of index before
LEAST, GREATEST = 6, 7
BIN, ABOVE, IN_BIN = 8, 9, 10
TOTALS = 16  # one for each warp
STATE_WORDS = 48

BATCH = 4
"""Entries that a thread looks at together."""


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


def rank_kept(t: Any, keeps: list[Any]) -> tuple[list[Any], Any, Any]:
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


def for_entries(
  w: Workspace, count: Any, body: Callable[[list[tuple[Any, Any]]], None]
) -> None:
  """Calls body([(place, whether it is used), ...]), a batch at a time."""
  t = w.threads
  batch = BATCH * t.num_threads

  def step(base: Any) -> list[Any]:
    places = [base + t.thread + i * t.num_threads for i in range(BATCH)]
    body([(at, at < count) for at in places])
    return [base + batch]

  t.loop_while(lambda base: base < count, step, t.constant(0))


def sum_before(w: Workspace, value: Any) -> tuple[Any, Any]:
  """Sum of the value over the threads before this one, and over all."""
  t = w.threads
  sums = value
  for distance in (1, 2, 4, 8, 16):
    lower = t.shuffle_up(sums, distance)
    sums = sums + (t.lane >= distance).select(lower, t.constant(0))
  with t.when(t.lane.equals(31)):
    w.state.store(t.warp + TOTALS, sums)
  t.barrier()
  is_warp = t.lane < t.num_threads // 32
  totals = w.state.load(is_warp.select(t.lane, t.constant(0)) + TOTALS)
  totals = is_warp.select(totals, t.constant(0))
  before = (t.lane < t.warp).select(totals, t.constant(0))
  return t.reduce('ADD', before) + sums - value, t.reduce('ADD', totals)
