"""The indexer's loss, as the benchmark measures it."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.benchmarks import costs, inputs
from pallas_kernels.benchmarks.costs import FORWARD, GRADIENTS
from pallas_kernels.benchmarks.op import Op


def indexer_kl(*, is_selected: bool) -> Op:
  """The loss; its forward pass computes the gradients where they are asked."""
  api = inputs.module('indexer_kl', 'api')

  def make(spec, dtype, seed):
    shape = (spec.batch, spec.num_queries)
    weight = jnp.full(shape, 1 / (shape[0] * shape[1]), jnp.float32)
    q_index, k_index, w_index, q, k = arrays(spec, dtype, seed)
    indices = inputs.random_indices(seed, spec) if is_selected else None
    lse = inputs.log_sum_exp(spec, q, k, indices)
    arguments = (q_index, k_index, w_index, q, k, lse, weight)
    return arguments if indices is None else (*arguments, indices)

  def call(implementation, spec, *arguments):
    selection = {'indices_BTK': arguments[7]} if is_selected else {}
    output = api.indexer_kl(
      *arguments[:7],
      scale=spec.scale,
      implementation=implementation,
      **selection,
    )
    return output.loss, output.kl_BT

  folder = inputs.specs_and_implementations('indexer_kl')
  if not is_selected:
    folder['specs'] = {
      name: spec
      for name, spec in folder['specs'].items()
      if not spec.sees_all_keys
    }
  return Op(
    name='indexer_kl_selected' if is_selected else 'indexer_kl_all',
    directions=(FORWARD, GRADIENTS),
    cost=functools.partial(costs.indexer_kl, is_selected=is_selected),
    make=make,
    call=call,
    compared=1,
    differentiable=(0, 1, 2),
    row_arguments=(0, 2, 3, 5, 6, 7),
    rows=lambda spec: spec.num_queries,
    reference_bytes=lambda spec: (
      4 * spec.batch * max(spec.num_heads, spec.index_heads) * spec.num_keys
    ),
    **folder,
  )


def arrays(spec, dtype, seed) -> list[jax.Array]:
  """q_index, k_index, w_index, q and k."""
  return inputs.normal(
    seed, dtype,
    (spec.batch, spec.num_queries, spec.index_heads, spec.index_dim),
    (spec.batch, spec.num_keys, spec.index_dim),
    (spec.batch, spec.num_queries, spec.index_heads),
    (spec.batch, spec.num_queries, spec.num_heads, spec.width),
    (spec.batch, spec.num_keys, spec.num_key_heads, spec.width),
  )  # fmt: skip
