"""New indexers for a checkpoint that has none, as DeepSeek-V3's.

They are those of a fresh model, so a continued training that starts from such a
checkpoint starts as the paper's does: trained weights, untrained indexers.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsv32_jax.config.model import DENSE
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.sharding import parallel as parallel_lib
from dsv32_jax.sharding import specs

_INDEXER = 'indexer'


def without(tree: Any) -> Any:
  """A tree without what is under keys named indexer."""
  if not isinstance(tree, dict):
    return tree
  return {key: without(value) for key, value in tree.items() if key != _INDEXER}


def only(tree: Any) -> dict:
  """The part of a tree under keys named indexer."""
  found = {}
  for key, value in tree.items():
    if key == _INDEXER:
      found[key] = value
    elif isinstance(value, dict) and (inner := only(value)):
      found[key] = inner
  return found


def add(
  variables: dict, model: DeepSeekV32, seed: int, placed: Any | None
) -> None:
  """Puts fresh indexers into variables that have none.

  Args:
    variables: changed in place.
    model: the model.
    seed: values are those of `init_variables` with this seed's key.
    placed: shapes of all parameters with shardings, or None.
  """

  def init(key: jax.Array) -> dict:
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    with parallel_lib.use(None):
      params = model.init(key, tokens_BT, attention=DENSE)['params']
    # XLA drops the rest of the model.
    return only(nn.meta.unbox(params))

  shardings = None if placed is None else specs.of_leaves(only(placed))
  key = jax.random.key(seed)
  # Compiled as a run's first variables are, so that both are the same.
  compiled = (
    jax.jit(init, out_shardings=shardings)
    .lower(key)
    .compile(compiler_options={'xla_backend_optimization_level': 0})
  )
  _merge(variables['params'], compiled(key))


def _merge(into: dict, tree: dict) -> None:
  for key, value in tree.items():
    if isinstance(value, dict) and key != _INDEXER:
      _merge(into[key], value)
    else:
      into[key] = value
