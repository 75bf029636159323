"""Parameters and optimizer state of a request, from shapes alone."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dsv32_jax.config.model import DENSE, ModelConfig
from dsv32_jax.config.training import StageConfig
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.sharding import specs
from dsv32_jax.sharding.planning.request import Request, abstract
from dsv32_jax.training import optimizer, stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
  """One leaf of the parameter tree.

  Attributes:
    path: keys from the root.
    shape: of all layers together where they are stacked.
    itemsize: bytes of a stored element.
    layers: layers that the leaf stacks, 1 for an unstacked one.
    axes: mesh axes that each dim is cut over.
    trains: whether the stage's optimizer has it.
  """

  path: tuple[str, ...]
  shape: tuple[int, ...]
  itemsize: int
  layers: int
  axes: tuple[tuple[str, ...], ...]
  trains: bool

  @property
  def size(self) -> int:
    """Elements."""
    return math.prod(self.shape)

  @property
  def is_expert(self) -> bool:
    """Whether it belongs to the routed experts."""
    return 'experts' in self.path

  @property
  def in_block(self) -> bool:
    """Whether a decoder block has it, whose backward pass is by itself."""
    return bool({'attention', 'moe', 'ffn'} & set(self.path))

  @property
  def is_vector(self) -> bool:
    """Norm scales and biases, which are summed in float32."""
    return self.path[-1] in ('scale', 'bias')

  def product_itemsize(self, compute: int) -> int:
    """Bytes of an element as it is multiplied; two matrices stay float32.

    Args:
      compute: bytes of an element of the compute type.
    """
    return max(4, compute) if self.path[-1] in ('w_router', 'w_iw') else compute

  def cut(self, sizes: Mapping[str, int], *names: str) -> int:
    """Parts along some of its mesh axes; all of them without names."""
    return math.prod(
      sizes[axis]
      for entry in self.axes
      for axis in entry
      if not names or axis in names
    )

  def gathered(self, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes that a matrix is gathered over before it is used.

    Heads, hidden widths and experts stay where they are; other dims are cut to
    save memory only.
    """
    kept = {'tensor'} | ({'expert'} if self.is_expert else set())
    return tuple(
      axis
      for entry in self.axes
      for axis in entry
      if axis not in kept and sizes[axis] > 1
    )


@dataclasses.dataclass(frozen=True)
class State:
  """A training state in shapes.

  Attributes:
    variables: parameters and router biases.
    opt_state: of the trainable groups.
    weights: the parameters as a list.
  """

  variables: Any
  opt_state: Any
  weights: tuple[Weight, ...]


def build(request: Request) -> State:
  """Shapes and shardings of a request's training state.

  Raises:
    ValueError: naming a parameter that the mesh cannot divide.
  """
  # What a batch looks like does not matter here.
  alike = dataclasses.replace(request.stage, micro_batches=1)
  return _build(
    request.model, tuple(request.sizes.items()), request.rules, alike
  )


@functools.lru_cache(maxsize=64)
def _build(
  model: ModelConfig,
  sizes: tuple[tuple[str, int], ...],
  rules: str,
  config: StageConfig,
) -> State:
  parallel = abstract(dict(sizes), rules)
  variables = specs.with_shardings(boxed_shapes(model), parallel)
  stage = stages.build(config, model)
  trainable, _ = optimizer.split(variables['params'], stage)
  opt_state = _moments(model, config)
  shardings = specs.mirrored(opt_state, trainable, parallel)
  opt_state = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    opt_state,
    shardings,
  )
  weights = tuple(
    _weight(path, leaf, stage, model)
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables['params'])
  )
  return State(variables, opt_state, weights)


@functools.lru_cache(maxsize=64)
def boxed_shapes(model: ModelConfig) -> Any:
  """Shapes of a model's variables, in the boxes that name logical axes."""
  tokens_BT = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  # Dense attention has the same parameters and less to trace.
  return jax.eval_shape(
    functools.partial(DeepSeekV32(model).init, attention=DENSE),
    jax.eval_shape(lambda: jax.random.key(0)),
    tokens_BT,
  )


@functools.lru_cache(maxsize=64)
def _moments(model: ModelConfig, config: StageConfig) -> Any:
  """Shapes of the optimizer state."""
  stage = stages.build(config, model)
  params = specs.with_shardings(boxed_shapes(model), None)['params']
  trainable, _ = optimizer.split(params, stage)
  return jax.eval_shape(optimizer.build(config, stage).init, trainable)


def count(tree: Any) -> int:
  """Elements of a tree."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _weight(path: tuple, leaf: Any, stage: Any, model: ModelConfig) -> Weight:
  names = tuple(key.key for key in path)
  # flax.linen.scan names the collection of stacked layers `layers`.
  stacked = 'layers' in names and model.scan_layers
  spec = tuple(leaf.sharding.spec) + (None,) * len(leaf.shape)
  return Weight(
    path=names,
    shape=leaf.shape,
    itemsize=leaf.dtype.itemsize,
    layers=leaf.shape[0] if stacked else 1,
    axes=tuple(
      (entry,) if isinstance(entry, str) else tuple(entry or ())
      for entry in spec[: len(leaf.shape)]
    ),
    trains=optimizer.group_of(path) in stage.trainable,
  )
