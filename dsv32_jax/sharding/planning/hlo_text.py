"""HLO text as computations of instructions, and what stands in them."""

import dataclasses
import math
import re

_ITEM_BITS = {'pred': 8, 'token': 0}
_ARRAY = re.compile(r'\b(pred|token|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([^\s(]+) \(.*\) -> .* \{$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([^\s=]+) = (.*)$')
_OPCODE = re.compile(r' ([a-z][a-z0-9\-]*)\(')
_NAME = re.compile(r'%([^\s,()]+)')
_CALLED = re.compile(r'\b(?:body|condition|to_apply|calls)=%?([^\s,}]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a shape.

  Attributes:
    dtype: XLA's name.
    size: elements.
  """

  dtype: str
  size: int

  @property
  def bytes(self) -> int:
    """In memory."""
    if self.dtype in _ITEM_BITS:
      return self.size * _ITEM_BITS[self.dtype] // 8
    bits = re.search(r'\d+', self.dtype)
    return self.size * int(bits[0] if bits else 32) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line.

  Attributes:
    name: of its result.
    shape: of its result, as text.
    opcode: HLO's name of the operation.
    operands: names; a parameter's number.
    rest: attributes, as text.
    is_root: whether it is its computation's result.
  """

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  rest: str
  is_root: bool

  @property
  def arrays(self) -> list[Array]:
    """Every array of its result."""
    return [
      Array(dtype, math.prod(int(dim) for dim in dims.split(',') if dim))
      for dtype, dims in _ARRAY.findall(self.shape)
    ]

  @property
  def called(self) -> list[str]:
    """Computations that it calls, a reduction's sum included."""
    if not self.rest:
      return []
    called = _CALLED.findall(self.rest)
    if branches := _BRANCHES.search(self.rest):
      called += _NAME.findall(branches[1])
    return called

  @property
  def scope(self) -> str:
    """jax's name of the operation, or of an argument."""
    found = _OP_NAME.search(self.rest)
    return found[1].replace("\\'", "'") if found else ''


def parse(text: str) -> tuple[str, dict[str, list[Instruction]]]:
  """The entry's name, and all computations by name."""
  entry, computations, lines = '', {}, []
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      lines = computations.setdefault(match[2], [])
      if match[1]:
        entry = match[2]
    elif match := _INSTRUCTION.match(line):
      lines.append(_instruction(match))
  return entry, computations


def _instruction(match: re.Match) -> Instruction:
  text = match[3]
  # A shape may be a tuple with parentheses of its own, never ` word(`.
  opcode = _OPCODE.search(text)
  if opcode is None:
    return Instruction(match[2], text, '', (), '', bool(match[1]))
  end = _closing(text, opcode.end() - 1)
  inside = text[opcode.end() : end]
  operands = tuple(_NAME.findall(inside))
  if opcode[1] == 'parameter':
    operands = (inside,)
  return Instruction(
    name=match[2],
    shape=text[: opcode.start()],
    opcode=opcode[1],
    operands=operands,
    rest=text[end + 1 :],
    is_root=bool(match[1]),
  )


def _closing(text: str, start: int) -> int:
  depth = 0
  for index in range(start, len(text)):
    depth += {'(': 1, ')': -1}.get(text[index], 0)
    if depth == 0:
      return index
  return len(text)


def first_group(rest: str, num_devices: int) -> list[int]:
  """Members of the first group, in the spellings that XLA has."""
  if match := re.search(r'source_target_pairs=\{\{(\d+),(\d+)\}', rest):
    return sorted({int(match[1]), int(match[2])})
  start = rest.find('replica_groups=')
  if start < 0:
    return list(range(num_devices))
  text = rest[start + len('replica_groups=') :]
  if match := re.match(r'\{\{([\d,]*)\}', text):
    return [int(member) for member in match[1].split(',') if member]
  if match := re.match(
    r'\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text
  ):
    dims = [int(dim) for dim in match[3].split(',')]
    order = match[4] and [int(dim) for dim in match[4].split(',')]
    return _iota(dims, order or list(range(len(dims))))[: int(match[2])]
  if match := re.match(r'mesh\[([^\]]*)\] \{([^}]*)\}', text):
    return _mesh_group(match[1], match[2])
  return list(range(num_devices))


def _iota(dims: list[int], order: list[int]) -> list[int]:
  """Row-major numbers of an array of these dims, its dims in another order."""
  strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
  numbers = [0]
  for dim in order:
    numbers = [n + i * strides[dim] for n in numbers for i in range(dims[dim])]
  return numbers


def _mesh_group(mesh: str, named: str) -> list[int]:
  """`mesh['data'=2,'fsdp'=4] {'fsdp'}`: the group that holds device 0."""
  sizes = [(n, int(s)) for n, s in re.findall(r"'([^']+)'=(\d+)", mesh)]
  names = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named)
  numbers, stride, strides = [0], 1, {}
  for name, size in reversed(sizes):
    strides[name] = (stride, size)
    stride *= size
  for name, before, part in names:
    base, size = strides[name]
    if part:  # 'axis':(2)4 is the part of size 4 after the outer 2.
      base *= size // (int(before) * int(part))
      size = int(part)
    numbers = [n + i * base for n in numbers for i in range(size)]
  return sorted(numbers)
