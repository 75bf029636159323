"""Which k entries of the list are the best: the k-th largest, by histograms.

Part of the steps of `selecting`; the result stays in the workspace's state.
"""

from collections.abc import Callable
from typing import Any

from pallas_kernels.topk_selector.workspace import (
  ABOVE,
  BATCH,
  BEFORE,
  BIN,
  BIN_BITS,
  BINS,
  GREATEST,
  IN_BIN,
  LEAST,
  THRESHOLD,
  Workspace,
  for_entries,
  sum_before,
)

_ONES = 0xFFFFFFFF


def select(w: Workspace, count: Any) -> None:
  """Finds which k of more than k entries are the best; leaves it in the state.

  First the least score that is selected, from the range of all of them; then,
  if there is no room for all that have it, the index up to which there is.
  """
  t = w.threads
  with t.when(t.thread.equals(0)):
    w.state.store(LEAST, t.constant(_ONES))
    w.state.store(GREATEST, t.constant(0))
  t.barrier()
  _find_range(w, count)
  low = w.state.load(LEAST)
  width = t.constant(32) - t.leading_zeros(w.state.load(GREATEST) - low)
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
    w.state.store(THRESHOLD, exact.select(low - 1, low))
    w.state.store(BEFORE, t.constant(0))
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
      w.state.store(BEFORE, t.constant(0) - lowest)
  t.barrier()


def is_selected(w: Workspace, score: Any, index: Any) -> Any:
  threshold = w.state.load(THRESHOLD)
  return (score > threshold) | (
    score.equals(threshold) & (index < w.state.load(BEFORE))
  )


def _find_range(w: Workspace, count: Any) -> None:
  t = w.threads

  def step(base: Any, least: Any, greatest: Any) -> list[Any]:
    for i in range(BATCH):
      at = base + t.thread + i * t.num_threads
      # An unused place repeats entry 0.
      ordered = w.scores.load((at < count).select(at, t.constant(0)))
      least = (ordered < least).select(ordered, least)
      greatest = (ordered > greatest).select(ordered, greatest)
    return [base + BATCH * t.num_threads, least, greatest]

  _, least, greatest = t.loop_while(
    lambda base, least, greatest: base < count,
    step,
    t.constant(0),
    t.constant(_ONES),
    t.constant(0),
  )
  least, greatest = t.reduce('UMIN', least), t.reduce('UMAX', greatest)
  with t.when(t.lane.equals(0)):
    w.state.atomic('umin', LEAST, least)
    w.state.atomic('umax', GREATEST, greatest)
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
    shift = (width > BIN_BITS).select(width - BIN_BITS, t.constant(0))
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
    for_entries(w, count, count_bins)
    t.barrier()
    _find_bin(w, need)
    low = low + (w.state.load(BIN) << shift)
    return [low, shift, need - w.state.load(ABOVE), w.state.load(IN_BIN)]

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
  above, _ = sum_before(w, own)
  for i in reversed(range(each)):
    reached = above + counts[i]
    with t.when((above < need) & (reached >= need)):
      w.state.store(BIN, first + i)
      w.state.store(ABOVE, above)
      w.state.store(IN_BIN, counts[i])
    above = reached
  t.barrier()
