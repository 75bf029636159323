"""Public signature of the lightning indexer: shapes, errors, dispatch.

Letters: B batch, T query tokens, S key tokens, J indexer heads, I index head
dim, P pages of a pool, N pages of a row.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import dispatch
from pallas_kernels.lightning_indexer import (
  pallas_mosaic_gpu,
  quantization,
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
  k_index_BSI: Float[Array, '_B _S I'],
  w_index_BTJ: Float[Array, 'B T J'],
  *,
  key_start_BT: Int32[Array, 'B T'] | None = None,
  key_end_BT: Int32[Array, 'B T'] | None = None,
  quantized: bool = False,
  k_scale_BS: Float32[Array, '_B _S'] | None = None,
  pages_BN: Int32[Array, 'B N'] | None = None,
  scale_format: str = 'float32',
  implementation: dispatch.Implementation = None,
) -> Float32[Array, 'B T S']:
  """Index scores of every query for every key (arXiv:2512.02556, Eq. 1).

  I[t, s] = sum_j w[t, j] ReLU(q[t, j] . k[s]), accumulated in float32.
  Differentiable in q, k and w, unless keys are given as a cache holds them:
  quantised already, or in pages.

  Example:
    >>> scores_BTS = lightning_indexer(q_BTJI, k_BSI, w_BTJ)
    >>> scores_BTS = lightning_indexer(
    ...   q_BTJI, k_BSI, w_BTJ, key_start_BT=start_BT, key_end_BT=end_BT
    ... )
    >>> values_BSI, scale_BS = quantize_index_keys(k_BSI)
    >>> scores_BTS = lightning_indexer(
    ...   q_BTJI, values_BSI, w_BTJ, k_scale_BS=scale_BS
    ... )

  Args:
    q_index_BTJI: indexer queries, float32 or bfloat16.
    k_index_BSI: indexer keys, shared by the heads; dtype of the queries, or
      float8_e4m3fn. With `pages_BN` a pool [P, page, I].
    w_index_BTJ: head weights, of any sign, the constant J^-1/2 I^-1/2 already
      in them; float32 or bfloat16.
    key_start_BT: int32, first valid key of each query.
    key_end_BT: int32, one past the last; start == end is a padding query.
      None for both: causal, aligned at the end (query t sees keys up to
      t + S - T).
    quantized: q and k rounded to float8_e4m3fn, each vector with a float32
      scale (DeepSeek's fp8 indexer). Gradients are those at the rounded
      values, passed on as if nothing had been rounded.
    k_scale_BS: float32 scales of float8_e4m3fn keys, as `quantize_index_keys`
      gives them; the queries are quantised as with `quantized`. With
      `pages_BN` [P, page].
    pages_BN: int32, pages of each row in order: key s is row s % page of page
      pages_BN[b, s // page], and S = N * page. What it names for pages that
      no query of the row sees is not used.
    scale_format: of the vectors quantised here, 'float32' for max|x| / 448 or
      'ue8m0' for powers of two.
    implementation: see `pallas_kernels.dispatch`.

  Returns:
    Scores [B, T, S], float32: -inf outside the range, never -0.0.

  Raises:
    ValueError: shapes or dtypes don't fit together.
    NotImplementedError: quantised or paged keys, and it is differentiated.
  """
  check_arguments(
    q_index_BTJI,
    k_index_BSI,
    w_index_BTJ,
    k_scale_BS=k_scale_BS,
    pages_BN=pages_BN,
    scale_format=scale_format,
  )
  stored = k_scale_BS is not None or pages_BN is not None
  if quantized and stored:
    raise ValueError(
      'quantized=True with k_scale_BS or pages_BN; expected it with keys '
      '[B, S, I] that are to be quantised here'
    )
  if stored:
    q_index_BTJI, w_index_BTJ = _without_gradient(q_index_BTJI, w_index_BTJ)
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
    k_scale_BS=k_scale_BS,
    pages_BN=pages_BN,
    scale_format=scale_format,
  )


@jax.custom_jvp
def _without_gradient(q_BTJI, w_BTJ):
  return q_BTJI, w_BTJ


@_without_gradient.defjvp
def _(primals, tangents):
  raise NotImplementedError(
    'lightning_indexer has no gradients for quantised or paged keys; use '
    'quantized=True with keys [B, S, I]'
  )


def check_arguments(
  q_index_BTJI: Array,
  k_index_BSI: Array,
  w_index_BTJ: Array,
  *,
  k_scale_BS: Array | None = None,
  pages_BN: Array | None = None,
  scale_format: str = 'float32',
) -> None:
  """Refuses shapes and dtypes that don't fit, naming the argument."""
  quantization.check_scale_format(scale_format)
  for name, value, ndim in (
    ('q_index_BTJI', q_index_BTJI, 4),
    ('k_index_BSI', k_index_BSI, 3),
    ('w_index_BTJ', w_index_BTJ, 3),
  ):
    if value.ndim != ndim:
      raise ValueError(
        f'{name} has shape {value.shape}; expected {ndim} dimensions'
      )
    if value.dtype not in (jnp.float32, jnp.bfloat16) and not (
      name == 'k_index_BSI' and k_scale_BS is not None
    ):
      raise ValueError(
        f'{name} has dtype {value.dtype}; expected float32 or bfloat16'
      )
  batch, _, _, dim = q_index_BTJI.shape
  rows = k_index_BSI.shape[0] if pages_BN is not None else batch
  if (k_index_BSI.shape[0], k_index_BSI.shape[2]) != (rows, dim):
    raise ValueError(
      f'k_index_BSI has shape {k_index_BSI.shape}; expected '
      f'[{rows}, S, {dim}] as q_index_BTJI is {q_index_BTJI.shape}'
    )
  if w_index_BTJ.shape != q_index_BTJI.shape[:3]:
    raise ValueError(
      f'w_index_BTJ has shape {w_index_BTJ.shape}; expected '
      f'{q_index_BTJI.shape[:3]}'
    )
  dtype = q_index_BTJI.dtype if k_scale_BS is None else jnp.float8_e4m3fn
  if k_index_BSI.dtype != dtype:
    reason = (
      'the dtype of q_index_BTJI' if k_scale_BS is None else 'with k_scale_BS'
    )
    raise ValueError(
      f'k_index_BSI has dtype {k_index_BSI.dtype}; expected {dtype}, {reason}'
    )
  if k_scale_BS is not None and (
    k_scale_BS.shape != k_index_BSI.shape[:2] or k_scale_BS.dtype != jnp.float32
  ):
    raise ValueError(
      f'k_scale_BS is {k_scale_BS.dtype}{list(k_scale_BS.shape)}; expected '
      f'float32{list(k_index_BSI.shape[:2])}, one for each key'
    )
  if pages_BN is not None and (
    pages_BN.ndim != 2
    or pages_BN.shape[0] != batch
    or pages_BN.dtype != jnp.int32
  ):
    raise ValueError(
      f'pages_BN is {pages_BN.dtype}{list(pages_BN.shape)}; expected '
      f'int32[{batch}, N] as q_index_BTJI is {q_index_BTJI.shape}'
    )
