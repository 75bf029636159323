"""Blocked grouped matrix product in plain XLA, with its own gradients.

Each block of rows belongs to one expert, so the work is that of ceil(M / b)
+ E blocks at most and does not grow with the number of experts as a dense
product over all of them (or XLA's expansion of `ragged_dot`) does.

Two formulations of the same product: a loop that visits exactly the blocks
there are (`xla_loop`, on CPU, where a step costs microseconds), and one
batched product over the blocks there could be (`xla_batched`, elsewhere,
where a step of a data-dependent loop costs a round trip to the host). Which
one is decided by the platform that the program is lowered for.
"""

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul import config, xla_batched, xla_loop


@jax.custom_vjp
def grouped_matmul(
  x_MD: Float[Array, 'M D'],
  w_EDF: Float[Array, 'E D F'],
  group_sizes_E: Int[Array, ' E'],
) -> Float[Array, 'M F']:
  """See `api.grouped_matmul`."""
  return _product(x_MD, w_EDF, group_sizes_E, transpose_w=False)


def _forward(x_MD: Array, w_EDF: Array, group_sizes_E: Array):
  y_MF = _product(x_MD, w_EDF, group_sizes_E, transpose_w=False)
  return y_MF, (x_MD, w_EDF, group_sizes_E)


def _backward(residuals, dy_MF: Array):
  x_MD, w_EDF, group_sizes_E = residuals
  dx_MD = _product(dy_MF, w_EDF, group_sizes_E, transpose_w=True)
  dw_EDF = _weight_gradient(x_MD, dy_MF, group_sizes_E)
  return dx_MD, dw_EDF.astype(w_EDF.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def _product(
  x_MD: Array, w_EDF: Array, group_sizes_E: Array, *, transpose_w: bool
) -> Array:
  """x[m] @ w[e(m)], or x[m] @ w[e(m)].T, on the platform's formulation."""
  sizes = x_MD.shape[0], w_EDF.shape[0]

  def loop(x, w, group_sizes):
    block_rows = config.loop_config(*sizes).block_rows
    return xla_loop.product(
      x, w, group_sizes, block_rows=block_rows, transpose_w=transpose_w
    )

  def batched(x, w, group_sizes):
    block_rows = config.batched_config(*sizes).block_rows
    return xla_batched.product(
      x, w, group_sizes, block_rows=block_rows, transpose_w=transpose_w
    )

  return jax.lax.platform_dependent(
    x_MD, w_EDF, group_sizes_E, cpu=loop, default=batched
  )


def _weight_gradient(x_MD: Array, dy_MF: Array, group_sizes_E: Array) -> Array:
  """Sum over a group of x[m]^T dy[m], float32 [E, D, F]."""
  sizes = x_MD.shape[0], group_sizes_E.shape[0]

  def loop(x, dy, group_sizes):
    block_rows = config.loop_config(*sizes).block_rows
    return xla_loop.weight_gradient(x, dy, group_sizes, block_rows=block_rows)

  def batched(x, dy, group_sizes):
    block_rows = config.batched_config(*sizes).block_rows
    return xla_batched.weight_gradient(
      x, dy, group_sizes, block_rows=block_rows
    )

  return jax.lax.platform_dependent(
    x_MD, dy_MF, group_sizes_E, cpu=loop, default=batched
  )
