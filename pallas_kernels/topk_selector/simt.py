"""Code for single threads, inside a Mosaic GPU kernel.

Pallas has no indexed shared memory, no atomics on elements and no ballots, and
a selection is made of these. `Threads` emits them as MLIR and PTX; `selecting`
is written against it. Tests run the same code against a simulator with the
same methods, so it knows nothing of MLIR.

A `Word` is an integer of a thread, unsigned: 32 bits, or one, a predicate.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, scf

WARP = 32


class Word:
  """An integer held by each thread."""

  def __init__(self, value: Any):
    self.value = value

  def _constant(self, other: Any) -> Any:
    if isinstance(other, Word):
      return other.value
    return _constant(other, self.value.type)

  def __add__(self, other: Any) -> 'Word':
    return Word(arith.addi(self.value, self._constant(other)))

  def __sub__(self, other: Any) -> 'Word':
    return Word(arith.subi(self.value, self._constant(other)))

  def __mul__(self, other: Any) -> 'Word':
    return Word(arith.muli(self.value, self._constant(other)))

  def __and__(self, other: Any) -> 'Word':
    return Word(arith.andi(self.value, self._constant(other)))

  def __or__(self, other: Any) -> 'Word':
    return Word(arith.ori(self.value, self._constant(other)))

  def __xor__(self, other: Any) -> 'Word':
    return Word(arith.xori(self.value, self._constant(other)))

  def __lshift__(self, other: Any) -> 'Word':
    return Word(arith.shli(self.value, self._constant(other)))

  def __rshift__(self, other: Any) -> 'Word':
    return Word(arith.shrui(self.value, self._constant(other)))

  def __lt__(self, other: Any) -> 'Word':
    return self._compare('ult', other)

  def __le__(self, other: Any) -> 'Word':
    return self._compare('ule', other)

  def __gt__(self, other: Any) -> 'Word':
    return self._compare('ugt', other)

  def __ge__(self, other: Any) -> 'Word':
    return self._compare('uge', other)

  def equals(self, other: Any) -> 'Word':
    return self._compare('eq', other)

  def differs(self, other: Any) -> 'Word':
    return self._compare('ne', other)

  def _compare(self, how: str, other: Any) -> 'Word':
    predicate = getattr(arith.CmpIPredicate, how)
    return Word(arith.cmpi(predicate, self.value, self._constant(other)))

  def sign(self) -> 'Word':
    """All ones where the highest bit is set, else zero."""
    bits = ir.IntegerType(self.value.type).width - 1
    return Word(arith.shrsi(self.value, _constant(bits, self.value.type)))

  def select(self, yes: 'Word', no: 'Word') -> 'Word':
    """`yes` where this predicate holds, else `no`."""
    return Word(arith.select(self.value, yes.value, no.value))


class Memory:
  """An array in shared or global memory, seen as words."""

  def __init__(self, pointer: Any):
    self._pointer = pointer

  @classmethod
  def of(cls, ref: Any) -> 'Memory':
    """The memory of a Mosaic GPU memref."""
    from jax.experimental.mosaic import gpu as mgpu

    return cls(mgpu.utils.memref_ptr(ref))

  def _at(self, index: Word | int) -> Any:
    if isinstance(index, int):
      index = Word(_constant(index, _integer(32)))
    return llvm.getelementptr(
      self._pointer.type,
      self._pointer,
      [index.value],
      [-(2**31)],
      _integer(32),
      llvm.GEPNoWrapFlags.none,
    )

  def load(self, index: Word | int) -> Word:
    return Word(llvm.load(_integer(32), self._at(index)))

  def load_vector(self, index: Word, count: int) -> list[Word]:
    """`count` neighbouring words, 1, 2 or 4, loaded at once."""
    kind = ir.VectorType.get((count,), _integer(32))
    vector = llvm.load(kind, self._at(index), alignment=4 * count)
    return [
      Word(llvm.extractelement(vector, _constant(i, _integer(32))))
      for i in range(count)
    ]

  def store(self, index: Word | int, value: Word) -> None:
    llvm.store(value.value, self._at(index))

  def atomic(self, how: str, index: Word | int, value: Word) -> Word:
    """The old word; how: 'add', '_or', 'umax' or 'umin'."""
    return Word(
      llvm.atomicrmw(
        getattr(llvm.AtomicBinOp, how),
        self._at(index),
        value.value,
        llvm.AtomicOrdering.monotonic,
      )
    )


class Threads:
  """The threads of a block."""

  def __init__(self, num_threads: int):
    from jax.experimental.mosaic import gpu as mgpu

    self.num_threads = num_threads
    self.thread = Word(mgpu.utils.thread_idx())
    self.lane = self.thread & (WARP - 1)
    self.warp = self.thread >> 5

  def constant(self, value: int) -> Word:
    return Word(_constant(value, _integer(32)))

  @contextlib.contextmanager
  def when(self, condition: Word) -> Iterator[None]:
    """Only the threads where `condition` holds; no value leaves the block."""
    with ir.InsertionPoint(scf.IfOp(condition.value).then_block):
      yield
      scf.yield_([])

  def loop_while(
    self,
    condition: Callable[..., Word],
    body: Callable[..., Sequence[Word]],
    *carries: Word,
  ) -> list[Word]:
    """While `condition(*carries)`: carries = body(*carries)."""
    values = [x.value for x in carries]
    types = [x.type for x in values]
    loop = scf.WhileOp(types, values)
    before = loop.before.blocks.append(*types)
    with ir.InsertionPoint.at_block_begin(before):
      arguments = list(before.arguments)
      scf.condition(condition(*map(Word, arguments)).value, arguments)
    after = loop.after.blocks.append(*types)
    with ir.InsertionPoint.at_block_begin(after):
      scf.yield_([x.value for x in body(*map(Word, after.arguments))])
    return [Word(x) for x in loop.results]

  def barrier(self) -> None:
    """All threads of the block, and what they wrote to shared memory."""
    nvvm.barrier()

  def ballot(self, condition: Word) -> Word:
    """Bit i: whether the condition holds in lane i of the warp."""
    return Word(
      nvvm.vote_sync(_all_lanes(), condition.value, nvvm.VoteSyncKind.ballot)
    )

  def shuffle_up(self, value: Word, distance: int) -> Word:
    """The value `distance` lanes below; the own one where there is none."""
    zero = _constant(0, _integer(32))
    return self._shuffle(
      value, _constant(distance, _integer(32)), zero, nvvm.ShflKind.up
    )

  def of_last_lane(self, value: Word) -> Word:
    """The value of the warp's last lane."""
    last = _constant(WARP - 1, _integer(32))
    return self._shuffle(value, last, last, nvvm.ShflKind.idx)

  def _shuffle(self, value: Word, by: Any, clamp: Any, kind: Any) -> Word:
    return Word(nvvm.shfl_sync(_all_lanes(), value.value, by, clamp, kind))

  def reduce(self, how: str, value: Word) -> Word:
    """Over the lanes of the warp; how: 'ADD', 'UMAX' or 'UMIN'."""
    kind = getattr(nvvm.ReductionKind, how)
    return Word(nvvm.redux_sync(value.value, kind, _all_lanes()))

  def add_of_warp(self, memory: Memory, index: Word | int, value: Word) -> Word:
    """Adds the last lane's value; returns the old word to all lanes."""
    last = self.lane.equals(WARP - 1).value
    branch = scf.IfOp(last, [_integer(32)], has_else=True)
    with ir.InsertionPoint(branch.then_block):
      scf.yield_([memory.atomic('add', index, value).value])
    else_block: Any = branch.else_block
    with ir.InsertionPoint(else_block):
      scf.yield_([_constant(0, _integer(32))])
    return self.of_last_lane(Word(branch.results[0]))

  def popcount(self, value: Word) -> Word:
    return Word(llvm.intr_ctpop(value.value))

  def leading_zeros(self, value: Word) -> Word:
    return Word(llvm.intr_ctlz(value.value, False))

  def trailing_zeros(self, value: Word) -> Word:
    return Word(llvm.intr_cttz(value.value, False))

  def float_exceeds(self, bits: Word, other: Word) -> Word:
    """Whether a float32 is greater than another, both given as their bits."""
    kind = ir.F32Type.get()
    left = arith.bitcast(kind, bits.value)
    right = arith.bitcast(kind, other.value)
    return Word(arith.cmpf(arith.CmpFPredicate.OGT, left, right))


def _integer(bits: int) -> Any:
  return ir.IntegerType.get_signless(bits)


def _constant(value: int, kind: Any) -> Any:
  width = ir.IntegerType(kind).width
  value &= 2**width - 1
  if width > 1 and value >= 2 ** (width - 1):
    value -= 2**width
  return arith.constant(kind, value)


def _all_lanes() -> Any:
  return _constant(2**WARP - 1, _integer(32))
