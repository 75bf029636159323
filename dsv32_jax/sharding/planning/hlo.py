"""Counts the collectives of a compiled program, from its text.

What runs in a loop counts as often as the loop runs (XLA writes the known trip
count beside it), what stands in a branch of a conditional as if it ran. Bytes
are those of the larger side on one device: an all-gather's result, an
all-reduce's or reduce-scatter's operand, all that a device sends in an
all-to-all.

XLA's CPU backend has no reduce-scatter: an all-reduce of which every device
then reads its own part only is counted as the reduce-scatter that a GPU runs.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

from dsv32_jax.sharding.planning import hlo_text
from dsv32_jax.sharding.planning.hlo_text import Instruction

KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)

# What only gives a value another shape or type.
_RESHAPING = ('bitcast', 'copy', 'convert', 'reshape', 'transpose')
# A value that leaves its computation in another shape or type.
_ESCAPES = -1
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective instruction.

  Attributes:
    kind: of `KINDS`.
    bytes: of the larger side on one device, once.
    count: how often a run of the program runs it.
    group: devices that take part together.
    axes: mesh axes that they differ in, outermost first; () where the program
      does not say.
    dtype: of its (first) array.
    scope: XLA's name of the operation, as `jit(step)/.../dot_general`.
  """

  kind: str
  bytes: int
  count: int
  group: int
  axes: tuple[str, ...]
  dtype: str
  scope: str

  @property
  def total(self) -> int:
    """Bytes of all its runs."""
    return self.bytes * self.count


def collectives(
  text: str, sizes: Mapping[str, int], *, unknown_trips: int | None = None
) -> list[Collective]:
  """The collectives of an HLO module that more than one device takes part in.

  Args:
    text: `compiled.as_text()`.
    sizes: the mesh's axes in order; devices are numbered with the last fastest.
    unknown_trips: how often a loop runs whose trip count depends on data.

  Raises:
    ValueError: for such a loop around a collective without `unknown_trips`.
  """
  return list(_Program(text, sizes, unknown_trips).walk())


def totals(found: list[Collective]) -> dict[str, int]:
  """Bytes of all runs, by kind."""
  total: dict[str, int] = collections.defaultdict(int)
  for collective in found:
    total[collective.kind] += collective.total
  return dict(total)


def argument_bytes(text: str, prefix: str) -> int:
  """Bytes on one device of the arguments whose name begins so.

  Args:
    text: `compiled.as_text()`.
    prefix: as in jax's names of arguments, `carry[0].params`.
  """
  program = _Program(text, {}, None)
  total = 0
  for instruction in program.computations[program.entry]:
    if instruction.opcode == 'parameter':
      if instruction.scope.startswith(prefix):
        total += sum(array.bytes for array in instruction.arrays)
  return total


