"""The indexer's Hopper kernels over a chunk of queries; not differentiable.

For callers that walk over chunks of queries, so that [T, S] is never held
(`indexed_topk`, the indexer's losses), and for the op itself, whose chunk is
all of them.

Letters: B batch, t the query tokens of a chunk, S key tokens, J indexer heads,
I index head dim, R rows (heads of queries), N pages of a row of the batch.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import mosaic
from pallas_kernels.lightning_indexer import config, quantization
from pallas_kernels.lightning_indexer.stored_keys import StoredKeys

HEADS = (16, 32, 64)
DIMS = (64, 128)


def score_chunk(
  q_BtJI: Float[Array, 'B t J I'],
  k_BSI: Float[Array, '_B _S I'],
  w_BtJ: Float[Array, 'B t J'],
  key_start_Bt: Int32[Array, 'B t'],
  key_end_Bt: Int32[Array, 'B t'],
  *,
  k_scale_BS: Float32[Array, '_B _S'] | None = None,
  pages_BN: Int32[Array, 'B N'] | None = None,
  out_dtype: Any = jnp.float32,
  fill: bool = True,
  sizes: config.MosaicConfig | None = None,
  target: mosaic.Target = mosaic.Target.DEVICE,
) -> Float[Array, 'B t S']:
  """Index scores of some queries; not differentiable.

  Args:
    q_BtJI: bfloat16, or float8_e4m3fn values whose scales are in w.
    k_BSI: likewise; with `pages_BN` a pool [P, page, I].
    w_BtJ: float32 or bfloat16; for fp8, times the scale of q's vectors.
    key_start_Bt: first valid key of each query; any int32, clipped to 0 .. S.
    key_end_Bt: one past the last.
    k_scale_BS: scale of each key: fp8 only, and required there; with
      `pages_BN` [P, page].
    pages_BN: pages of each row in order; a page is a multiple of 64 keys.
    out_dtype: float32 or bfloat16.
    fill: write -inf to tiles that no query of a block sees; else what is there
      is anything, NaN too (for a selection that reads the ranges only).
    sizes: None for those of `config`.
    target: where the kernel is to run.

  Returns:
    Scores in `out_dtype`, -inf outside the ranges, never -0.0. With `fill`
    every element is written. Tiles of 64 keys that no query of a block of 512 /
    J sees cost a write (without `fill` nothing) and no arithmetic.

  Raises:
    NotImplementedError: shape, dtype or device isn't supported.
  """
  check_supported(q_BtJI, k_BSI, out_dtype=out_dtype)
  mosaic.require(target)
  from pallas_kernels.lightning_indexer import mosaic_forward
  from pallas_kernels.lightning_indexer import mosaic_plan as plan

  batch, num_queries, heads, dim = q_BtJI.shape
  num_keys, page = k_BSI.shape[1], 0
  if pages_BN is not None:
    page = k_BSI.shape[1]
    num_keys = page * pages_BN.shape[1]
    if page % plan.ptx.KEYS:
      raise NotImplementedError(
        f'pages of {page} keys; the kernel supports multiples of '
        f'{plan.ptx.KEYS}'
      )
    # What is named for positions outside every range may be anything.
    pages_BN = jnp.clip(pages_BN, 0, len(k_BSI) - 1)
  fp8 = q_BtJI.dtype == jnp.float8_e4m3fn
  if fp8 != (k_scale_BS is not None):
    raise ValueError(
      f'k_scale_BS is {"missing" if fp8 else "given"}; expected it with '
      f'float8_e4m3fn queries only, and q_BtJI has dtype {q_BtJI.dtype}'
    )
  if sizes is None:
    sizes = config.mosaic_config(
      num_queries=num_queries,
      heads=heads,
      row_bytes=dim * q_BtJI.dtype.itemsize,
    )
  shape = plan.Shape(
    batch=batch,
    num_queries=num_queries,
    num_keys=num_keys,
    heads=heads,
    dim=dim,
    fp8=fp8,
    out_dtype=out_dtype,
    groups=sizes.groups,
    slabs=sizes.slabs,
    stages=sizes.stages,
    unroll=sizes.unroll,
    blocks_per_multiprocessor=sizes.blocks_per_multiprocessor,
    fills=fill,
    page=page,
  )
  # The kernel copies whole blocks of queries and whole tiles of keys.
  missing_queries = -num_queries % shape.query_block
  missing_keys = shape.key_tiles * plan.ptx.KEYS - num_keys
  q_BtJI = _pad(q_BtJI, missing_queries)
  w_BtJ = _pad(w_BtJ.astype(jnp.float32), missing_queries)
  if k_scale_BS is not None:
    k_scale_BS = _pad(k_scale_BS, missing_keys)
  return mosaic_forward.scores(
    q_BtJI.reshape(batch, -1, dim),
    _pad(k_BSI, missing_keys),
    w_BtJ.reshape(batch, -1),
    k_scale_BS,
    jnp.clip(key_start_Bt, 0, num_keys),
    jnp.clip(key_end_Bt, 0, num_keys),
    pages_BN,
    shape=shape,
    target=target,
  )


def score_stored(
  q_BtJI: Float[Array, 'B t J I'],
  keys: StoredKeys,
  w_BtJ: Float[Array, 'B t J'],
  key_start_Bt: Int32[Array, 'B t'],
  key_end_Bt: Int32[Array, 'B t'],
  *,
  scale_format: str = 'float32',
  fill: bool = True,
  target: mosaic.Target = mosaic.Target.DEVICE,
) -> Float32[Array, 'B t S']:
  """`score_chunk` of keys as they are stored; not differentiable.

  Args:
    q_BtJI: float32 or bfloat16; quantised here if the keys are.
    keys: what there is of them.
    w_BtJ: float32 or bfloat16.
    key_start_Bt: as in `score_chunk`.
    key_end_Bt: likewise.
    scale_format: of the queries' scales, see `quantize_index_keys`.
    fill: as in `score_chunk`.
    target: where the kernel is to run.

  Raises:
    NotImplementedError: shape, dtype or device isn't supported.
  """
  mosaic.require(target)
  if keys.scale is not None:
    q_BtJI, q_scale_BtJ = quantization.quantize(
      q_BtJI, power_of_two=scale_format == 'ue8m0'
    )
    w_BtJ = w_BtJ.astype(jnp.float32) * q_scale_BtJ
  return score_chunk(
    q_BtJI,
    keys.values,
    w_BtJ,
    key_start_Bt,
    key_end_Bt,
    k_scale_BS=keys.scale,
    pages_BN=keys.pages_BN,
    fill=fill,
    target=target,
  )


def check_supported(q: Array, k: Array, *, out_dtype: Any) -> None:
  """Raises NotImplementedError for shapes and dtypes without a kernel."""
  heads, dim = q.shape[2:]
  if heads not in HEADS or dim not in DIMS:
    raise NotImplementedError(
      f'{heads} heads of {dim}; the kernel supports {HEADS} heads of {DIMS}'
    )
  if q.dtype != k.dtype or q.dtype not in (jnp.bfloat16, jnp.float8_e4m3fn):
    raise NotImplementedError(
      f'queries of dtype {q.dtype} and keys of dtype {k.dtype}; the kernel '
      'supports bfloat16 and float8_e4m3fn'
    )
  if out_dtype not in (jnp.float32, jnp.bfloat16):
    raise NotImplementedError(
      f'scores of dtype {out_dtype}; the kernel supports float32 and bfloat16'
    )
  if 0 in (*q.shape, *k.shape):
    raise NotImplementedError(
      f'queries of shape {q.shape} and keys of shape {k.shape}; the kernel '
      'supports no empty arrays'
    )


def _pad(x: Array, missing: int) -> Array:
  """Zeros at the end of axis 1."""
  if not missing:
    return x
  return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))


def chunk_gradients(
  q_BtJI: Float[Array, 'B t J I'],
  k_BSI: Float[Array, 'B S I'],
  w_BtJ: Float[Array, 'B t J'],
  g_BtS: Float[Array, 'B t S'],
  key_start_Bt: Int32[Array, 'B t'],
  key_end_Bt: Int32[Array, 'B t'],
  *,
  target: mosaic.Target = mosaic.Target.DEVICE,
) -> tuple[Array, Array, Array]:
  """Gradients of some queries' scores, for callers that walk over chunks.

  Args:
    q_BtJI: bfloat16.
    k_BSI: bfloat16.
    w_BtJ: float32 or bfloat16.
    g_BtS: gradient of the scores; ignored outside the ranges, NaN included.
    key_start_Bt: first valid key of each query.
    key_end_Bt: one past the last.
    target: where the kernels are to run.

  Returns:
    dq [B, t, J, I] bfloat16, dk [B, S, I] float32 (to be added over chunks),
    dw [B, t, J] float32.

  Raises:
    NotImplementedError: shape, dtype or device isn't supported.
  """
  check_supported(q_BtJI, k_BSI, out_dtype=jnp.float32)
  if q_BtJI.dtype != jnp.bfloat16:
    raise NotImplementedError(
      f'gradients of queries of dtype {q_BtJI.dtype}; the kernels support '
      'bfloat16'
    )
  mosaic.require(target)
  from pallas_kernels.lightning_indexer import mosaic_backward

  batch, num_queries, heads, dim = q_BtJI.shape
  num_keys = k_BSI.shape[1]
  tile = mosaic_backward.TILE
  missing_queries = -num_queries % (tile // heads)
  missing_keys = -num_keys % tile
  g_BtS = g_BtS.astype(jnp.float32)
  if missing_keys:
    g_BtS = jnp.pad(g_BtS, ((0, 0), (0, 0), (0, missing_keys)))
  dq_BRI, dk_BSI, dw_BR = mosaic_backward.gradients(
    _pad(q_BtJI, missing_queries).reshape(batch, -1, dim),
    _pad(k_BSI, missing_keys),
    _pad(w_BtJ.astype(jnp.float32), missing_queries).reshape(batch, -1),
    g_BtS,
    jnp.clip(key_start_Bt, 0, num_keys),
    jnp.clip(key_end_Bt, 0, num_keys),
    heads=heads,
    target=target,
  )
  return (
    dq_BRI.reshape(batch, -1, heads, dim)[:, :num_queries],
    dk_BSI[:, :num_keys],
    dw_BR.reshape(batch, -1, heads)[:, :num_queries],
  )
