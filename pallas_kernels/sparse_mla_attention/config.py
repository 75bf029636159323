"""Which formulation `xla` takes, and its block sizes."""

import dataclasses
import math

import jax

# Elements of the largest temporary of a step: 2 MiB in float32, so that it
# stays in a core's cache; an accelerator wants fewer and larger steps.
_CPU_ELEMENTS = 2**19
_ACCELERATOR_ELEMENTS = 2**23

# The gather form costs K rows a query, the mask form every key before it.
_GATHER_RATIO = 8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class XlaConfig:
  """How `xla` computes; every choice gives the same function.

  Attributes:
    form: 'gather' reads the K selected rows of each query (cost T * K), 'mask'
      every key block up to the last selected one (cost T * S / 2, but as large
      matrix products).
    block_queries: queries of a step.
    block_keys: keys of a block in the mask form; unused by the gather form.
    sorted_scatter: sum the gather form's key gradients in sorted order. A
      plain scatter-add runs in order on CPU; on a GPU its atomic additions
      come in any order, so results would differ from run to run.
  """

  form: str
  block_queries: int
  block_keys: int
  sorted_scatter: bool

  def __post_init__(self) -> None:
    if self.form not in ('gather', 'mask'):
      raise ValueError(f"form={self.form!r} must be 'gather' or 'mask'")
    if self.block_queries < 1 or self.block_keys < 1:
      raise ValueError(
        f'block_queries={self.block_queries} and block_keys='
        f'{self.block_keys} must be positive'
      )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MosaicConfig:
  """How the Mosaic GPU kernels share the work out.

  Attributes:
    splits: parts of a query's keys that are attended to at the same time and
      then combined. More than one only where there are too few queries to
      keep a GPU busy.
  """

  splits: int = 1

  def __post_init__(self) -> None:
    if self.splits < 1:
      raise ValueError(f'splits={self.splits} must be positive')


def mosaic_config(
  *, num_rows: int, num_heads: int, topk: int, num_multiprocessors: int
) -> MosaicConfig:
  """How to share out one call.

  Args:
    num_rows: queries of all batches.
    num_heads: H.
    topk: K.
    num_multiprocessors: blocks of threads that run at once.
  """
  return MosaicConfig(
    splits=key_splits(num_rows, num_heads, topk, num_multiprocessors)
  )


def key_splits(
  num_rows: int, num_heads: int, topk: int, num_multiprocessors: int
) -> int:
  """As many parts as still run at once, of at least 128 keys each."""
  tasks = num_rows * -(-num_heads // 64)
  splits = 1
  while 2 * splits * tasks <= num_multiprocessors and 256 * splits <= topk:
    splits *= 2
  return splits


def xla_config(
  *,
  batch: int,
  num_queries: int,
  num_keys: int,
  num_heads: int,
  width: int,
  topk: int,
  form: str | None = None,
  platform: str | None = None,
) -> XlaConfig:
  """Formulation and blocks for one call.

  Measured forward and backward on two CPU cores, H=4, X=48, float32, ms, gather
  / mask: T=256 K=64 B=2 4.5 / 3.1; T=512 K=64 B=8 39 / 43; T=1024 K=256 32 /
  10; T=1024 K=64 7 / 12; T=4096 K=64 22 / 115; T=16384 K=32 110 / 1400. A
  selected pair costs 4 to 9 times a masked one, and causality halves the mask
  form's pairs: gather from S = 8 K on.

  Args:
    batch: B.
    num_queries: T.
    num_keys: S.
    num_heads: H (for the indexer's loss, the larger of H and J).
    width: floats read of a selected row.
    topk: K.
    form: 'gather' or 'mask' in place of the heuristic.
    platform: 'cpu', 'gpu', ...; the default backend's when None.
  """
  on_cpu = (platform or jax.default_backend()) == 'cpu'
  elements = _CPU_ELEMENTS if on_cpu else _ACCELERATOR_ELEMENTS
  if form is None:
    form = 'gather' if num_keys >= _GATHER_RATIO * topk else 'mask'
  if form == 'gather':
    queries = 2 * elements // (batch * topk * max(width, num_heads))
    block_queries, block_keys = _power_of_two(queries, 1, 256), 1
  else:
    side = math.isqrt(elements // (batch * num_heads))
    block_queries = block_keys = _power_of_two(side, 32, 256)
  return XlaConfig(
    form=form,
    block_queries=min(block_queries, num_queries),
    block_keys=min(block_keys, num_keys),
    sorted_scatter=not on_cpu,
  )


def _power_of_two(value: int, smallest: int, largest: int) -> int:
  """Largest power of two at most `value`, within limits."""
  return min(max(1 << max(value.bit_length() - 1, 0), smallest), largest)
