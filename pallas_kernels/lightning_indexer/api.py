"""Public signature of the lightning indexer: shapes, errors, dispatch.

Letters: B batch, T query tokens, S key tokens, J indexer heads, I index head
dim.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import dispatch
from pallas_kernels.lightning_indexer import (
  pallas_mosaic_gpu,
  reference,
  xla,
)

# Best first. A device kernel is one file more, and one line here.
IMPLEMENTATIONS = {
  'mosaic_gpu': pallas_mosaic_gpu.lightning_indexer,
  'xla': xla.lightning_indexer,
  'reference': reference.lightning_indexer,
}


def lightning_indexer(
  q_index_BTJI: Float[Array, 'B T J I'],
  k_index_BSI: Float[Array, 'B S I'],
  w_index_BTJ: Float[Array, 'B T J'],
  *,
  key_start_BT: Int32[Array, 'B T'] | None = None,
  key_end_BT: Int32[Array, 'B T'] | None = None,
  quantized: bool = False,
  implementation: dispatch.Implementation = None,
) -> Float32[Array, 'B T S']:
  """Index scores of every query for every key (arXiv:2512.02556, Eq. 1).

  I[t, s] = sum_j w[t, j] ReLU(q[t, j] . k[s]), accumulated in float32.
  Differentiable in q, k and w.

  Example:
    >>> scores_BTS = lightning_indexer(q_BTJI, k_BSI, w_BTJ)
    >>> scores_BTS = lightning_indexer(
    ...   q_BTJI, k_BSI, w_BTJ, key_start_BT=start_BT, key_end_BT=end_BT
    ... )

  Args:
    q_index_BTJI: indexer queries, float32 or bfloat16.
    k_index_BSI: indexer keys, shared by the heads; dtype of the queries.
    w_index_BTJ: head weights, of any sign, the constant J^-1/2 I^-1/2 already
      in them; float32 or bfloat16.
    key_start_BT: int32, first valid key of each query.
    key_end_BT: int32, one past the last; start == end is a padding query.
      None for both: causal, aligned at the end (query t sees keys up to
      t + S - T).
    quantized: q and k rounded to float8_e4m3fn, each vector with a float32
      scale max|x| / 448 (DeepSeek's fp8 indexer). Gradients are those at the
      rounded values, passed on as if nothing had been rounded.
    implementation: see `pallas_kernels.dispatch`.

  Returns:
    Scores [B, T, S], float32: -inf outside the range, never -0.0.

  Raises:
    ValueError: shapes or dtypes don't fit together.
  """
  check_arguments(q_index_BTJI, k_index_BSI, w_index_BTJ)
  return dispatch.call(
    'lightning_indexer',
    IMPLEMENTATIONS,
    implementation,
    q_index_BTJI,
    k_index_BSI,
    w_index_BTJ,
    key_start_BT=key_start_BT,
    key_end_BT=key_end_BT,
    quantized=quantized,
  )


def check_arguments(
  q_index_BTJI: Array, k_index_BSI: Array, w_index_BTJ: Array
) -> None:
  """Refuses shapes and dtypes that don't fit, naming the argument."""
  for name, value, ndim in (
    ('q_index_BTJI', q_index_BTJI, 4),
    ('k_index_BSI', k_index_BSI, 3),
    ('w_index_BTJ', w_index_BTJ, 3),
  ):
    if value.ndim != ndim:
      raise ValueError(
        f'{name} has shape {value.shape}; expected {ndim} dimensions'
      )
    if value.dtype not in (jnp.float32, jnp.bfloat16):
      raise ValueError(
        f'{name} has dtype {value.dtype}; expected float32 or bfloat16'
      )
  batch, _, _, dim = q_index_BTJI.shape
  if (k_index_BSI.shape[0], k_index_BSI.shape[2]) != (batch, dim):
    raise ValueError(
      f'k_index_BSI has shape {k_index_BSI.shape}; expected '
      f'[{batch}, S, {dim}] as q_index_BTJI is {q_index_BTJI.shape}'
    )
  if w_index_BTJ.shape != q_index_BTJI.shape[:3]:
    raise ValueError(
      f'w_index_BTJ has shape {w_index_BTJ.shape}; expected '
      f'{q_index_BTJI.shape[:3]}'
    )
  if q_index_BTJI.dtype != k_index_BSI.dtype:
    raise ValueError(
      f'k_index_BSI has dtype {k_index_BSI.dtype}; expected '
      f'{q_index_BTJI.dtype}, the dtype of q_index_BTJI'
    )
