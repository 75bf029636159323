"""Lightning indexer on Hopper GPUs, in Pallas Mosaic GPU.

Letters: B batch, T query tokens, t a chunk of them, S key tokens, J indexer
heads, I index head dim.

`score_chunk` and `chunk_gradients` (see `mosaic_chunks`) are the kernels alone.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import mosaic, windows
from pallas_kernels.lightning_indexer import quantization
from pallas_kernels.lightning_indexer.mosaic_chunks import (
  check_supported,
  chunk_gradients,
  score_chunk,
  score_stored,
)
from pallas_kernels.lightning_indexer.stored_keys import StoredKeys


@functools.partial(jax.jit, static_argnames=('quantized', 'scale_format'))
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
) -> Float32[Array, 'B T S']:
  """See `pallas_kernels.lightning_indexer`."""
  keys = StoredKeys(k_index_BSI, k_scale_BS, pages_BN)
  if k_scale_BS is None:
    check_supported(q_index_BTJI, k_index_BSI, out_dtype=jnp.float32)
  mosaic.require(mosaic.Target.DEVICE)
  start_BT, end_BT = windows.key_ranges(
    key_start_BT,
    key_end_BT,
    batch=q_index_BTJI.shape[0],
    num_queries=q_index_BTJI.shape[1],
    num_keys=keys.num_keys,
  )
  with jax.named_scope('lightning_indexer'):
    if not keys.is_plain:
      return score_stored(
        q_index_BTJI,
        keys,
        w_index_BTJ,
        start_BT,
        end_BT,
        scale_format=scale_format,
      )
    return differentiable_scores(
      q_index_BTJI,
      k_index_BSI,
      w_index_BTJ,
      start_BT,
      end_BT,
      quantized,
      mosaic.Target.DEVICE,
      scale_format == 'ue8m0',
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def differentiable_scores(
  q_BTJI: Array,
  k_BSI: Array,
  w_BTJ: Array,
  start_BT: Array,
  end_BT: Array,
  quantized: bool,
  target: mosaic.Target,
  power_of_two: bool = False,
) -> Array:
  """`lightning_indexer` for a target, with every argument given."""
  k_scale_BS = None
  if quantized:
    quantize = functools.partial(
      quantization.quantize, power_of_two=power_of_two
    )
    q_BTJI, q_scale_BTJ = quantize(q_BTJI)
    k_BSI, k_scale_BS = quantize(k_BSI)
    w_BTJ = w_BTJ.astype(jnp.float32) * q_scale_BTJ
  return score_chunk(
    q_BTJI,
    k_BSI,
    w_BTJ,
    start_BT,
    end_BT,
    k_scale_BS=k_scale_BS,
    target=target,
  )


def _scores_fwd(
  q_BTJI: Array,
  k_BSI: Array,
  w_BTJ: Array,
  start_BT: Array,
  end_BT: Array,
  quantized: bool,
  target: mosaic.Target,
  power_of_two: bool,
) -> tuple[Array, tuple[Array, ...]]:
  residuals = (q_BTJI, k_BSI, w_BTJ, start_BT, end_BT)
  scores_BTS = differentiable_scores(
    *residuals, quantized, target, power_of_two
  )
  return scores_BTS, residuals


def _scores_bwd(
  quantized: bool,
  target: mosaic.Target,
  power_of_two: bool,
  residuals: tuple[Array, ...],
  g_BTS: Array,
) -> tuple[Array, Array, Array, np.ndarray, np.ndarray]:
  q_BTJI, k_BSI, w_BTJ, start_BT, end_BT = residuals
  gradients = chunk_gradients
  if quantized:
    gradients = functools.partial(
      _quantized_gradients, power_of_two=power_of_two
    )
  dq_BTJI, dk_BSI, dw_BTJ = gradients(
    q_BTJI, k_BSI, w_BTJ, g_BTS, start_BT, end_BT, target=target
  )
  # Integer arguments have tangents of dtype float0.
  none = np.zeros(start_BT.shape, jax.dtypes.float0)
  return (
    dq_BTJI.astype(q_BTJI.dtype),
    dk_BSI.astype(k_BSI.dtype),
    dw_BTJ.astype(w_BTJ.dtype),
    none,
    none,
  )


differentiable_scores.defvjp(_scores_fwd, _scores_bwd)


def _quantized_gradients(
  q_BtJI: Array,
  k_BSI: Array,
  w_BtJ: Array,
  g_BtS: Array,
  key_start_Bt: Array,
  key_end_Bt: Array,
  *,
  power_of_two: bool,
  target: mosaic.Target,
) -> tuple[Array, Array, Array]:
  """`chunk_gradients` at the rounded values, all of them float32."""
  dtype = q_BtJI.dtype
  # float8 values are exact in bfloat16, so that no product changes its sign.
  rounded = functools.partial(quantization.rounded, power_of_two=power_of_two)
  q_BtJI, q_scale_BtJ = rounded(q_BtJI)
  k_BSI, k_scale_BS = rounded(k_BSI)
  dq_BtJI, dk_BSI, dw_BtJ = chunk_gradients(
    q_BtJI.astype(dtype),
    k_BSI.astype(dtype),
    w_BtJ.astype(jnp.float32) * q_scale_BtJ,
    g_BtS * k_scale_BS[:, None],
    key_start_Bt,
    key_end_Bt,
    target=target,
  )
  # With a scale once too often each, or once too little.
  return (
    dq_BtJI.astype(jnp.float32) / q_scale_BtJ[..., None],
    dk_BSI / k_scale_BS[..., None],
    dw_BtJ * q_scale_BtJ,
  )
