"""Moving tokens to their experts and back, on one device.

Letters: N tokens, A experts a token, M = N A (token, expert) pairs, E experts,
D width.

Every pair is kept (DeepSeek-V3 drops no token). Sorting is a permutation, so
both directions and both gradients are gathers: where autodiff would turn a
gather into a scatter-add, the inverse permutation says where to read instead.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv32_jax.functional import precision


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertOrder:
  """The pairs of all tokens, sorted by expert; stable in the token.

  Pair n * A + a is the a-th expert of token n.

  Attributes:
    pair_M: int32, the pair at each sorted row.
    row_NA: int32, the sorted row of each pair: the inverse of `pair_M`.
    group_sizes_E: int32, rows of each expert. Rows past their sum belong to
      no expert.
  """

  # Any, as jax rebuilds pytrees with shapes, specs or stacked arrays inside.
  pair_M: Any
  row_NA: Any
  group_sizes_E: Any


def sort_by_expert(
  expert_index_NA: Int[Array, 'N A'], *, num_experts: int
) -> ExpertOrder:
  """Sorts (token, expert) pairs by expert.

  Args:
    expert_index_NA: experts of each token, in 0..E-1; E for a pair that does
      not take part: it comes last, and no expert spends time on it.
    num_experts: E.
  """
  expert_M = expert_index_NA.astype(jnp.int32).reshape(-1)
  pair_M = jnp.argsort(expert_M, stable=True).astype(jnp.int32)
  row_M = jnp.zeros_like(pair_M)
  row_M = row_M.at[pair_M].set(
    jnp.arange(pair_M.shape[0], dtype=jnp.int32), unique_indices=True
  )
  expert_E = jnp.arange(num_experts, dtype=jnp.int32)
  group_sizes_E = jnp.sum(
    expert_M[:, None] == expert_E[None, :], axis=0, dtype=jnp.int32
  )
  return ExpertOrder(
    pair_M=pair_M,
    row_NA=row_M.reshape(expert_index_NA.shape),
    group_sizes_E=group_sizes_E,
  )


def permute(
  x_ND: Float[Array, 'N D'], order: ExpertOrder
) -> Float[Array, 'M D']:
  """Copies every token to the rows of its experts.

  Args:
    x_ND: token vectors.
    order: from `sort_by_expert`.

  Returns:
    Sorted rows, in x's type. The gradient sums the rows of a token in
    float32.
  """
  return _permute(x_ND, order.pair_M, order.row_NA)


def combine(
  y_MD: Float[Array, 'M D'],
  gate_NA: Float[Array, 'N A'],
  order: ExpertOrder,
) -> Float[Array, 'N D']:
  """Sums the experts' outputs of every token, weighted by their gates.

  Args:
    y_MD: outputs of the sorted rows; 0 in rows of no expert.
    gate_NA: weights of the experts.
    order: from `sort_by_expert`.

  Returns:
    At least float32, whatever the inputs: the shared experts' output is added
    before the one cast (a float32 island). Differentiable in `y_MD` and
    `gate_NA`.
  """
  return _combine(y_MD, gate_NA, order.pair_M, order.row_NA)


def _rows(y_MD: Array, row_N: Array) -> Array:
  """Gathers rows; positions come from a permutation, so all are in bounds."""
  return y_MD.at[row_N].get(mode='promise_in_bounds')


@jax.custom_vjp
def _permute(x_ND: Array, pair_M: Array, row_NA: Array) -> Array:
  return _rows(x_ND, pair_M // row_NA.shape[1])


def _permute_forward(x_ND: Array, pair_M: Array, row_NA: Array):
  return _permute(x_ND, pair_M, row_NA), row_NA


def _permute_backward(row_NA: Array, dx_MD: Array):
  # A terms in a loop: one fused pass, where a gather of [N, A, D] would be
  # held whole.
  wide = precision.accumulator(dx_MD.dtype)
  dx_ND = _rows(dx_MD, row_NA[:, 0]).astype(wide)
  for a in range(1, row_NA.shape[1]):
    dx_ND += _rows(dx_MD, row_NA[:, a]).astype(wide)
  return dx_ND.astype(dx_MD.dtype), None, None


_permute.defvjp(_permute_forward, _permute_backward)


@jax.custom_vjp
def _combine(
  y_MD: Array, gate_NA: Array, pair_M: Array, row_NA: Array
) -> Array:
  wide = precision.accumulator(y_MD.dtype)
  gate_NA = gate_NA.astype(wide)
  out_ND = _rows(y_MD, row_NA[:, 0]).astype(wide) * gate_NA[:, :1]
  for a in range(1, row_NA.shape[1]):
    y_ND = _rows(y_MD, row_NA[:, a]).astype(wide)
    out_ND += y_ND * gate_NA[:, a : a + 1]
  return out_ND


def _combine_forward(y_MD: Array, gate_NA: Array, pair_M: Array, row_NA: Array):
  out_ND = _combine(y_MD, gate_NA, pair_M, row_NA)
  return out_ND, (y_MD, gate_NA, pair_M, row_NA)


def _combine_backward(residuals, dout_ND: Array):
  y_MD, gate_NA, pair_M, row_NA = residuals
  num_choices = row_NA.shape[1]
  wide = precision.accumulator(y_MD.dtype)
  gate_M = _rows(gate_NA.reshape(-1), pair_M).astype(wide)
  dy_MD = _rows(dout_ND, pair_M // num_choices) * gate_M[:, None]
  dgate_NA = jnp.stack(
    [
      jnp.sum(_rows(y_MD, row_NA[:, a]).astype(wide) * dout_ND, axis=-1)
      for a in range(num_choices)
    ],
    axis=-1,
  )
  return (
    dy_MD.astype(y_MD.dtype),
    dgate_NA.astype(gate_NA.dtype),
    None,
    None,
  )


_combine.defvjp(_combine_forward, _combine_backward)
