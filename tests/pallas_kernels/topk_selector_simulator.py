"""Runs what is written for `topk_selector.simt.Threads` in numpy, in lockstep.

All threads of a block take a statement together, so a missing barrier goes
unnoticed; everything else of the logic shows.
"""

import contextlib

import numpy as np


class Word:
  """One integer for each thread."""

  def __init__(self, value):
    self.value = value

  def _constant(self, other):
    if isinstance(other, Word):
      return other.value
    bits = self.value.dtype.itemsize * 8
    return np.asarray(other % 2**bits, self.value.dtype)

  def _shifted(self, other, how):
    by = np.broadcast_to(self._constant(other), self.value.shape)
    assert np.all(by < self.value.dtype.itemsize * 8)
    return Word(how(self.value, by))

  def __add__(self, other):
    return Word(self.value + self._constant(other))

  def __sub__(self, other):
    return Word(self.value - self._constant(other))

  def __mul__(self, other):
    return Word(self.value * self._constant(other))

  def __and__(self, other):
    return Word(self.value & self._constant(other))

  def __or__(self, other):
    return Word(self.value | self._constant(other))

  def __xor__(self, other):
    return Word(self.value ^ self._constant(other))

  def __lshift__(self, other):
    return self._shifted(other, np.left_shift)

  def __rshift__(self, other):
    return self._shifted(other, np.right_shift)

  def __lt__(self, other):
    return Word(self.value < self._constant(other))

  def __le__(self, other):
    return Word(self.value <= self._constant(other))

  def __gt__(self, other):
    return Word(self.value > self._constant(other))

  def __ge__(self, other):
    return Word(self.value >= self._constant(other))

  def equals(self, other):
    return Word(self.value == self._constant(other))

  def differs(self, other):
    return Word(self.value != self._constant(other))

  def sign(self):
    assert self.value.dtype == np.uint32
    return Word((self.value.view(np.int32) >> 31).view(np.uint32))

  def select(self, yes, no):
    assert self.value.dtype == np.bool_
    return Word(np.where(self.value, yes.value, no.value))


class Threads:
  """A block of simulated threads."""

  def __init__(self, num_threads):
    self.num_threads = num_threads
    self._active = np.ones(num_threads, bool)
    self.thread = Word(np.arange(num_threads, dtype=np.uint32))
    self.lane = self.thread & 31
    self.warp = self.thread >> 5

  def memory(self, num_words):
    """Shared memory, full of rubbish."""
    return Memory(self, np.full(num_words, 0xDEADBEEF, np.uint32))

  def constant(self, value):
    return Word(np.full(self.num_threads, value % 2**32, np.uint32))

  @contextlib.contextmanager
  def when(self, condition):
    outer = self._active
    self._active = outer & condition.value
    yield
    self._active = outer

  def loop_while(self, condition, body, *carries):
    outer = self._active
    carries = list(carries)
    while True:
      self._active = self._active & condition(*carries).value
      if not np.any(self._active):
        break
      new = body(*carries)
      carries = [
        Word(np.where(self._active, n.value, c.value).astype(c.value.dtype))
        for n, c in zip(new, carries, strict=True)
      ]
    self._active = outer
    return carries

  def barrier(self):
    # Whether to go there must not differ among the threads.
    assert np.all(self._active == self._active[0])

  def _warps(self, values):
    # Every lane must take part in what a warp does together.
    active = self._active.reshape(-1, 32)
    assert np.all(active.all(1) | ~active.any(1))
    return values.reshape(-1, 32)

  def ballot(self, condition):
    bits = self._warps(condition.value).astype(np.uint64) << np.arange(
      32, dtype=np.uint64
    )
    return Word(np.repeat(bits.sum(1).astype(np.uint32), 32))

  def shuffle_up(self, value, distance):
    rows = self._warps(value.value).copy()
    rows[:, distance:] = rows[:, :-distance].copy()
    return Word(rows.reshape(-1))

  def of_last_lane(self, value):
    return Word(np.repeat(self._warps(value.value)[:, 31], 32))

  def reduce(self, how, value):
    how = {'ADD': np.add, 'UMAX': np.maximum, 'UMIN': np.minimum}[how]
    rows = how.reduce(self._warps(value.value), axis=1)
    return Word(np.repeat(rows.astype(np.uint32), 32))

  def add_of_warp(self, memory, index, value):
    with self.when(self.lane.equals(31)):
      old = memory.atomic('add', index, value)
    return self.of_last_lane(old)

  def popcount(self, value):
    return Word(np.bitwise_count(value.value).astype(np.uint32))

  def leading_zeros(self, value):
    return Word(
      np.asarray([32 - int(x).bit_length() for x in value.value], np.uint32)
    )

  def trailing_zeros(self, value):
    lowest = value.value & (~value.value + np.uint32(1))
    return Word(np.bitwise_count(lowest - np.uint32(1)).astype(np.uint32))

  def float_exceeds(self, bits, other):
    return Word(bits.value.view(np.float32) > other.value.view(np.float32))


class Memory:
  """Words that the threads share."""

  def __init__(self, threads, words):
    self.words = words
    self._threads = threads

  def _at(self, index):
    if isinstance(index, int):
      index = self._threads.constant(index)
    active = self._threads._active
    at = np.where(active, index.value, 0).astype(np.int64)
    assert np.all(at < len(self.words)), 'out of bounds'
    return at, active

  def load(self, index):
    at, _ = self._at(index)
    return Word(self.words[at])

  def load_vector(self, index, count):
    assert np.all(index.value % count == 0), 'alignment'
    return [self.load(index + i) for i in range(count)]

  def store(self, index, value):
    at, active = self._at(index)
    self.words[at[active]] = value.value[active]

  def atomic(self, how, index, value):
    at, active = self._at(index)
    how = {
      'add': np.add,
      '_or': np.bitwise_or,
      'umax': np.maximum,
      'umin': np.minimum,
    }[how]
    old = np.zeros(len(at), np.uint32)
    # In no particular order, as on the device.
    for i in np.random.permutation(np.flatnonzero(active)):
      old[i] = self.words[at[i]]
      self.words[at[i]] = how(self.words[at[i]], value.value[i])
    return Word(old)
