"""Experts on rows that came from anywhere, a bounded number at a time.

A row brings up to A of this device's experts. The (row, expert) pairs are
sorted by expert and computed Q at a time, so that memory is bounded by Q
however many of the pairs are real; a chunk may begin and end inside an expert.
Chunks are as many as there are real pairs, which is known at run time only.

Nothing here is differentiable by itself (a loop of unknown length is not): the
gradients are a function of their own, which computes the experts again.

Letters: R rows, A choices a row, M = R A pairs, Q pairs of a chunk, D width, E
experts of this device.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv32_jax.functional import expert_dispatch, expert_slots, precision

Experts = Callable[[Array, Any, Array], Array]
"""(x_QD, weights, group_sizes_E) -> y_QD on rows sorted by expert; rows past
the last group give 0 and get a zero gradient. Leaves of weights are [E, ...].
"""


def apply(
  experts: Experts,
  weights: Any,
  x_RD: Float[Array, 'R D'],
  choice_RA: Int[Array, 'R A'],
  gate_RA: Float[Array, 'R A'],
  *,
  chunk: int,
) -> Float[Array, 'R D']:
  """The gated sum over each row's experts.

  Args:
    experts: computes sorted rows.
    weights: of the experts.
    x_RD: rows.
    choice_RA: experts of each row, E for none.
    gate_RA: weights of the experts in the sum.
    chunk: Q.

  Returns:
    At least float32; 0 for rows without experts.
  """
  chunk = min(chunk, choice_RA.size)
  order = _sort(weights, choice_RA)
  y_RD = jnp.zeros(x_RD.shape, precision.accumulator(x_RD.dtype))

  def one_chunk(number, y_RD):
    part = _take(order, number, chunk)
    x_QD = _rows(x_RD, part.row_Q)
    y_QD = experts(x_QD, weights, part.group_sizes_E)
    return y_RD + expert_slots.gather_sum(y_QD, part.place_RA, gate_RA)

  return _for_each(order, chunk, one_chunk, y_RD)


def gradients(
  experts: Experts,
  weights: Any,
  x_RD: Float[Array, 'R D'],
  choice_RA: Int[Array, 'R A'],
  gate_RA: Float[Array, 'R A'],
  dy_RD: Float[Array, 'R D'],
  dweights: Any,
  *,
  chunk: int,
) -> tuple[Float[Array, 'R D'], Float[Array, 'R A'], Any]:
  """Gradients of `apply`.

  Args:
    experts: differentiable in rows and weights.
    weights: of the experts.
    x_RD: rows.
    choice_RA: experts of each row, E for none.
    gate_RA: weights of the experts in the sum.
    dy_RD: cotangent of the result; of a row without experts, anything.
    dweights: what the gradients of the weights are added to.
    chunk: Q.

  Returns:
    dx and dgate, 0 for rows and choices without experts, and dweights; all at
    least float32.
  """
  chunk = min(chunk, choice_RA.size)
  order = _sort(weights, choice_RA)
  wide = precision.accumulator(x_RD.dtype)

  def one_chunk(number, sums):
    dx_RD, dgate_RA, dweights = sums
    part = _take(order, number, chunk)
    x_QD = _rows(x_RD, part.row_Q)
    y_QD, vjp = jax.vjp(
      lambda x, w: experts(x, w, part.group_sizes_E), x_QD, weights
    )
    dy_QD = _rows(dy_RD, part.row_Q).astype(wide)
    gate_Q = _rows(gate_RA.reshape(-1), part.pair_Q).astype(wide)
    dgate_Q = jnp.sum(y_QD.astype(wide) * dy_QD, axis=-1)
    dx_QD, dw = vjp((gate_Q[:, None] * dy_QD).astype(y_QD.dtype))
    place_RA = part.place_RA
    dgate_here_RA = jnp.where(
      place_RA >= 0, _rows(dgate_Q, jnp.maximum(place_RA, 0)), 0
    )
    return (
      dx_RD + expert_slots.gather_sum(dx_QD, place_RA),
      dgate_RA + dgate_here_RA,
      jax.tree.map(
        lambda total, d: total + d.astype(total.dtype), dweights, dw
      ),
    )

  sums = (
    jnp.zeros(x_RD.shape, wide),
    jnp.zeros(gate_RA.shape, wide),
    dweights,
  )
  return _for_each(order, chunk, one_chunk, sums)


def zeros_like(weights: Any) -> Any:
  """What `gradients` adds to first: 0, at least in float32."""
  return jax.tree.map(
    lambda w: jnp.zeros(w.shape, precision.accumulator(w.dtype)), weights
  )


class _Chunk(NamedTuple):
  """Q pairs, sorted by expert.

  Attributes:
    pair_Q: the pairs; any past the last one.
    row_Q: their rows.
    place_RA: where a pair is in this chunk, -1 if elsewhere.
    group_sizes_E: pairs of each expert in this chunk.
  """

  pair_Q: Array
  row_Q: Array
  place_RA: Array
  group_sizes_E: Array


def _sort(weights: Any, choice_RA: Array) -> expert_dispatch.ExpertOrder:
  num_experts = jax.tree.leaves(weights)[0].shape[0]
  return expert_dispatch.sort_by_expert(choice_RA, num_experts=num_experts)


def _take(
  order: expert_dispatch.ExpertOrder, number: int | Array, chunk: int
) -> _Chunk:
  """Pairs number * Q to (number + 1) * Q of the sorted ones."""
  start = jnp.asarray(number * chunk, jnp.int32)
  # A slice past the end would be moved to the left.
  pair_M = jnp.pad(order.pair_M, (0, -order.pair_M.shape[0] % chunk))
  pair_Q = lax.dynamic_slice(pair_M, (start,), (chunk,))
  end_E = jnp.cumsum(order.group_sizes_E, dtype=jnp.int32)
  inside_E, before_E = (
    jnp.clip(bound_E - start, 0, chunk)
    for bound_E in (end_E, end_E - order.group_sizes_E)
  )
  place_RA = order.row_NA - start
  is_here_RA = (place_RA >= 0) & (
    place_RA < jnp.minimum(end_E[-1] - start, chunk)
  )
  return _Chunk(
    pair_Q=pair_Q,
    row_Q=pair_Q // order.row_NA.shape[1],
    place_RA=jnp.where(is_here_RA, place_RA, -1),
    group_sizes_E=inside_E - before_E,
  )


def _for_each(
  order: expert_dispatch.ExpertOrder, chunk: int, one_chunk: Any, sums: Any
) -> Any:
  """All chunks that hold real pairs, one after the other."""
  if order.pair_M.shape[0] <= chunk:
    return one_chunk(0, sums)
  num_pairs = jnp.sum(order.group_sizes_E, dtype=jnp.int32)
  num_chunks = (num_pairs + chunk - 1) // chunk
  return lax.fori_loop(0, num_chunks, one_chunk, sums)


def _rows(x: Array, index: Array) -> Array:
  return x.at[index].get(mode='promise_in_bounds')
