"""Error of an op's outputs against its definition in float32.

Where the definition does not fit into memory, it is computed for some rows, or
for all of them in parts.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.benchmarks.costs import FORWARD
from pallas_kernels.benchmarks.op import Op

# A definition may take this much for its largest array.
REFERENCE_BYTES = 2**30


def error(
  op: Op,
  spec: Any,
  direction: str,
  arguments: tuple,
  outputs: Any,
  cotangent: jax.Array | None = None,
) -> float | None:
  """Relative norm of the error, the largest of the outputs that are compared.

  For selections the share of rows with another set. None where the definition
  does not fit: gradients of large shapes whose rows depend on each other.

  Args:
    op: what was computed.
    spec: its shape.
    direction: 'backward' and 'gradients' have the same outputs.
    arguments: of the forward pass.
    outputs: to be judged.
    cotangent: for gradients.
  """
  fitting = max(REFERENCE_BYTES // op.reference_bytes(spec), 1)
  rows = min(op.rows(spec), fitting)
  is_whole = rows == op.rows(spec)
  if direction == FORWARD:
    some = arguments if is_whole else op.last_rows(spec, arguments, rows)
    return _forward_error(op, spec, some, outputs, None if is_whole else rows)
  actual = tuple(jax.tree.leaves(outputs))
  if not is_whole and op.sample_gradients is not None:
    arguments, cotangent, actual = op.sample_gradients(
      arguments, cotangent, actual
    )
  elif not is_whole and not op.is_positional:
    desired = _gradients_in_parts(op, spec, arguments, cotangent, rows)
    return _largest(actual, desired)
  elif not is_whole:
    return None
  reference = jax.jit(op.gradients('reference', spec))
  _, desired = reference(*_float32(arguments), _float32(cotangent))
  return _largest(actual, desired)


def _forward_error(op, spec, arguments, outputs, rows) -> float:
  """Of all rows, or of so many that `arguments` are of."""
  reference = jax.jit(op.forward('reference', spec))
  desired = jax.tree.leaves(reference(*_float32(arguments)))
  actual = jax.tree.leaves(outputs)
  if op.compared is not None:
    actual, desired = ([x[op.compared]] for x in (actual, desired))
  if rows is not None:
    part = slice(-rows, None) if op.takes_last else slice(0, rows)
    actual = [x[(slice(None),) * op.row_axis + (part,)] for x in actual]
  if op.is_selection:
    a, d = (np.sort(np.asarray(x[0])) for x in (actual, desired))
    return float(np.mean(np.any(a != d, axis=-1)))
  return _largest(actual, desired)


def _gradients_in_parts(op, spec, arguments, cotangent, rows) -> list:
  """The definition's gradients, summed over parts of the queries."""
  queries = cotangent.shape[1]
  rows = next(n for n in range(rows, 0, -1) if not queries % n)
  gradients = op.gradients('reference', spec)

  @jax.jit
  def of_part(first, arguments, cotangent):
    some = tuple(
      lax.dynamic_slice_in_dim(x, first, rows, 1)
      if i in op.row_arguments
      else x
      for i, x in enumerate(arguments)
    )
    part = lax.dynamic_slice_in_dim(cotangent, first, rows, 1)
    return gradients(*_float32(some), _float32(part))[1]

  sums: list[Any] = [0.0 for _ in op.differentiable]
  parts: list[list[Any]] = [[] for _ in op.differentiable]
  for first in range(0, queries, rows):
    some = of_part(jnp.int32(first), arguments, cotangent)
    for n, (i, x) in enumerate(zip(op.differentiable, some, strict=True)):
      if i in op.row_arguments:
        parts[n].append(x)
      else:
        sums[n] += x
  return [
    jnp.concatenate(rows, axis=1) if rows else total
    for rows, total in zip(parts, sums, strict=True)
  ]


def _float32(tree: Any) -> Any:
  return jax.tree.map(
    lambda x: (
      x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.inexact) else x
    ),
    tree,
  )


def _largest(actual: Any, desired: Any) -> float:
  # NaN if there is one, unlike Python's max.
  return float(
    np.max([_relative(a, d) for a, d in zip(actual, desired, strict=True)])
  )


@jax.jit
def _norms(actual, desired):
  actual, desired = actual.astype(jnp.float32), desired.astype(jnp.float32)
  finite = jnp.isfinite(desired)
  actual, desired = (jnp.where(finite, x, 0.0) for x in (actual, desired))
  return jnp.linalg.norm((actual - desired).ravel()), jnp.linalg.norm(
    desired.ravel()
  )


def _relative(actual: jax.Array, desired: jax.Array) -> float:
  difference, norm = _norms(actual, desired)
  return float(difference / jnp.maximum(norm, 1e-30))
