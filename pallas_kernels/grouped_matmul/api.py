"""Public signature of the grouped matrix product.

Letters: M rows sorted by expert, E experts (groups), D and F widths.
"""

from collections.abc import Sequence

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import pallas_mosaic_gpu, reference, xla

IMPLEMENTATIONS = {
  'mosaic_gpu': pallas_mosaic_gpu.grouped_matmul,
  'xla': xla.grouped_matmul,
  'reference': reference.grouped_matmul,
}


def grouped_matmul(
  x_MD: Float[Array, 'M D'],
  w_EDF: Float[Array, 'E D F'],
  group_sizes_E: Int[Array, ' E'],
  *,
  implementation: str | Sequence[str] | None = None,
) -> Float[Array, 'M F']:
  """Multiplies consecutive groups of rows, each by its own matrix.

  Row m belongs to the first expert e with m < sum(group_sizes[:e + 1]), and
  y[m] = x[m] @ w[e]. Rows past the last group give 0, receive a zero gradient
  and contribute to none, whatever they hold.

  Products accumulate in float32. Differentiable in `x_MD` and `w_EDF`.

  Args:
    x_MD: float32 or bfloat16 rows, sorted by expert.
    w_EDF: one matrix an expert, of x's type.
    group_sizes_E: int32, rows of each expert, none negative and in total at
      most M; zero is allowed. Data, so not checked.
    implementation: see `pallas_kernels.dispatch`.

  Returns:
    y_MF in x's type.

  Raises:
    ValueError: ranks or sizes that do not fit, an empty dimension, or two
      types of floats.

  Example:
    >>> x = jnp.ones((3, 2))
    >>> w = jnp.stack([jnp.eye(2), 2 * jnp.eye(2)])
    >>> grouped_matmul(x, w, jnp.array([2, 1]))[:, 0]
    Array([1., 1., 2.], dtype=float32)
  """
  if x_MD.ndim != 2 or w_EDF.ndim != 3 or group_sizes_E.ndim != 1:
    raise ValueError(
      f'x_MD.shape={x_MD.shape}, w_EDF.shape={w_EDF.shape}, '
      f'group_sizes_E.shape={group_sizes_E.shape} must have 2, 3 and 1 '
      'dimensions'
    )
  if x_MD.shape[1] != w_EDF.shape[1]:
    raise ValueError(
      f'x_MD.shape={x_MD.shape} and w_EDF.shape={w_EDF.shape} must share D'
    )
  if w_EDF.shape[0] != group_sizes_E.shape[0]:
    raise ValueError(
      f'w_EDF.shape={w_EDF.shape} and group_sizes_E.shape='
      f'{group_sizes_E.shape} must share E'
    )
  if not x_MD.size or not w_EDF.size:
    raise ValueError(
      f'x_MD.shape={x_MD.shape} and w_EDF.shape={w_EDF.shape} must not be empty'
    )
  if x_MD.dtype != w_EDF.dtype:
    raise ValueError(
      f'x_MD.dtype={x_MD.dtype} and w_EDF.dtype={w_EDF.dtype} must be equal'
    )
  return dispatch.call(
    'grouped_matmul',
    IMPLEMENTATIONS,
    implementation,
    x_MD,
    w_EDF,
    group_sizes_E,
  )
