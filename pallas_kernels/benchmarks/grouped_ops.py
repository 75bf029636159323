"""The grouped matrix product, as the benchmark measures it."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.benchmarks import costs, inputs
from pallas_kernels.benchmarks.costs import DIRECTIONS
from pallas_kernels.benchmarks.op import Op


def grouped_matmul() -> Op:
  api = inputs.module('grouped_matmul', 'api')

  def call(implementation, spec, x, w, sizes):
    del spec
    return api.grouped_matmul(x, w, sizes, implementation=implementation)

  return Op(
    name='grouped_matmul',
    directions=DIRECTIONS,
    cost=costs.grouped_matmul,
    make=_make,
    call=call,
    differentiable=(0, 1),
    sample=_first_rows,
    sample_gradients=_first_expert,
    rows=lambda spec: spec.num_rows,
    reference_bytes=lambda spec: 4 * spec.num_experts * spec.input_dim,
    takes_last=False,
    row_axis=0,
    **inputs.specs_and_implementations('grouped_matmul'),
  )


def _make(spec, dtype, seed):
  x, w = inputs.normal(
    seed, dtype,
    (spec.num_rows, spec.input_dim),
    (spec.num_experts, spec.input_dim, spec.output_dim),
  )  # fmt: skip
  if spec.has_equal_groups:
    sizes = np.full(spec.num_experts, spec.num_rows // spec.num_experts)
  else:
    even = np.full(spec.num_experts, 1 / spec.num_experts)
    sizes = np.random.default_rng(seed).multinomial(spec.num_rows, even)
  return x, w, jnp.asarray(sizes, jnp.int32)


def _first_rows(spec, arguments, rows):
  del spec
  x, w, sizes = arguments
  end = np.cumsum(np.asarray(sizes))
  start = end - np.asarray(sizes)
  experts = int(np.searchsorted(end, rows)) + 1
  first = np.clip(rows - start[:experts], 0, np.asarray(sizes)[:experts])
  return x[:rows], w[:experts], jnp.asarray(first, jnp.int32)


def _first_expert(arguments, cotangent, gradients):
  """All rows of the first expert that has some."""
  x, w, sizes = arguments
  expert = int(np.argmax(np.asarray(sizes) > 0))
  rows, one = slice(0, int(sizes[expert])), slice(expert, expert + 1)
  return (
    (x[rows], w[one], sizes[one]),
    cotangent[rows],
    (gradients[0][rows], gradients[1][one]),
  )
