"""What is to be planned, checked before anything is traced."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jax.sharding import AbstractMesh, AxisType

from dsv32_jax.config import presets
from dsv32_jax.config.data import DataConfig
from dsv32_jax.config.model import REMAT_POLICIES, ModelConfig, Precision
from dsv32_jax.config.training import (
  MeshConfig,
  OptimizerConfig,
  StageConfig,
)
from dsv32_jax.sharding import axes, mesh, specs
from dsv32_jax.sharding.parallel import Parallel
from dsv32_jax.sharding.rules import MESH_AXES, RULE_SETS

LENGTH = 131_072


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
  """A stage of the paper (arXiv:2512.02556 section 2.1; spec 5.1)."""

  steps: int
  batch_size: int

  @property
  def tokens(self) -> int:
    """All that the stage reads, in rows of 128K tokens."""
    return self.steps * self.batch_size * LENGTH


STAGES: Mapping[str, Published] = {
  'dense_warmup': Published(steps=1000, batch_size=16),
  'sparse_training': Published(steps=15000, batch_size=480),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """One layout of one stage.

  Attributes:
    model: with the precision, `remat` and `query_chunk` that it trains with.
    sizes: devices along each mesh axis.
    rules: name of a rule set.
    stage: kind, rows, tokens a row, micro-batches, optimizers.
  """

  model: ModelConfig
  sizes: Mapping[str, int]
  rules: str
  stage: StageConfig

  @property
  def num_devices(self) -> int:
    return math.prod(self.sizes.values())

  @property
  def parallel(self) -> Parallel:
    """An abstract mesh, which has no devices, and the rules."""
    return abstract(self.sizes, self.rules)

  @property
  def rows(self) -> int:
    """Rows of a micro-batch that one device sees (in part, with context)."""
    shards = self.parallel.shards(axes.BATCH)
    return self.stage.data.batch_size // (self.stage.micro_batches * shards)

  @property
  def row_tokens(self) -> int:
    """Tokens of a row that one device holds."""
    return self.stage.data.seq_len // self.parallel.shards(axes.SEQUENCE)

  @property
  def tokens(self) -> int:
    """Tokens of a micro-batch on one device."""
    return self.rows * self.row_tokens


def abstract(sizes: Mapping[str, int], rules: str) -> Parallel:
  """A layout over no devices."""
  mesh_of_none = AbstractMesh(
    tuple(sizes[name] for name in MESH_AXES),
    MESH_AXES,
    axis_types=(AxisType.Auto,) * len(MESH_AXES),
  )
  return Parallel(mesh_of_none, RULE_SETS[rules])


def make(
  *,
  preset: str,
  rules: str,
  sizes: Mapping[str, int],
  stage: str = 'sparse_training',
  length: int = LENGTH,
  batch_size: int | None = None,
  micro_batches: int | None = None,
  param_dtype: str = 'float32',
  moment_dtype: str = 'float32',
  remat: str = 'full',
  query_chunk: int = 4096,
) -> Request:
  """A checked request.

  Args:
    preset: a name of `config.presets`.
    rules: a name of `sharding.rules`.
    sizes: mesh axes that are not 1.
    stage: a stage kind.
    length: tokens a row.
    batch_size: rows of a step; None takes the paper's.
    micro_batches: None takes the most, so that a device has one row or the
      fewest that it can have.
    param_dtype: of the stored parameters, and of their gradients.
    moment_dtype: of AdamW's moments.
    remat: `ModelConfig.remat`.
    query_chunk: `ModelConfig.query_chunk`.

  Raises:
    ValueError: naming the field, its value and what was expected.
  """
  model = presets.get(preset)
  model = dataclasses.replace(
    model,
    precision=Precision(param=param_dtype, compute=model.precision.compute),
    remat=_known('remat', remat, REMAT_POLICIES),
    query_chunk=query_chunk,
  )
  moments = _known('moment_dtype', moment_dtype, ('float32', 'bfloat16'))
  for name in sizes:
    _known('mesh: axis', name, MESH_AXES)
  full: dict[str, Any] = {name: sizes.get(name, 1) for name in MESH_AXES}
  layout = MeshConfig(rules=_known('rules', rules, tuple(RULE_SETS)), **full)
  mesh.axis_sizes(layout, math.prod(full.values()))
  kinds = ('pretrain', 'context_extension', 'dense_warmup', 'sparse_training')
  kind = _known('stage', stage, kinds)
  if batch_size is None:
    batch_size = STAGES.get(stage, STAGES['sparse_training']).batch_size
  shards = math.prod(full[n] for n in RULE_SETS[rules].mesh_axes[axes.BATCH])
  if micro_batches is None:
    micro_batches = max(batch_size // shards, 1)
    while batch_size % micro_batches:
      micro_batches -= 1
  request = Request(
    model=model,
    sizes=full,
    rules=rules,
    stage=StageConfig(
      kind=kind,
      steps=STAGES.get(stage, STAGES['sparse_training']).steps,
      init_from='any',
      data=DataConfig(seq_len=length, batch_size=batch_size),
      optimizer=OptimizerConfig(moment_dtype=moments),
      indexer_optimizer=OptimizerConfig(moment_dtype=moments, weight_decay=0.0),
      micro_batches=micro_batches,
    ),
  )
  specs.check_batch(
    request.parallel,
    batch_size=batch_size,
    seq_len=length,
    micro_batches=micro_batches,
  )
  return request


def parse_mesh(text: str) -> dict[str, int]:
  """`fsdp=32,expert=8` as a mapping.

  Raises:
    ValueError: naming the part that is not an axis with a size.
  """
  sizes: dict[str, int] = {}
  for part in filter(None, (part.strip() for part in text.split(','))):
    name, _, value = part.partition('=')
    _known('mesh: axis', name, MESH_AXES)
    if not value.isdecimal() or int(value) < 1:
      raise ValueError(
        f'mesh.{name}: got {value!r}, expected a whole number of at least 1'
      )
    if name in sizes:
      raise ValueError(f'mesh.{name}: got it twice, expected once')
    sizes[name] = int(value)
  return sizes


def check_gpus(sizes: Mapping[str, int], gpus: int | None) -> None:
  """Refuses a mesh that is not of so many GPUs.

  Raises:
    ValueError: naming both numbers.
  """
  product = math.prod(sizes.values())
  if gpus is not None and product != gpus:
    described = ' x '.join(f'{name} {size}' for name, size in sizes.items())
    raise ValueError(
      f'mesh: got {described} = {product} devices, expected the {gpus} of gpus'
    )


def _known(field: str, value: str, choices: tuple[str, ...]) -> Any:
  """The value, which a type checker then takes for a Literal."""
  if value not in choices:
    raise ValueError(
      f'{field}: got {value!r}, expected one of {", ".join(choices)}'
    )
  return value
