"""Rows of pages, for attention over a pool of them.

Letters: B batch, T queries, K selected keys, N pages of a row.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int, Int32


def physical_indices(
  indices_BTK: Int[Array, 'B T K'], pages_BN: Int[Array, 'B N'], *, page: int
) -> Int32[Array, 'B T K']:
  """Which rows of a pool of pages the selected keys are.

  Attention over pages is attention over the pool as one long row of keys: with
  all queries as those of one batch entry, nothing is gathered beforehand.

  Example:
    >>> indices = physical_indices(
    ...   jnp.array([[[0, 5, -1]]]), jnp.array([[7, 2]]), page=4
    ... )
    >>> indices
    Array([[[28,  9, -1]]], dtype=int32)

  Args:
    indices_BTK: keys in the order of each row; -1 is none.
    pages_BN: pages of each row in order.
    page: keys of a page.

  Returns:
    Rows of the pool [P * page, ...]; -1 stays.

  Raises:
    ValueError: shapes that don't fit, or a page below 1.
  """
  if (indices_BTK.ndim, pages_BN.ndim) != (3, 2) or (
    indices_BTK.shape[0] != pages_BN.shape[0]
  ):
    raise ValueError(
      f'indices_BTK.shape={indices_BTK.shape} and pages_BN.shape='
      f'{pages_BN.shape} must be [B, T, K] and [B, N]'
    )
  if page < 1:
    raise ValueError(f'page={page} must be positive')
  position_BTK = jnp.maximum(indices_BTK, 0)
  number_BTK = jnp.take_along_axis(
    pages_BN[:, None], position_BTK // page, axis=2
  )
  row_BTK = number_BTK * page + position_BTK % page
  return jnp.where(indices_BTK < 0, -1, row_BTK).astype(jnp.int32)