class _Program:
  """The computations of a module, by name."""

  def __init__(
    self, text: str, sizes: Mapping[str, int], unknown_trips: int | None
  ):
    self.sizes = dict(sizes)
    self.unknown_trips = unknown_trips
    self.entry, self.computations = hlo_text.parse(text)

  def walk(self) -> Iterator[Collective]:
    yield from self._visit(self.entry, 1)

  def _visit(self, name: str, count: int) -> Iterator[Collective]:
    for instruction in self.computations[name]:
      if (kind := _kind(instruction.opcode)) is not None:
        yield from self._of(name, instruction, kind, count)
        continue
      called = [n for n in instruction.called if self._has_collective(n)]
      times = count
      if called and instruction.opcode == 'while':
        times *= self._trips(instruction)
      for other in called:
        yield from self._visit(other, times)

  def _trips(self, loop: Instruction) -> int:
    if known := _TRIPS.search(loop.rest):
      return int(known[1])
    if self.unknown_trips is not None:
      return self.unknown_trips
    raise ValueError(
      f'the loop {loop.name} ({loop.scope or "no name"}) has '
      'collectives and no known trip count; give unknown_trips to count them'
    )

  @functools.cache  # noqa: B019 (a program is parsed, walked and dropped)
  def _has_collective(self, name: str) -> bool:
    return any(
      _kind(i.opcode) is not None or any(map(self._has_collective, i.called))
      for i in self.computations.get(name, ())
    )

  def _of(
    self, computation: str, instruction: Instruction, kind: str, count: int
  ) -> Iterator[Collective]:
    group, axes = self._group(instruction.rest)
    if group == 1:
      return
    arrays = instruction.arrays
    if instruction.opcode == 'all-gather-start':
      # (operands, results): the results are the larger half.
      arrays = arrays[len(arrays) // 2 :]
    parts = {kind: arrays}
    if kind == 'all-reduce':
      scattered = [
        self._is_scattered(computation, instruction, index, len(arrays), group)
        for index in range(len(arrays))
      ]
      parts = {
        kind: [a for a, s in zip(arrays, scattered, strict=True) if not s],
        'reduce-scatter': [
          a for a, s in zip(arrays, scattered, strict=True) if s
        ],
      }
    for part, members in parts.items():
      if members:
        size = sum(array.bytes for array in members)
        yield Collective(
          kind=part,
          # The instruction's own shape is one device's share.
          bytes=size * group if instruction.opcode == part == 'reduce-scatter'
          else size,
          count=count,
          group=group,
          axes=axes,
          dtype=members[0].dtype,
          scope=instruction.scope,
        )  # fmt: skip

  def _group(self, rest: str) -> tuple[int, tuple[str, ...]]:
    """Devices of a group and the mesh axes that they differ in."""
    members = hlo_text.first_group(rest, math.prod(self.sizes.values()))
    strides, stride = {}, 1
    for name in reversed(self.sizes):
      strides[name] = stride
      stride *= self.sizes[name]
    axes = tuple(
      name
      for name in self.sizes
      if len({m // strides[name] % self.sizes[name] for m in members}) > 1
    )
    return len(members), axes

  def _is_scattered(
    self,
    computation: str,
    reduce: Instruction,
    index: int,
    count: int,
    group: int,
  ) -> bool:
    """Whether a device reads its own part only of an all-reduce's result."""
    name = reduce.name
    if count > 1:
      parts = [
        user.name
        for user in self.computations[computation]
        if user.operands == (name,)
        and f'index={index}' in user.rest.split(', ')
      ]
      if len(parts) != 1:
        return False
      name = parts[0]
    read = self._read(computation, name)
    whole = reduce.arrays[index].size
    return read is not None and 0 < read * group <= whole

  def _read(self, computation: str, name: str) -> int | None:
    """Elements of the slices that are read of a value; None if all of it is."""
    largest = 0
    for user in self.computations[computation]:
      if name not in user.operands:
        continue
      if user.opcode == 'dynamic-slice':
        read = user.arrays[0].size
      elif user.opcode in _RESHAPING:
        # The root of a fusion: whoever uses the fusion reads it.
        read = _ESCAPES if user.is_root else self._read(computation, user.name)
      elif user.opcode == 'fusion':
        read = self._read_by_fusion(user, name)
        if read == _ESCAPES:
          read = self._read(computation, user.name)
      else:
        read = None
      if read is None or read == _ESCAPES:
        return read
      largest = max(largest, read)
    return largest

  def _read_by_fusion(self, fusion: Instruction, name: str) -> int | None:
    body = fusion.called[0]
    largest = 0
    for index, operand in enumerate(fusion.operands):
      if operand != name:
        continue
      parameter = next(
        i.name
        for i in self.computations[body]
        if i.opcode == 'parameter' and i.operands == (str(index),)
      )
      read = self._read(body, parameter)
      if read is None or read == _ESCAPES:
        return read
      largest = max(largest, read)
    return largest


def _kind(opcode: str) -> str | None:
  plain = opcode.removesuffix('-start')
  return plain if plain in KINDS else None
