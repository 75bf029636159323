"""From scanned layers to a module a layer, which decoding needs.

A scanned stack keeps one array for all its layers. A cache kept that way would
be sliced and written back whole at every layer of every token; a cache a layer
is updated in place.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import NamedSharding, PartitionSpec

from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.sharding import parallel

_STACKS = ('dense_layers', 'moe_layers')


def unroll(model: DeepSeekV32, variables: dict) -> tuple[DeepSeekV32, dict]:
  """Returns the same model with `scan_layers=False`, and its variables.

  The parameters are copied, so keep the result instead of calling this again.
  Nothing is copied if the model is unrolled already.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from dsv32_jax import DeepSeekV32, inference, presets
    >>> model = DeepSeekV32(presets.tiny())
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    >>> model, variables = inference.unroll(model, variables)
    >>> sorted(variables['params']['moe_layers'])
    ['layer_0', 'layer_1']

  Args:
    model: the model.
    variables: its variables, with or without partitioning boxes.

  Returns:
    The model and {collection: tree}, without boxes.
  """
  variables = dict(nn.meta.unbox(variables))
  if not model.cfg.scan_layers:
    return model, variables
  cfg = dataclasses.replace(model.cfg, scan_layers=False, remat='none')
  # One program: a slice a leaf would be one dispatch each.
  function = jax.jit(_unroll_tree, out_shardings=_unrolled_shardings(variables))
  return DeepSeekV32(cfg), function(variables)


def _unrolled_shardings(variables: dict) -> Any:
  """Every layer laid out as its stack was; None where nothing is said."""
  if parallel.active() is None:
    return None

  def without_layers(path: tuple, leaf: jax.Array) -> Any:
    name = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
    sharding = leaf.sharding
    if not isinstance(sharding, NamedSharding):
      return None
    if len(name) > 1 and name[1] in _STACKS:
      return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return sharding

  # As if each layer of a stack were its stack's leaf.
  shardings = jax.tree_util.tree_map_with_path(without_layers, variables)
  unrolled = {}
  for collection, tree in shardings.items():
    unrolled[collection] = dict(tree)
    for stack in _STACKS:
      if stack in tree:
        layers = variables[collection][stack]['layers']
        count = jax.tree.leaves(layers)[0].shape[0]
        unrolled[collection][stack] = {
          f'layer_{layer}': tree[stack]['layers'] for layer in range(count)
        }
  return unrolled


def _unroll_tree(variables: dict) -> dict:
  unrolled = {}
  for collection, tree in variables.items():
    unrolled[collection] = dict(tree)
    for stack in _STACKS:
      if stack in tree:
        unrolled[collection][stack] = _split(tree[stack]['layers'])
  return unrolled


def _split(layers: dict) -> dict:
  num_layers = jax.tree.leaves(layers)[0].shape[0]
  return {
    f'layer_{layer}': jax.tree.map(lambda leaf, i=layer: leaf[i], layers)
    for layer in range(num_layers)
  }
